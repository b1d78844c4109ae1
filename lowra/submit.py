"""Enter a method into the leaderboard: `python -m lowra.submit methods=my_method`.

Checks the method's contract, runs the tracks on the miniatures (weights only: minutes once they are built), and writes
one small folder that a pull request adds under `results/leaderboard/`. `python -m lowra.report --verify FOLDER` checks
such a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lowra import signals
from lowra.cli import quiet_libraries, tell_mistakes

TRACKS = ("paper", "three", "released", "one_short")
SUBSETS = ("vit", "stable_diffusion", "mistral_sft", "mistral_dpo")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m lowra.submit",
        description="Run one method on the tracks of the leaderboard and write the folder that a pull request adds.",
        epilog='Settings are those of lowra.run, such as methods=my_method "hydra.searchpath=[file://$PWD/conf]".',
    )
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="methods=NAME, and what it takes to find it")
    parser.add_argument("--tracks", default=",".join(TRACKS), help="which tracks (default: %(default)s)")
    parser.add_argument("--subsets", default=",".join(SUBSETS), help="of which subsets (default: %(default)s)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: results/leaderboard/NAME")
    arguments = parser.parse_args()
    signals.leave()
    tell_mistakes(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    quiet_libraries()
    from lowra.errors import unknown
    from lowra.submission import submit

    signals.stop()
    signals.nothing_kept()
    chosen = {}
    for kind, known in (("tracks", TRACKS), ("subsets", SUBSETS)):
        chosen[kind] = [name for name in str(getattr(arguments, kind)).split(",") if name]
        for name in chosen[kind]:
            if name not in known:
                raise unknown(kind[:-1], name, known)
    folder = submit(arguments.settings, chosen["tracks"], chosen["subsets"], arguments.to)
    print(f"\nWritten to {folder}. Check it with: python -m lowra.report --verify {folder}")


if __name__ == "__main__":
    main()
