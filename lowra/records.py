"""Records: what was measured, one whole record per (draw, layer, method variant) and per scored model.

A folder holds `records/`, and the union of the files in it is the truth. A process at work appends to a journal of its
own, a line a record with its checksum, and turns it into one parquet file when it ends; nobody writes to or deletes
another's file, so any number of processes can share a folder, and a kill loses what was under way and no more. Records
are named by a key, the digest of all that decides their numbers: what is there is never computed again, and what was
computed twice counts once. A journal also says what its process is about to do, which others then leave to the last.

Fig. 7's sweep (14 numbers of models x 10 draws x 264 layers x 4 methods = 147,840 records) is one file a process, of
159 MB in all while journals, of 14 MB as parquet.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import stat
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowra.code import digest
from lowra.errors import LowraError
from lowra.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

FORMAT = 2  # of the files in records/

LAYER = "layer"
SCORE = "score"

# Of every record, then of a layer's, then of a scored model's: name to Arrow type. `stats`, `options`, `settings`,
# `values` and `history` are JSON, since their keys are the method's or the metric's own.
FIELDS: dict[str, str] = {"kind": "string", "key": "string", "context": "string", "finished": "string"}
LAYER_FIELDS: dict[str, str] = {
    "subset": "string",
    "source": "string",
    "data": "string",
    "n_loras": "int64",
    "trial": "int64",
    "models": "list",
    "seed": "int64",
    "variant": "string",
    "method": "string",
    "pretty": "string",
    "label": "string",
    "reference": "string",
    "options": "string",
    "merge_dtype": "string",
    "merge_order": "string",
    "knows_rank": "bool",
    "device": "string",
    "threads": "int64",
    "layer_model": "string",
    "layer_name": "string",
    "layer_type": "string",
    "depth": "int64",
    "d": "int64",
    "k": "int64",
    "rank": "int64",
    "w_error": "double",
    "exact_fraction": "double",
    "exact_layer": "bool",
    "floor_w_error": "double",
    "candidates": "int64",
    "seconds": "double",
    "status": "string",
    "failed": "bool",
    "stats": "string",
    "weights": "list_string",
    "history": "string",
}
SCORE_FIELDS: dict[str, str] = {
    "metric": "string",
    "heading": "string",
    "settings": "string",
    "column": "string",
    "values": "string",
    "weights": "list_string",
    "base": "string",
    "inputs": "string",
}
_OF_KIND = {LAYER: FIELDS | LAYER_FIELDS, SCORE: FIELDS | SCORE_FIELDS}
COORDINATES = ("subset", "source", "data", "n_loras", "trial", "models", "seed", "variant", "method", "label")
PLACE = (*COORDINATES, "merge_dtype", "merge_order", "knows_rank", "device")
SETTING = ("subset", "source", "data", "merge_dtype", "merge_order", "knows_rank", "seed")
LAYER_NAME = ("layer_model", "layer_name")
STEP_PLACE = (*PLACE, *LAYER_NAME, "step")  # what the numbers of a step of a history stand beside


def key_of(settings: Mapping[str, Any]) -> str:
    """The key of a record: a digest of everything that decides its numbers, in canonical JSON."""
    return digest(json.dumps(settings, sort_keys=True, default=str))


# ---- JSON with the numbers it lacks -----------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """JSON in one line; NaN and infinities become objects that `loads` turns back."""
    return json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)


def loads(text: str | bytes) -> Any:
    """What `dumps` wrote."""
    return json.loads(text, object_hook=_back)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _back(pairs: dict[str, Any]) -> Any:
    return float(pairs["float"]) if pairs.keys() == {"float"} and pairs["float"] in ("nan", "inf", "-inf") else pairs


# ---- One folder -------------------------------------------------------------------------------------------------


class Store:
    """The records of one run folder, shared with every other process that works there.

    folder: the run folder; records lie in `records/`, weights that wait for a metric in `weights/`.
    damaged: files and lines that could not be read and were left out. others: whether another process has been seen at
    work since this one was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / "records"
        self.weights = KeptWeights(folder)
        self.contexts: dict[str, dict[str, Any]] = {}
        self.damaged: list[str] = []
        self.others = False
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._offsets: dict[str, int] = {}
        self._claims: dict[str, set[str]] = {}  # journal: keys
        self._strange: set[str] = set()  # names in `records/` that are no files
        self._journal: Path | None = None
        self._mine: list[dict[str, Any]] = []
        self._context = ""
        self._lock = threading.RLock()  # tasks are listed in one thread while results are written in another

    # -- reading

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        with self._lock:
            before = dict(self._offsets)
            self._refresh()
            self.others = self.others or self._offsets != before

    def _refresh(self) -> None:
        for _ in range(3):  # a journal that vanishes while we look has become a parquet file
            try:
                names = sorted(os.listdir(self.place))
            except (FileNotFoundError, NotADirectoryError):
                return
            for ended in self._claims.keys() - set(names):
                del self._claims[ended]
            vanished = [name for name in names if not self._read(name)]
            if not vanished:
                return

    def _read(self, name: str) -> bool:
        """Read what is new in one file; False if it has vanished."""
        path = self.place / name
        if name.startswith(".") or not name.endswith((".jsonl", ".parquet")) or name in self._strange:
            return True
        try:
            if name not in self._offsets and not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
                raise OSError(errno.EINVAL, "not a file")
            if name.endswith(".jsonl") and path != self._journal:
                self._read_journal(path)
            elif name.endswith(".parquet") and name not in self._offsets:
                self._read_parquet(path)
                self._offsets[name] = 0
        except FileNotFoundError:
            return False
        except OSError as error:
            self._damage(f"{path} ({error.strerror})")
            if not isinstance(error, PermissionError):
                self._strange.add(name)
        return True

    def _read_journal(self, path: Path) -> None:
        start = self._offsets.get(path.name, 0)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= start:
                return
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1  # the rest of a line under way is read when it is whole
        self._offsets[path.name] = start + end
        for number, line in enumerate(data[:end].splitlines()):
            try:
                checksum, text = line.split(b" ", 1)
                if int(checksum, 16) != zlib.crc32(text):
                    raise ValueError("checksum")
                entry = loads(text)
                if "define" in entry:
                    self.contexts[str(entry["define"])] = _context(entry["value"])
                elif "claim" in entry:
                    self._claims.setdefault(path.name, set()).update(map(str, entry["claim"]))
                else:
                    self._take(_whole(entry))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._damage(f"{path}, line {number + 1} of those from byte {start}")

    def _read_parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, partitioning=None)
            metadata = table.schema.metadata or {}
            if int(metadata[b"lowra.format"]) > FORMAT:
                raise ValueError("written by a later version of lowra")
            contexts = {str(name): _context(value) for name, value in loads(metadata[b"lowra.contexts"]).items()}
            rows = [_whole(row) for row in table.to_pylist()]
        except (FileNotFoundError, PermissionError):
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f": {error}" if type(error) is ValueError else ""
            self._damage(f"{path} ({type(error).__name__}{why})")
            return
        for row in rows:
            self._take(row)
        self.contexts.update(contexts)

    def _damage(self, what: str) -> None:
        self.damaged.append(what)
        print(f"left out, damaged: {what}; the run goes on without it.", file=sys.stderr)

    def _take(self, record: dict[str, Any]) -> None:
        place = (record["kind"], record["key"])
        known = self._records.get(place)
        if known is None or _order(record) < _order(known):
            self._records[place] = record

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of a key, or None. Of several, the same for every reader: not failed, then the earliest."""
        return self._records.get((kind, key))

    def done(self, kind: str, key: str) -> bool:
        """Whether a key has a record that did not fail; what failed is tried again by the next run."""
        record = self._records.get((kind, key))
        return record is not None and not record.get("failed")

    def claimed(self, key: str) -> bool:
        """Whether another process has said that it is about to do a key's work and, as far as can be known, lives."""
        return any(key in keys and not _ended(name) for name, keys in self._claims.items())

    def all(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind."""
        with self._lock:
            return [record for (of, _), record in self._records.items() if of == kind]

    # -- writing

    def check_writable(self) -> None:
        """Raise LowraError if nothing can be written here, before any work is done; makes and leaves nothing."""
        try:
            place = next(p for p in (self.place, *self.place.parents) if p.exists())
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise LowraError(
                f"Cannot write results to {self.folder} ({error.strerror}); give another with results_dir=FOLDER."
            ) from None

    def open(self, context: Mapping[str, Any]) -> None:
        """Say who writes from now on: what is the same for all records of this process."""
        self._context = digest(dumps(context))
        self.contexts[self._context] = dict(context)
        self.others = False

    def _write(self, entry: Mapping[str, Any]) -> None:
        """Add a line to this process's journal."""
        entries = [entry]
        if self._journal is None:
            self.place.mkdir(parents=True, exist_ok=True)
            self._journal = self.place / f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            entries.insert(0, {"define": self._context, "value": self.contexts[self._context]})
        data = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in (dumps(each).encode() for each in entries))
        try:
            handle = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)
        except OSError as error:
            raise LowraError(
                f"Cannot write to {self._journal} ({error.strerror}); {len(self._mine)} records of this process are "
                "kept. Make room and start the same command again."
            ) from None

    def claim(self, keys: Iterable[str]) -> None:
        """Tell others what this process is about to do. Raises LowraError when the disk is full."""
        self._write({"claim": list(keys)})

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record, whole or not at all, and take it in. Raises LowraError when the disk is full."""
        whole = _whole({**record, "context": self._context, "finished": _now()})
        self._write({name: value for name, value in whole.items() if value is not None})
        with self._lock:
            self._mine.append(whole)
            self._take(whole)
        return whole

    def close(self) -> None:
        """Turn this process's journal into a parquet file: the same records, a tenth of the bytes."""
        if self._journal is None:
            return
        if self._mine:
            path = self._journal.with_suffix(".parquet")
            write_records(self._mine, {self._context: self.contexts[self._context]}, path)
            self._offsets[path.name] = 0
        self._journal.unlink(missing_ok=True)
        self._journal, self._mine = None, []


@dataclass(frozen=True)
class KeptWeights:
    """Recovered weights that wait for a metric, in `weights/` of a run folder, named by the digest of their bytes.

    Whoever finds one missing recovers its layer again: any process may delete what it has scored.
    """

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}.safetensors"

    def keep(self, name: str, weight: Tensor) -> None:
        """Keep a weight (d, k) float32."""
        from safetensors.torch import save_file

        path = self._path(name)
        if path.exists():
            return
        with replacing(path) as temporary:
            save_file({"weight": weight.contiguous()}, temporary)

    def get(self, name: str) -> Tensor | None:
        """A kept weight, memory-mapped, or None where it is not there (or no longer)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._path(name))["weight"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def drop(self, names: Iterable[str]) -> None:
        """Delete kept weights, and the folder with the last of them."""
        if not (self.folder / "weights").is_dir():  # nothing is: not worth a look for each of hundreds of layers
            return
        for name in names:
            self._path(name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or others' weights in it
            (self.folder / "weights").rmdir()


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum() or c == "-")[:32]


def _ended(journal: str) -> bool:
    """Whether the process that a journal is named by is known to be gone: of those on other machines nothing is."""
    import psutil

    host, _, process = journal.rpartition("-")[0].rpartition("-")
    return host == _host() and process.isdecimal() and not psutil.pid_exists(int(process))


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}Z"


def _order(record: Mapping[str, Any]) -> tuple[bool, str, str]:
    return bool(record.get("failed")), str(record["finished"]), str(record["context"])


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int64": (int,),
    "double": (float, int),
    "bool": (bool,),
    "list": (list,),
    "list_string": (list,),
}
_CHECKED = {kind: [(name, _TYPES[type_]) for name, type_ in fields.items()] for kind, fields in _OF_KIND.items()}

# What a record cannot do without: tables are sorted and joined by it.
_NEEDED = {
    LAYER: (*FIELDS, *COORDINATES, "pretty", "merge_dtype", "merge_order", "knows_rank", *LAYER_NAME),
    SCORE: (*FIELDS, "metric", "heading", "column", "settings", "values", "base", "inputs"),
}


def _whole(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with all the fields of its kind. Raises KeyError or ValueError for one that is none."""
    kind = record["kind"]
    whole = {}
    for name, types in _CHECKED[kind]:
        whole[name] = value = record.get(name)
        if value is not None and not isinstance(value, types):
            raise ValueError(f"{name} is a {type(value).__name__}")
    for name in ("models", "weights"):
        if name in whole:
            whole[name] = list(whole[name] or ())
    if lacking := [name for name in _NEEDED[kind] if whole[name] is None]:
        raise ValueError(f"no {lacking[0]}")
    return whole


def _context(value: Any) -> dict[str, Any]:
    """What is known of a process. Raises ValueError or TypeError for anything else."""
    context = dict(value)
    for name in ("config", "versions", "machine"):
        if not isinstance(context.get(name, {}), Mapping):
            raise ValueError(f"{name} is a {type(context[name]).__name__}")
    return context


def write_records(records: Sequence[Mapping[str, Any]], contexts: Mapping[str, Any], path: Path) -> None:
    """Write records and the contexts they name as one parquet file, under a temporary name first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"list": pa.list_(pa.int64()), "list_string": pa.list_(pa.string()), "bool": pa.bool_()}
    types |= {"string": pa.string(), "int64": pa.int64(), "double": pa.float64()}
    fields = FIELDS | LAYER_FIELDS | SCORE_FIELDS
    schema = pa.schema([(name, types[kind]) for name, kind in fields.items()])
    metadata = {"lowra.format": str(FORMAT), "lowra.contexts": dumps(dict(contexts))}
    columns = {name: [record.get(name) for record in records] for name in fields}
    table = pa.table(columns, schema=schema).replace_schema_metadata(metadata)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=9)


# ---- Many folders: what reports read ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """The records of one or more folders as tables (see `read`).

    layers: a row per (draw, layer, variant). scores: a row per (draw, variant, column of a metric), averaged over
    candidates. history: a row per step of methods that keep one. contexts: what is known of the processes that wrote
    them. notes: sentences on what was left out.
    """

    layers: pd.DataFrame
    scores: pd.DataFrame
    history: pd.DataFrame
    contexts: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Gathered:
    """The records of one or more folders as they lie there: what `tables` takes. rows: of layers."""

    rows: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    contexts: dict[str, dict[str, Any]]
    notes: list[str]


def gather(folders: Sequence[Path]) -> Gathered:
    """The records of run folders. Raises LowraError where a folder holds none."""
    rows: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    contexts: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for folder in folders:
        store = Store(Path(folder))
        store.refresh()
        found = store.all(LAYER)
        if not found:
            raise LowraError(f"{folder} holds no records of a run; expected a folder such as runs/vit/mini.")
        rows += [record | {"folder": str(folder)} for record in found]
        scores += store.all(SCORE)
        contexts |= store.contexts
        if store.damaged:
            notes.append(f"{len(store.damaged)} damaged records or files in {folder} were left out.")
    return Gathered(rows, scores, contexts, notes)


def read(folders: Sequence[Path], keys: Iterable[str] | None = None) -> Records:
    """The records of run folders, as tables.

    keys: only layer records of these keys (what a run was asked for); else all, of each label the newest variant.
    Raises LowraError where a folder holds no records.
    """
    found = gather(folders)
    wanted = None if keys is None else set(keys)
    return tables(found.rows, found.scores, found.contexts, wanted, found.notes)


def tables(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    contexts: dict[str, dict[str, Any]],
    wanted: set[str] | None = None,
    notes: Sequence[str] = (),
) -> Records:
    """Layer and score records as the tables of `Records`; see `read`."""
    import pandas as pd

    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if wanted is None or row["key"] in wanted:
            known = best.get(row["key"])
            if known is None or _order(row) < _order(known):
                best[row["key"]] = row
    kept, dropped = list(best.values()), 0
    if wanted is None:
        kept, dropped = _newest(kept)
    said = list(notes)
    if dropped:
        said.append(f"{dropped} records of older versions of the same methods were left out.")
    # Whoever finished what first: means are sums in this order, to the last bit.
    draw = lambda r: (*(str(r[c]) for c in SETTING), r["n_loras"], r["trial"], r["label"])  # noqa: E731
    kept.sort(key=lambda r: (*draw(r), r["layer_model"], r["depth"] or 0, r["layer_name"]))
    layers = _as_objects(pd.DataFrame([_row(record) for record in kept]))
    history = [step for record in kept if record.get("history") for step in _steps(record)]
    steps = _as_objects(pd.DataFrame(history))
    return Records(layers, _as_objects(_scores(kept, scores)), steps, contexts, tuple(said))


def _as_objects(frame: pd.DataFrame) -> pd.DataFrame:
    """Texts as Python's own, in one block: of dozens of string arrays each is taken apart by itself, slowly."""
    import pandas as pd

    texts = [name for name in frame if isinstance(frame[name].dtype, pd.StringDtype)]
    return frame.astype(dict.fromkeys(texts, object)).copy()


def _newest(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """Of each setting and label, the variant recorded last; of each of its layers, the record finished last."""
    last: dict[tuple[Any, ...], tuple[str, str]] = {}
    for row in rows:
        place = (*(row[c] for c in SETTING), row["label"])
        last[place] = max(last.get(place, ("", "")), (row["finished"], row["variant"]))
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if last[(*(row[c] for c in SETTING), row["label"])][1] != row["variant"]:
            continue
        where = (*(row[c] for c in SETTING), row["variant"], row["trial"], tuple(row["models"]))
        where += tuple(row[c] for c in LAYER_NAME)
        known = newest.get(where)
        if known is None or (not row["failed"], row["finished"]) > (not known["failed"], known["finished"]):
            newest[where] = row
    return list(newest.values()), len(rows) - len(newest)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's row: the record's fields, its statistics as columns of their own."""
    skipped = ("kind", "stats", "history")
    row = {name: value for name, value in record.items() if name not in skipped}
    for name in ("w_error", "exact_fraction", "floor_w_error"):
        row[name] = math.nan if row[name] is None else row[name]
    row["failed"], row["exact_layer"] = bool(row["failed"]), bool(row["exact_layer"])
    return row | {f"stat_{name}": value for name, value in loads(record["stats"] or "{}").items()}


def _place(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in PLACE}


def _steps(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    where = _place(record) | {name: record[name] for name in LAYER_NAME}
    for number, step in enumerate(loads(record["history"])):
        yield where | {"step": number} | step


def model_digest(layers: Iterable[Mapping[str, Any]], candidate: int) -> str | None:
    """The digest of a recovered model: of its layers' names and weights. None where a layer has no such candidate."""
    parts = []
    for record in layers:
        if len(record["weights"]) <= candidate:
            return None
        parts.append(f"{record['layer_model']}|{record['layer_name']}|{record['weights'][candidate]}")
    return digest("\n".join(sorted(parts)))


def _recovered(layers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Mapping[str, Any]], list[str | None]]]:
    """The layers of each recovered model, with the digests of the model by candidate."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in layers:
        place = _place(record) | {"models": tuple(record["models"])}
        groups.setdefault(tuple(place.values()), []).append(record)
    for group in groups.values():
        count = {len(record["weights"]) for record in group}
        if len(count) == 1 and 0 not in count:
            yield group, [model_digest(group, c) for c in range(count.pop())]


def scores_of(layers: Sequence[Mapping[str, Any]], scores: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of some scores those of the models that layers make up, in the order of their keys: other runs' add none."""
    models = {name for _, digests in _recovered(layers) for name in digests}
    return sorted((score for score in scores if models & set(score["weights"])), key=lambda score: score["key"])


def _scores(layers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Scores joined to the draws whose recovered models they scored, averaged over candidates."""
    import pandas as pd

    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for score in scores:
        for name in score["weights"]:
            by_model.setdefault(name, []).append(score)
    rows = []
    for group, digests in _recovered(layers):
        found: dict[tuple[str, str, str], dict[str, tuple[str, float]]] = {}
        for name in digests:
            for score in by_model.get(str(name), ()):
                for column, value in loads(score["values"]).items():
                    scored = (score["metric"], column, score["settings"] + score["base"] + score["inputs"])
                    known = found.setdefault(scored, {})
                    if str(name) not in known or known[str(name)][0] < score["finished"]:
                        known[str(name)] = (score["finished"], value)
        latest: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        for (metric, column, _), known in found.items():
            if set(known) != set(digests):
                continue
            score = next(s for s in by_model[str(digests[0])] if s["metric"] == metric)
            heading = score["heading"] if column == score["column"] else column
            values = [known[str(name)][1] for name in digests]
            row = _place(group[0]) | {"models": list(group[0]["models"]), "metric": metric, "column": column}
            row |= {
                "headline": column == score["column"],
                "heading": heading,
                "settings": score["settings"],
                "value": sum(values) / len(values),
            }
            row |= {"weights": digests}
            newest = max(time for time, _ in known.values())
            if newest >= latest.get((metric, column), ("", {}))[0]:
                latest[metric, column] = (newest, row)
        rows += [row for _, row in latest.values()]
    return pd.DataFrame(rows)


def trials(layers: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """A row per (setting, draw, variant): what its layers say together, and a column per metric.

    W-Error is the mean over layers (Eq. 8), NaN with a failed layer; `w_error_layer_std` the deviation over layers;
    `seconds` the sum over layers.
    """
    import pandas as pd

    where = [*COORDINATES, "pretty", "merge_dtype", "merge_order", "knows_rank", "device"]
    grouped = layers.assign(models=layers["models"].map(tuple)).groupby(where, sort=False, dropna=False)
    table = grouped.agg(
        w_error=("w_error", lambda e: e.mean(skipna=False)),
        w_error_layer_std=("w_error", lambda e: e.std() if len(e) > 1 else 0.0),
        exact_fraction=("exact_fraction", lambda e: e.mean(skipna=False)),
        exact_layers=("exact_layer", "sum"),
        layers=("w_error", "size"),
        failed_layers=("failed", "sum"),
        seconds=("seconds", "sum"),
    ).reset_index()
    table.loc[table["failed_layers"] > 0, ["w_error", "exact_fraction"]] = math.nan
    if len(scores):
        on = [name for name in where if name not in ("pretty", "method", "label")]
        wide = scores.assign(models=scores["models"].map(tuple)).pivot_table(
            index=on, columns="column", values="value", sort=False
        )
        table = table.merge(wide.reset_index(), on=on, how="left")
    table["models"] = table["models"].map(list)
    return pd.DataFrame(table)
