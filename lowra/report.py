"""Tables and figures from records: `python -m lowra.report runs/vit/mini`. Runs nothing, needs no model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowra import signals
from lowra.cli import tell_mistakes

if TYPE_CHECKING:
    from lowra.records import Records


def read(folders: Sequence[Path]) -> Records:
    """The records of some folders; raises LowraError where there are none."""
    from lowra import records

    check(folders)
    return records.read(folders)


def check(folders: Sequence[Path]) -> None:
    """Raise LowraError for a folder that is none."""
    from lowra.errors import LowraError

    for folder in folders:
        if not folder.is_dir():
            raise LowraError(
                f"{folder} is no folder; expected one that a run or a report wrote, such as runs/vit/mini."
            )


def write_page(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of some folders; made anew where their records or what they show beside them are others.

    Raises LowraError where there are no records or the file cannot be written.
    """
    from lowra.digests import folder_digest
    from lowra.records import gather, tables
    from lowra.reporting import kept

    check(folders)
    found = gather(folders)

    def make() -> kept.Made:
        from lowra.reporting.page import page_of

        text = page_of(tables(found.rows, found.scores, found.contexts, None, found.notes))
        return kept.Made({"page.html": text.encode()}, "")

    outputs = [folder_digest(folder / "outputs") for folder in folders]
    given = ["page", found.rows, found.scores, found.contexts, found.notes, outputs, str(Path.cwd())]
    made = kept.made(given, make)
    kept.Made({path.name: made.files["page.html"]}, "").put(path.parent)
    return path


def refuse_mixed(records: Records, folders: Sequence[Path]) -> None:
    """Raise LowraError, naming what differs, unless the records of all folders are of one setting of the same data."""
    from lowra.errors import LowraError
    from lowra.reporting.views import SETTING

    layers = records.layers
    settings = {name: set(map(tuple, part[list(SETTING)].to_numpy())) for name, part in layers.groupby("folder")}
    first, *others = [name for name in map(str, folders) if name in settings]
    for other in others:
        if settings[first] & settings[other]:
            continue
        differing = [
            f"{column} {', '.join(sorted(one))} in {first} and {', '.join(sorted(two))} in {other}"
            for i, column in enumerate(SETTING)
            if (one := {str(s[i]) for s in settings[first]}) != (two := {str(s[i]) for s in settings[other]})
        ]
        raise LowraError(
            f"These folders cannot be one table: {'; '.join(differing)}. Report them one by one, or side by side with "
            "--summary."
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m lowra.report",
        description="Make tables and figures from records. One folder: write them into it. Several folders of the same "
        "data: print one table of them all, and say which records came from where.",
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="runs/SUBSET/SOURCE or an exported one")
    parser.add_argument("--summary", action="store_true", help="only print one Markdown table of all the folders")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="write the records, compactly, and tables and figures"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write everything as one HTML page, of any folders")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="FOLDER",
        help="check an entry to the leaderboard and run one of its draws and layers again (this runs its code)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of lowra.run for --verify")
    arguments = parser.parse_args()
    if bool(arguments.folders) == bool(arguments.verify):
        parser.error("give FOLDERs to report, or --verify FOLDER")
    wanted = {"--summary": arguments.summary, "--to": arguments.to, "--page": arguments.page}
    asked = [option for option, value in wanted.items() if value]
    if len(asked) > 1:
        parser.error(f"{' and '.join(asked)} are reports of their own; ask for one at a time")
    if arguments.set and not arguments.verify:
        parser.error("--set goes with --verify")
    if arguments.verify and asked:
        parser.error(f"--verify is a check of its own; leave {asked[0]} out")
    if arguments.page is not None and (not arguments.page.name or arguments.page.is_dir()):
        parser.error(f"--page is {str(arguments.page)!r}; expected the name of a file to write, such as page.html")
    signals.leave()
    tell_mistakes(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    if arguments.verify:
        from lowra.submission import verify

        signals.stop()
        print(verify(arguments.verify, arguments.set))
        return
    signals.stop()  # temporary files are cleaned away
    if arguments.page and not arguments.summary:
        print(f"Written: {write_page(arguments.folders, arguments.page)}")
        return
    from lowra import reporting
    from lowra.reporting import tables
    from lowra.reporting.export import export
    from lowra.reporting.views import views

    records = read(arguments.folders)
    if arguments.summary:
        print(tables.markdown(tables.summary(views(records))))
        return
    refuse_mixed(records, arguments.folders)
    if arguments.to:
        export(records, arguments.folders, arguments.to)
        print(reporting.write(records, arguments.to))
    elif len(arguments.folders) == 1:
        print(reporting.write(records, arguments.folders[0]))
    else:
        print(reporting.text(records))


if __name__ == "__main__":
    main()
