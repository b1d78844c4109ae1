"""The console script `lowra`: `lowra run subset=vit` is `python -m lowra.run subset=vit`."""

from __future__ import annotations

import importlib.util
import runpy
import sys

from lowra import __version__

COMMANDS = {
    "run": "recover a subset's base weights with every method, and score them",
    "build": "build a subset without attacking it",
    "recover": "n fine-tuned model folders in, the base model out",
    "report": "tables, figures and a page from the records of runs",
    "submit": "run the tracks with a method of one's own, for the leaderboard",
}


def main() -> None:
    """Run the command named first; alone, list them."""
    available = {name: said for name, said in COMMANDS.items() if importlib.util.find_spec(f"lowra.{name}")}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--version", "-V"):
        print(f"lowra {__version__}")
    elif name in ("", "-h", "--help"):
        print("lowra: recover the pre-fine-tuning weights of LoRA fine-tuned models, and measure how well it goes.\n")
        for command, said in available.items():
            print(f"  lowra {command:<8} {said}")
        print("\nlowra COMMAND --help says more.")
    elif name not in available:
        print(f"error: Unknown command {name!r}; known: {', '.join(available)}.", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv = [f"lowra {name}", *sys.argv[2:]]
        runpy.run_module(f"lowra.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
