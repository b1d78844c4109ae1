"""Run the tests with the newest versions of everything, and with the core alone at its lowest.

    python scripts/check_versions.py newest     # what a fresh install gives today; where it passes, it becomes the lock
    python scripts/check_versions.py lowest     # a plain `pip install lowra`, every dependency at its floor

Tests that need the extras are skipped where these are not installed. Each makes a throwaway environment (up to 6 GB),
installs, runs the tests and writes its section of results/versions.md. When the newest pass, their versions go to
.ci/constraints.txt, which the README's commands and CI install with. It has no hashes: pip refuses an editable install
beside hashed requirements.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
OUTCOME = ROOT / "results" / "versions.md"
INTRODUCTION = """# Versions the tests were run with

Written by `scripts/check_versions.py`. Lint and types are CI's business and not repeated here.
"""


def requirements(extra: str | None = None) -> list[str]:
    """The requirements of the core, or of an extra with all that it includes, as pyproject.toml writes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    found = []
    for line in lines:
        if included := re.fullmatch(r"lowra\[(.+)\]", line):
            for name in included[1].split(","):
                found += requirements(name)
        else:
            found.append(line)
    return found


def floors(lines: Iterable[str]) -> dict[str, str]:
    """Requirements to their floors."""
    pairs = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    return dict(sorted(pairs.items()))


def install(python: Path, which: str) -> None:
    """Install lowra with all its extras at today's newest versions, or its core alone, each dependency at its floor."""
    pinned = [f"{name}=={version}" for name, version in floors(requirements()).items()]
    what = [".[dev]"] if which == "newest" else [*pinned, "pytest", "."]
    arguments = [f"--editable={part}" if part.startswith(".") else part for part in what]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], cwd=ROOT, check=True)


def frozen(python: Path) -> dict[str, str]:
    """What is installed: name to version."""
    command = [python, "-m", "pip", "list", "--exclude-editable", "--format=freeze", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = (line.split("==", 1) for line in done.stdout.split() if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def write_outcome(which: str, passed: bool, summary: str, installed: dict[str, str]) -> None:
    """Put this run's section into results/versions.md and leave the other's alone."""
    text = OUTCOME.read_text() if OUTCOME.exists() else INTRODUCTION
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    wanted = floors([*requirements(), *requirements("dev")])
    versions = ", ".join(f"{name} {installed[name]}" for name in wanted if name in installed)
    today = datetime.now(UTC).date()
    sections[which] = (
        f"\n{today}, Python {platform.python_version()}, {platform.system()} {platform.machine()}: "
        f"**{'passed' if passed else 'FAILED'}** ({summary})\n\n{versions}\n\n"
    )
    body = "".join(f"## {name}\n{sections[name]}" for name in sorted(sections))
    OUTCOME.write_text(f"{INTRODUCTION}\n{body}".rstrip() + "\n")


def write_constraints(installed: dict[str, str]) -> None:
    """The lock: every package that the tests passed with, but pip and what builds lowra itself."""
    kept = {n: v.split("+")[0] for n, v in installed.items() if n not in ("pip", "setuptools", "wheel")}
    lines = [f"{name}=={version}" for name, version in sorted(kept.items())]
    head = "# What the tests last passed with: pip install -c .ci/constraints.txt -e '.[dev]'\n"
    head += "# Made by scripts/check_versions.py newest\n"
    CONSTRAINTS.write_text(head + "\n".join(lines) + "\n")


def main() -> int:
    """Install, test, write down; the exit status is the tests'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("newest", "lowest"))
    parser.add_argument("--venv", type=Path, help="use (or make, and keep) this environment instead of a throwaway one")
    options, tests = parser.parse_known_args()  # the rest goes to pytest; nothing is written down then
    with tempfile.TemporaryDirectory(prefix="lowra-versions-") as temporary:
        folder = options.venv or Path(temporary)
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            install(python, options.which)
        done = subprocess.run(
            [python, "-m", "pytest", *tests], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=None
        )
        sys.stdout.write(done.stdout)
        if not tests:
            installed = frozen(python)
            summary = re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1]).strip("= ")
            write_outcome(options.which, done.returncode == 0, summary, installed)
            if options.which == "newest" and done.returncode == 0:
                write_constraints(installed)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
