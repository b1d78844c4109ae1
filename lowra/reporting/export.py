"""Records put together in one small file, to be committed or sent: what `results/` is made of."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowra.errors import LowraError
from lowra.files import replacing
from lowra.records import LAYER, SCORE, Records, Store, write_records

EXPORTED = "records.parquet"

# Outputs side by side, as metrics write them into a run's folder.
GALLERIES = ("images.png", "texts.html", "texts.md")


def export(records: Records, folders: Sequence[Path], to: Path) -> Path:
    """Write the records that a report shows, and the scores of its models, to `to/records/records.parquet`.

    Texts and images side by side come along, of the first folder that has them. records: of `read(folders)`. An earlier
    export is replaced. Raises LowraError for a folder that a run wrote, whose own records would be mixed with these.
    """
    place = to / "records"
    others = [path.name for path in place.iterdir() if not path.name.startswith(".")] if place.is_dir() else []
    if set(others) - {EXPORTED}:
        raise LowraError(f"{to} holds records of a run; export to another folder, such as results/vit/mini.")
    keys = set(records.layers["key"])
    models = {name for names in records.scores["weights"] for name in names} if len(records.scores) else set()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    contexts: dict[str, Any] = {}
    for folder in folders:
        store = Store(Path(folder))
        store.refresh()
        kept = [record for record in store.all(LAYER) if record["key"] in keys]
        kept += [record for record in store.all(SCORE) if models & set(record["weights"])]
        for record in kept:
            rows.setdefault((record["kind"], record["key"]), record)
            contexts[record["context"]] = store.contexts.get(record["context"], {})
    # Whole columns that are equal compress to nothing in this order.
    ordered = sorted(rows.values(), key=lambda r: (r["kind"], str(r.get("variant")), r.get("trial") or 0, r["key"]))
    try:
        write_records(ordered, contexts, place / EXPORTED)
        for name in GALLERIES:
            source = next((Path(f) / name for f in folders if (Path(f) / name).is_file()), None)
            if source is not None and source.parent.resolve() != to.resolve():
                with replacing(to / name) as temporary:
                    shutil.copyfile(source, temporary)
    except OSError as error:
        raise LowraError(f"Cannot write {place / EXPORTED} ({error.strerror}); choose another folder.") from None
    return place / EXPORTED
