"""The LoWRA-Bench on-disk format: one row per layer, read lazily from Arrow buffers into tensors.

Columns: `layer_model` (component: "", "unet", "text_encoder"), `layer_name` (the checkpoint's key), `pre_ft_name`,
`pre_ft_weight` (d, k), and for each LoRA i `lora_{i}_name`, `lora_{i}_rank`, `lora_{i}_alpha`, `lora_{i}_A_weight`
(r, k), `lora_{i}_B_weight` (d, r). This is the schema of the public data set `Eliahu/LoWRA-Bench`; builders write it,
the benchmark reads it. The number of LoRAs is whatever the columns hold, and ranks may differ between LoRAs.

Other kinds of fine-tuning have further columns, which readers of the published data ignore: `lora_{i}_kind`, null for
plain LoRA, and a matrix for each tensor that `lowra.bench.updates.KINDS` gives the kind, `lora_{i}_magnitude` and so
on. Where a kind has no A and B these are null, and `lora_{i}_rank` is the largest rank its update can have.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from lowra.bench.updates import KINDS, Update, check_alpha, check_rank
from lowra.digests import remembered
from lowra.errors import LowraError, unknown
from lowra.packages import require

_LAYER_COLUMNS = ("layer_model", "layer_name", "pre_ft_name", "pre_ft_weight")
_LORA_COLUMNS = ("name", "rank", "alpha", "A_weight", "B_weight")
_PLAIN = ("lora", "rslora")  # kinds that need no further columns
_LORA_COLUMN = re.compile(r"^lora_(\d+)_(name|rank|alpha|A_weight|B_weight)$")


@dataclass(frozen=True)
class Layer:
    """One row: the pre-fine-tuning weight of a layer and the updates that were read with it.

    model: the component ("" for single-component models). name: the checkpoint's key. weight: (d, k) float32.
    """

    model: str
    name: str
    pre_ft_name: str
    weight: Tensor
    loras: tuple[Update, ...]


@dataclass(frozen=True)
class LayerInfo:
    """What is known of a layer without reading its weight. `ranks` has one entry per LoRA."""

    model: str
    name: str
    pre_ft_name: str
    d: int
    k: int
    ranks: tuple[int, ...]

    @property
    def label(self) -> str:
        """Component and name in one string, for messages and keys."""
        return f"{self.model}:{self.name}" if self.model else self.name


class LayerTable(Protocol):
    """A readable subset: rows are layers, whatever they are stored in.

    Tables can be pickled: in another process they open themselves again.
    """

    @property
    def infos(self) -> tuple[LayerInfo, ...]:
        """What is known of every layer without reading weights."""
        ...

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the LoRAs, in the order of a layer's `loras`."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Read one layer with the LoRAs asked for (all by default), and no other."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when any weight does. Raises LowraError for numbers that nothing can be done with."""
        ...


# ---- Arrow buffers to tensors -----------------------------------------------------------------------------------


def to_tensor(array: pa.Array, what: str) -> Tensor:
    """One list cell of an Arrow array as a float32 tensor, without Python lists.

    array: length 1; nested lists or fixed-size lists (or an extension type over them) of float16/32/64.
    Trailing dimensions of length 1 (1x1 convolutions) are dropped down to a matrix.
    Raises LowraError for a missing value, a ragged list or another value type; `what` names the cell.
    """
    shape: list[int] = []
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
            continue
        if array.null_count:
            raise LowraError(f"{what} has missing values; every weight must be a full matrix of numbers.")
        if pa.types.is_fixed_size_list(array.type):
            width, inner = array.type.list_size, array.flatten()
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            lengths = pc.min_max(pc.list_value_length(array)).as_py()
            if lengths["min"] != lengths["max"]:
                raise LowraError(f"{what} is ragged: rows of {lengths['min']} to {lengths['max']} numbers.")
            width, inner = lengths["max"] or 0, array.flatten()
        else:
            break
        shape.append(width)
        array = inner
    if not pa.types.is_floating(array.type):
        raise LowraError(f"{what} holds {array.type} values; expected float16 or float32 numbers in nested lists.")
    # The copy detaches the tensor from memory-mapped, read-only pages: an in-place operation on it stays legal.
    values = np.array(array.to_numpy(zero_copy_only=True), dtype=np.float32, copy=True)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return torch.from_numpy(values).reshape(shape)


def _list_array(weight: Tensor, value_type: pa.DataType) -> pa.Array:
    """A (rows, columns) matrix as a list<list<float>> array of length 1, from its buffer."""
    rows, columns = weight.shape
    values = pa.array(weight.detach().cpu().contiguous().float().numpy().reshape(-1)).cast(value_type)
    inner = pa.ListArray.from_arrays(np.arange(0, rows * columns + 1, columns, dtype=np.int32), values)
    return pa.ListArray.from_arrays(np.array([0, rows], dtype=np.int32), inner)


def _null_matrix(value_type: pa.DataType) -> pa.Array:
    """The array of `_list_array` where there is no matrix."""
    return pa.nulls(1, pa.list_(pa.list_(value_type)))


# ---- Writing ----------------------------------------------------------------------------------------------------


def write_dataset(layers: Iterable[Layer], folder: Path, *, dtype: str = "float32") -> Path:
    """Write layers as one parquet file in `folder`, a row group per layer, streaming.

    The folder appears only once it is complete: rows go to a temporary folder, a process's own, that is renamed at the
    end. dtype: "float32" or "float16", the stored precision. Returns `folder`.

    rsLoRA is written as plain LoRA, with the alpha that gives the same scale. Subsets of plain LoRA have no columns for
    other kinds.
    """
    value_type = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    writer = _Writer(partial / "train-00000-of-00001.parquet")
    names: tuple[str, ...] | None = None
    try:
        for layer in layers:
            here = tuple(lora.name for lora in layer.loras)
            if names is not None and here != names:
                raise LowraError(f"Layer {layer.name!r} has LoRAs {here}; the layers before it have {names}.")
            names = here
            writer.add(_row(layer, value_type))
        if names is None:
            raise LowraError("There are no layers to write; a subset needs at least one.")
        writer.close()
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _row(layer: Layer, value_type: pa.DataType) -> pa.Table:
    """A layer as a row."""
    columns: dict[str, Any] = {
        "layer_model": pa.array([layer.model], pa.string()),
        "layer_name": pa.array([layer.name], pa.string()),
        "pre_ft_name": pa.array([layer.pre_ft_name], pa.string()),
        "pre_ft_weight": _list_array(layer.weight, value_type),
    }
    d, k = layer.weight.shape
    for i, lora in enumerate(layer.loras):
        rank = lora.limit(d, k)
        columns[f"lora_{i}_name"] = pa.array([lora.name], pa.string())
        columns[f"lora_{i}_rank"] = pa.array([rank], pa.int64())
        columns[f"lora_{i}_alpha"] = pa.array([lora.lora_alpha if lora.factors else rank], pa.float64())
        for part in "AB":
            matrix = _list_array(getattr(lora, part), value_type) if lora.factors else _null_matrix(value_type)
            columns[f"lora_{i}_{part}_weight"] = matrix
        if lora.kind not in _PLAIN:
            columns[f"lora_{i}_kind"] = pa.array([lora.kind], pa.string())
            for name, tensor in lora.tensors.items():
                columns[f"lora_{i}_{name}"] = _list_array(tensor, value_type)
    return pa.table(columns)


class _Writer:
    """One parquet file, a row group per row. A row may have columns that those before it lack: null there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: pq.ParquetWriter | None = None

    def add(self, row: pa.Table) -> None:
        """Write one row."""
        if self._file is None:
            # Weights do not compress and dictionaries of distinct floats only cost time.
            self._file = pq.ParquetWriter(self._path, row.schema, compression="none", use_dictionary=False)
        schema = self._file.schema
        if more := [field for field in row.schema if field.name not in schema.names]:
            self._widen(more)
            self.add(row)
            return
        if row.schema != schema:
            cells = [row[at.name] if at.name in row.column_names else pa.nulls(1, at.type) for at in schema]
            row = pa.table(cells, schema=schema)
        self._file.write_table(row, row_group_size=1)

    def _widen(self, more: Sequence[pa.Field]) -> None:
        """Write the file again with further columns."""
        assert self._file is not None
        schema = self._file.schema
        self.close()
        before = self._path.with_suffix(".narrow")
        os.replace(self._path, before)
        for field in more:
            schema = schema.append(field)
        self._file = pq.ParquetWriter(self._path, schema, compression="none", use_dictionary=False)
        with pq.ParquetFile(before) as rows:
            for group in range(rows.num_row_groups):
                self.add(rows.read_row_group(group))
        before.unlink()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()


# ---- Reading ----------------------------------------------------------------------------------------------------


class _Rows(Protocol):
    """The rows of a stored data set; a backend a file format."""

    columns: tuple[str, ...]
    files: tuple[Path, ...]

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> pa.Table:
        """One row, with these columns and no others decoded."""
        ...

    def all(self, columns: Sequence[str]) -> pa.Table:
        """These columns of all rows: for small ones."""
        ...


class _ParquetRows:
    """Rows of parquet files in the order given; only the asked-for columns of the asked-for row are decoded."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = tuple(paths)
        self._opened: list[pq.ParquetFile] = []
        self.places: list[tuple[pq.ParquetFile, int, int]] = []  # (file, row group, row in it)
        self.columns: tuple[str, ...] = ()
        self._open: tuple[pq.ParquetFile, int, tuple[str, ...], int, Iterator[pa.RecordBatch]] | None = None
        for path in paths:
            with _readable(str(path)):
                file = pq.ParquetFile(path, memory_map=True)
            columns = tuple(file.schema_arrow.names)
            if self.columns and columns != self.columns:
                raise LowraError(f"{path} has other columns than the files before it; all shards must agree.")
            self.columns = columns
            self._opened.append(file)
            for group in range(file.num_row_groups):
                self.places += [(file, group, row) for row in range(file.metadata.row_group(group).num_rows)]

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int, columns: Sequence[str]) -> pa.Table:
        file, group, row = self.places[index]
        wanted = tuple(columns)
        with _readable(str(self.files[self._opened.index(file)])):
            if file.metadata.row_group(group).num_rows == 1:
                return file.read_row_group(group, columns=list(wanted))
            # Row groups of many layers (the published shards) are walked a row at a time; walking on from where the
            # last read stopped makes a pass over all layers decode each of them once.
            at = self._open
            if at is None or at[:3] != (file, group, wanted) or at[3] > row:
                at = (file, group, wanted, 0, file.iter_batches(1, row_groups=[group], columns=list(wanted)))
            batches = at[4]
            for _ in range(row - at[3]):
                next(batches)
            batch = next(batches)
            self._open = (file, group, wanted, row + 1, batches)
            return pa.Table.from_batches([batch])

    def all(self, columns: Sequence[str]) -> pa.Table:
        tables = []
        for path, file in zip(self.files, self._opened, strict=True):
            with _readable(str(path)):
                tables.append(file.read(columns=list(columns)))
        if any(table.schema != tables[0].schema for table in tables):
            raise LowraError(f"{self.files[0].parent} holds files whose columns differ in type; all shards must agree.")
        return pa.concat_tables(tables)


class _ArrowRows:
    """Rows of a memory-mapped `datasets.Dataset` (a `save_to_disk` folder, or one fetched from the Hub)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")
        self.columns = tuple(dataset.column_names)
        self.files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        self._views: dict[tuple[str, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def _view(self, columns: Sequence[str]) -> Any:
        wanted = tuple(columns)
        if wanted not in self._views:
            self._views[wanted] = self.dataset.select_columns(list(wanted))
        return self._views[wanted]

    def row(self, index: int, columns: Sequence[str]) -> pa.Table:
        return self._view(columns)[index : index + 1]

    def all(self, columns: Sequence[str]) -> pa.Table:
        return self._view(columns)[:]


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn Arrow's errors about a broken file into a sentence."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise LowraError(f"{what} is not a readable parquet file ({error}); fetch or build it again.") from None


class StoredTable:
    """A subset in the LoWRA-Bench schema, opened lazily.

    Opening reads and checks names, ranks, alphas and the first LoRA's factors, whose shapes are those of the layers;
    weights are read layer by layer by `read`. reopen: the function and arguments that open it again, in a process that
    unpickles the table. Raises LowraError, naming the layer, for rows that are no layers with LoRAs of the same models.
    """

    def __init__(self, rows: _Rows, where: str, reopen: tuple[Callable[..., StoredTable], tuple[Any, ...]]) -> None:
        self._rows = rows
        self._where = where
        self._reopen = reopen
        self._loras = _lora_indices(rows.columns, where)
        if not len(rows):
            raise LowraError(f"{where} has no rows; expected one row per layer.")
        small = [f"lora_{i}_{part}" for i in self._loras for part in ("name", "rank", "alpha", "kind")]
        small = [column for column in small if not column.endswith("_kind") or column in rows.columns]
        cells = rows.all(["layer_model", "layer_name", "pre_ft_name", *small]).to_pylist()
        self.model_names = tuple(self._text(cells[0], f"lora_{i}_name") for i in self._loras)
        self._alphas: list[tuple[float, ...]] = []  # per row
        self._kinds: list[tuple[str, ...]] = []  # per row
        self.infos = tuple(self._info(index, row) for index, row in enumerate(cells))
        labels = [info.label for info in self.infos]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise LowraError(f"{where} holds layer {repeated[0]!r} more than once; one row per layer is expected.")

    def __len__(self) -> int:
        return len(self.infos)

    def __reduce__(self) -> tuple[Callable[..., StoredTable], tuple[Any, ...]]:
        return self._reopen

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        if not isinstance(row[column], str) or not row[column]:
            raise LowraError(f"{column} in {self._where} is {row[column]!r} in some row; expected a name.")
        return row[column]

    def _tensor(self, row: pa.Table, column: str, label: str) -> Tensor:
        array = row.column(column).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0)
        tensor = to_tensor(array, f"{column} of layer {label!r} in {self._where}")
        if tensor.ndim != 2:
            raise LowraError(
                f"{column} of layer {label!r} in {self._where} has shape {tuple(tensor.shape)}; expected a matrix."
            )
        return tensor

    def _info(self, index: int, cells: Mapping[str, Any]) -> LayerInfo:
        name = self._text(cells, "layer_name")
        where = f"of layer {name!r} in {self._where}"
        names = tuple(self._text(cells, f"lora_{i}_name") for i in self._loras)
        if names != self.model_names:
            j = next(j for j, pair in enumerate(zip(names, self.model_names, strict=True)) if pair[0] != pair[1])
            raise LowraError(
                f"lora_{self._loras[j]}_name {where} is {names[j]!r}, and {self.model_names[j]!r} in the first row; a "
                "LoRA's columns must hold the same model in every row."
            )
        ranks = tuple(check_rank(cells[f"lora_{i}_rank"], f"lora_{i}_rank {where}") for i in self._loras)
        alphas = (cells[f"lora_{i}_alpha"] for i in self._loras)
        checked = zip(self._loras, alphas, ranks, strict=True)
        self._alphas.append(tuple(check_alpha(alpha, r, f"lora_{i}_alpha {where}") for i, alpha, r in checked))
        self._kinds.append(tuple(self._kind(cells.get(f"lora_{i}_kind"), i, where) for i in self._loras))
        d, k = self._shape(index, name)
        if max(ranks) > min(d, k):
            raise LowraError(f"Layer {name!r} is {d} x {k} and cannot hold a LoRA of rank {max(ranks)}.")
        return LayerInfo(str(cells["layer_model"] or ""), name, str(cells["pre_ft_name"] or ""), d, k, ranks)

    def _kind(self, stored: object, i: int, where: str) -> str:
        if stored is None:
            return "lora"
        if stored not in KINDS:
            raise unknown("kind of update", stored, KINDS, f"It is lora_{i}_kind {where}.")
        return str(stored)

    def _shape(self, index: int, name: str) -> tuple[int, int]:
        """A layer's (d, k), from factors where some model has them: they are far smaller than the weight."""
        with_factors = (i for i, kind in zip(self._loras, self._kinds[index], strict=True) if KINDS[kind].factors)
        if (i := next(with_factors, None)) is None:
            d, k = self._tensor(self._rows.row(index, ["pre_ft_weight"]), "pre_ft_weight", name).shape
            return d, k
        a, b = f"lora_{i}_A_weight", f"lora_{i}_B_weight"
        row = self._rows.row(index, [a, b])
        return self._tensor(row, b, name).shape[0], self._tensor(row, a, name).shape[1]

    def _columns(self, i: int, kind: str) -> list[str]:
        """The columns of a model's matrices; those that the data lacks are left out."""
        names = [f"lora_{i}_{part}" for part in [*["A_weight", "B_weight"] * KINDS[kind].factors, *KINDS[kind].tensors]]
        return [name for name in names if name in self._rows.columns]

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Read one layer with the LoRAs asked for (positions in `model_names`; all by default).

        Raises LowraError when a factor's shape does not fit the weight or its stated rank, or a kind lacks a tensor.
        """
        info, kinds = self.infos[index], self._kinds[index]
        chosen = range(len(self._loras)) if models is None else models
        columns = [column for m in chosen for column in self._columns(self._loras[m], kinds[m])]
        row = self._rows.row(index, ["pre_ft_weight", *columns])
        weight = self._tensor(row, "pre_ft_weight", info.label)
        d, k = weight.shape
        updates = []
        for m in chosen:
            updates.append(self._update(row, index, m, d, k))
        return Layer(info.model, info.name, info.pre_ft_name, weight, tuple(updates))

    def _update(self, row: pa.Table, index: int, m: int, d: int, k: int) -> Update:
        """One model's update of a (d, k) layer."""
        info, i, kind, label = self.infos[index], self._loras[m], self._kinds[index][m], self.infos[index].label
        rank = info.ranks[m]
        found = {column: self._tensor(row, column, label) for column in self._columns(i, kind) if _filled(row, column)}
        tensors = {name: found[f"lora_{i}_{name}"] for name in KINDS[kind].tensors if f"lora_{i}_{name}" in found}
        try:
            if not KINDS[kind].factors:
                update = Update.of(self.model_names[m], kind, tensors, rank)
            else:
                a, b = (self._tensor(row, f"lora_{i}_{part}_weight", label) for part in "AB")
                if a.shape != (rank, k) or b.shape != (d, rank):
                    raise LowraError(
                        f"LoRA {i} of layer {label!r} does not fit in {self._where}: A is {tuple(a.shape)} and B "
                        f"{tuple(b.shape)}, but the weight is {(d, k)} and the rank {rank}, so A must be {(rank, k)} "
                        f"and B {(d, rank)}."
                    )
                update = Update(self.model_names[m], rank, self._alphas[index][m], a, b, kind, tensors)
        except LowraError as error:
            raise error if kind in _PLAIN else LowraError(f"Layer {label!r} in {self._where}: {error}") from None
        if misfit := update.misfit(d, k):
            raise LowraError(
                f"LoRA {i} of layer {label!r} does not fit in {self._where}: it updates a {d} x {k} weight {misfit}."
            )
        return update

    def fingerprint(self) -> str:
        """What `scan` says of every layer; asked again only when a file has changed since the last time."""
        if not self._rows.files:
            return scan(self)
        return remembered(f"scan {_SCAN}", self._rows.files, lambda: scan(self))


_SCAN = 2
"""Count up whenever `scan` refuses more, so that data that an older one let through is looked at again."""


def scan(table: LayerTable) -> str:
    """One validating pass over all layers: shapes fit, numbers and merges are finite. Returns a digest.

    Raises LowraError, naming the layer, before any recovery has cost time.
    """
    digest = hashlib.sha256()
    largest = torch.finfo(torch.float32).max
    for index, info in enumerate(tqdm(table.infos, desc="check data", unit="layer", delay=2, leave=False)):
        layer = table.read(index)
        digest.update(f"{info.label}|{info.ranks}|{[update.alpha for update in layer.loras]}".encode())
        named = [("pre_ft_weight", layer.weight)]
        for update in layer.loras:
            if update.factors:
                named += [(f"A of {update.name}", update.A), (f"B of {update.name}", update.B)]
            if update.kind not in _PLAIN:
                digest.update(f"{update.name}|{update.kind}|{sorted(update.tensors)}".encode())
                named += [(f"{name} of {update.name}", tensor) for name, tensor in sorted(update.tensors.items())]
        for what, tensor in named:
            if not torch.isfinite(tensor).all():
                raise LowraError(f"{what} of layer {info.label!r} contains NaN or infinity; mend or drop that model.")
            digest.update(tensor.numpy().data)
        for update in layer.loras:
            if update.kind not in _PLAIN:
                if not torch.isfinite(update.apply(layer.weight)).all():
                    raise LowraError(
                        f"The {KINDS[update.kind].title} merge of {update.name} of layer {info.label!r} is not finite: "
                        "the update is too large for float32, or divides by a norm of zero; mend or drop that model."
                    )
                continue
            bound = update.rank * abs(update.scale) * float(update.A.abs().max()) * float(update.B.abs().max())
            if not bound <= largest:
                raise LowraError(
                    f"The update of {update.name} of layer {info.label!r} is too large for float32: alpha is "
                    f"{update.alpha:g}; mend or drop that model."
                )
    return digest.hexdigest()[:16]


def _filled(row: pa.Table, column: str) -> bool:
    """Whether a row of one has a value there."""
    return row.column(column).null_count == 0


def _lora_indices(columns: Sequence[str], where: str) -> tuple[int, ...]:
    """The LoRA numbers in the columns; raises LowraError when a needed column is missing."""
    missing = [name for name in _LAYER_COLUMNS if name not in columns]
    found: dict[int, set[str]] = {}
    for column in columns:
        if match := _LORA_COLUMN.match(column):
            if str(int(match[1])) != match[1]:
                raise LowraError(f"{where} has a column {column!r}; LoRAs are numbered without leading zeros.")
            found.setdefault(int(match[1]), set()).add(match[2])
    for i, parts in sorted(found.items()):
        missing += [f"lora_{i}_{part}" for part in _LORA_COLUMNS if part not in parts]
    if missing or len(found) < 2:
        lacking = ", ".join(missing) or "at least two LoRAs (lora_0_..., lora_1_...)"
        raise LowraError(
            f"{where} is not in the LoWRA-Bench schema: it lacks {lacking}. Expected layer_model, layer_name, "
            "pre_ft_name, pre_ft_weight and lora_{i}_name, _rank, _alpha, _A_weight, _B_weight."
        )
    return tuple(sorted(found))


# ---- Finding the files ------------------------------------------------------------------------------------------


def open_dataset(path: Path, config: str | None = None, split: str = "train") -> StoredTable:
    """Open a folder of parquet files, one parquet file, or a `datasets.save_to_disk` folder.

    config: which of several configurations to take where `path` is a copy of a whole data set repository, a folder
    each. split: which to take where the files' names tell splits apart.
    Raises LowraError when nothing readable is there, when it is not clear which files belong together, or when the
    schema does not fit.
    """
    path = Path(path)
    reopen = (open_dataset, (path.absolute(), config, split))
    try:
        present = path.exists()
    except OSError as error:  # a name longer than the file system allows
        raise LowraError(f"{str(path)[:60]!r}... cannot be a folder ({error.strerror}).") from None
    if not present:
        raise LowraError(f"{path} does not exist; expected a folder of parquet files or a save_to_disk folder.")
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        require("Reading a save_to_disk folder", "datasets")
        from datasets import DatasetDict, load_from_disk

        try:
            dataset = load_from_disk(str(path))
        except Exception as error:
            raise LowraError(f"{path} is not a readable save_to_disk folder ({error}).") from None
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise LowraError(f"{path} has splits {', '.join(sorted(dataset))}; expected a split {split!r}.")
            dataset = dataset[split]
        return StoredTable(_ArrowRows(dataset), str(path), reopen)
    files = parquet_files(path, config, split) if path.is_dir() else [path]
    return StoredTable(_ParquetRows(files), str(path), reopen)


_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SHARD = re.compile(r"^(?P<name>.+?)-(?P<number>\d+)-of-(?P<total>\d+)$")


def parquet_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """The parquet files of one table below a folder, in the order of their names.

    Hidden files and folders (a leading dot or underscore) are left out. Raises LowraError, naming what was found, where
    they are of several configurations (folders) and `config` is none of them, of other splits than `split`, or where
    shards of the set are missing.
    """
    found = [
        path
        for path in sorted(folder.rglob("*.parquet"))
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise LowraError(f"{folder} holds no .parquet file; expected the LoWRA-Bench files or a save_to_disk folder.")
    homes = {path: path.parent.relative_to(folder) for path in found}
    if len(set(homes.values())) > 1:
        found = [path for path in found if config in homes[path].parts]
        if len({homes[path] for path in found}) != 1:
            listed = ", ".join(sorted({home.as_posix() for home in homes.values()}))
            wanted = f"; {config!r} is not one of them" if config is not None else ""
            raise LowraError(
                f"{folder} holds parquet files in several folders ({listed}){wanted}. They are no single data set: "
                "give source.path=FOLDER with one of them."
            )
    splits = {path: _split(path) for path in found}
    if any(splits.values()):
        listed = ", ".join(sorted({name or "files that name none" for name in splits.values()}))
        if split not in splits.values():
            raise LowraError(f"{folder} holds the splits {listed}, and not {split!r}; source.split=... chooses one.")
        if None in splits.values():
            raise LowraError(f"{folder} mixes splits: {listed}. Keep the files of one data set alone in a folder.")
        found = [path for path in found if splits[path] == split]
    sets: dict[tuple[str, int], set[int]] = {}
    for path in found:
        if match := _SHARD.match(path.stem):
            sets.setdefault((match["name"], int(match["total"])), set()).add(int(match["number"]))
    for (name, total), numbers in sets.items():
        if len(sets) > 1 or numbers != set(range(total)):
            raise LowraError(
                f"{folder} holds {len(numbers)} of {total} shards {name}-...-of-{total:05d}.parquet and {len(found)} "
                "files in all; expected one whole set. Fetch or copy it again."
            )
    return found


def _split(path: Path) -> str | None:
    """The split that a file's name tells, None where it tells none."""
    match = _SHARD.match(path.stem)
    name = match["name"] if match else path.stem
    return name if name in _SPLITS else None


def open_hub(repo: str, config: str, split: str = "train") -> StoredTable:
    """Fetch one configuration of a LoWRA-Bench data set from the Hugging Face Hub (memory-mapped after that).

    Raises LowraError naming the alternatives when the Hub cannot be reached.
    """
    require("Fetching from the Hub", "datasets")
    from datasets import load_dataset

    try:
        dataset = load_dataset(repo, config, split=split)
    except Exception as error:  # many kinds, all meaning that it cannot be had: offline, missing, refused
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(
            f"Cannot get {repo} ({config}) from the Hugging Face Hub: {first} "
            "Use source=mini (built here, offline) or source.path=FOLDER with a local copy."
        ) from None
    return StoredTable(_ArrowRows(dataset), f"{repo} ({config})", (open_hub, (repo, config, split)))
