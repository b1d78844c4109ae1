"""The LoWRA-Bench on-disk format: one row per layer, read lazily from Arrow buffers into tensors.

Columns: `layer_model` (component: "", "unet", "text_encoder"), `layer_name` (the checkpoint's key), `pre_ft_name`,
`pre_ft_weight` (d, k), and for each LoRA i `lora_{i}_name`, `lora_{i}_rank`, `lora_{i}_alpha`, `lora_{i}_A_weight`
(r, k), `lora_{i}_B_weight` (d, r). This is the schema of the public data set `Eliahu/LoWRA-Bench`; builders write it,
the benchmark reads it. The number of LoRAs is whatever the columns hold, and ranks may differ between LoRAs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
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

from lowra.errors import LowraError

_LAYER_COLUMNS = ("layer_model", "layer_name", "pre_ft_name", "pre_ft_weight")
_LORA_COLUMNS = ("name", "rank", "alpha", "A_weight", "B_weight")
_LORA_COLUMN = re.compile(r"^lora_(\d+)_(name|rank|alpha|A_weight|B_weight)$")


@dataclass(frozen=True)
class Lora:
    """One LoRA update of one layer: M = (alpha / rank) B A.

    A: (r, k) float32. B: (d, r) float32.
    """

    name: str
    rank: int
    alpha: float
    A: Tensor
    B: Tensor

    @property
    def scale(self) -> float:
        """The factor alpha / r on B A."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The update M (d, k), computed in float32 as the paper does."""
        return (self.B @ self.A).mul_(self.scale)  # (d, k)


@dataclass(frozen=True)
class Layer:
    """One row: the pre-fine-tuning weight of a layer and the LoRA updates that were read with it.

    model: the component ("" for single-component models). name: the checkpoint's key. weight: (d, k) float32.
    """

    model: str
    name: str
    pre_ft_name: str
    weight: Tensor
    loras: tuple[Lora, ...]


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
    """A readable subset: rows are layers, whatever they are stored in."""

    infos: tuple[LayerInfo, ...]
    model_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Read one layer with the LoRAs asked for (all by default), and no other."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when any weight does."""
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


# ---- Writing ----------------------------------------------------------------------------------------------------


def write_dataset(layers: Iterable[Layer], folder: Path, *, dtype: str = "float32") -> Path:
    """Write layers as one parquet file in `folder`, a row group per layer, streaming.

    The folder appears only once it is complete: rows go to a temporary name that is renamed at the end.
    dtype: "float32" or "float16", the stored precision. Returns `folder`.
    """
    value_type = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer: pq.ParquetWriter | None = None
    names: tuple[str, ...] | None = None
    try:
        for layer in layers:
            here = tuple(lora.name for lora in layer.loras)
            if names is not None and here != names:
                raise LowraError(f"Layer {layer.name!r} has LoRAs {here}; the layers before it have {names}.")
            names = here
            columns: dict[str, Any] = {
                "layer_model": pa.array([layer.model], pa.string()),
                "layer_name": pa.array([layer.name], pa.string()),
                "pre_ft_name": pa.array([layer.pre_ft_name], pa.string()),
                "pre_ft_weight": _list_array(layer.weight, value_type),
            }
            for i, lora in enumerate(layer.loras):
                columns[f"lora_{i}_name"] = pa.array([lora.name], pa.string())
                columns[f"lora_{i}_rank"] = pa.array([lora.rank], pa.int64())
                columns[f"lora_{i}_alpha"] = pa.array([lora.alpha], pa.float64())
                columns[f"lora_{i}_A_weight"] = _list_array(lora.A, value_type)
                columns[f"lora_{i}_B_weight"] = _list_array(lora.B, value_type)
            row = pa.table(columns)
            if writer is None:
                # Weights do not compress and dictionaries of distinct floats only cost time.
                path = partial / "train-00000-of-00001.parquet"
                writer = pq.ParquetWriter(path, row.schema, compression="none", use_dictionary=False)
            writer.write_table(row, row_group_size=1)
    finally:
        if writer is not None:
            writer.close()
    if names is None:
        shutil.rmtree(partial, ignore_errors=True)
        raise LowraError("There are no layers to write; a subset needs at least one.")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


# ---- Reading ----------------------------------------------------------------------------------------------------


class _ParquetRows:
    """Rows of parquet files in name order; only the asked-for columns of the asked-for row are decoded."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.places: list[tuple[pq.ParquetFile, int, int]] = []  # (file, row group, row in it)
        self.columns: tuple[str, ...] = ()
        self._open: tuple[pq.ParquetFile, int, tuple[str, ...], int, Iterator[pa.RecordBatch]] | None = None
        for path in paths:
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except (pa.ArrowException, OSError) as error:
                raise LowraError(f"{path} is not a readable parquet file ({error}); fetch or build it again.") from None
            columns = tuple(file.schema_arrow.names)
            if self.columns and columns != self.columns:
                raise LowraError(f"{path} has other columns than the files before it; all shards must agree.")
            self.columns = columns
            for group in range(file.num_row_groups):
                self.places += [(file, group, row) for row in range(file.metadata.row_group(group).num_rows)]

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int, columns: Sequence[str]) -> pa.Table:
        file, group, row = self.places[index]
        wanted = tuple(columns)
        if file.metadata.row_group(group).num_rows == 1:
            return file.read_row_group(group, columns=list(wanted))
        # Row groups of many layers (the published shards) are walked a row at a time; walking on from where the last
        # read stopped makes a pass over all layers decode each of them once.
        at = self._open
        if at is None or at[:3] != (file, group, wanted) or at[3] > row:
            at = (file, group, wanted, 0, file.iter_batches(1, row_groups=[group], columns=list(wanted)))
        batches = at[4]
        for _ in range(row - at[3]):
            next(batches)
        batch = next(batches)
        self._open = (file, group, wanted, row + 1, batches)
        return pa.Table.from_batches([batch])


class _ArrowRows:
    """Rows of a memory-mapped `datasets.Dataset` (a `save_to_disk` folder, or one fetched from the Hub)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")
        self.columns = tuple(dataset.column_names)
        self._views: dict[tuple[str, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int, columns: Sequence[str]) -> pa.Table:
        wanted = tuple(columns)
        if wanted not in self._views:
            self._views[wanted] = self.dataset.select_columns(list(wanted))
        return self._views[wanted][index : index + 1]


class StoredTable:
    """A subset in the LoWRA-Bench schema, opened lazily.

    Opening reads names, ranks and the factors' shapes; weights are read layer by layer by `read`.
    """

    def __init__(self, rows: _ParquetRows | _ArrowRows, where: str) -> None:
        self._rows = rows
        self._where = where
        self._loras = _lora_indices(rows.columns, where)
        if not len(rows):
            raise LowraError(f"{where} has no rows; expected one row per layer.")
        self.infos = tuple(self._info(i) for i in range(len(rows)))
        names = [f"lora_{i}_name" for i in self._loras]
        first = self._rows.row(0, names)
        self.model_names = tuple(str(first.column(name)[0].as_py()) for name in names)
        labels = [info.label for info in self.infos]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise LowraError(f"{where} holds layer {repeated[0]!r} more than once; one row per layer is expected.")

    def __len__(self) -> int:
        return len(self.infos)

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

    def _info(self, index: int) -> LayerInfo:
        ranks = [f"lora_{i}_rank" for i in self._loras]
        names = ["layer_model", "layer_name", "pre_ft_name", *ranks]
        a, b = (f"lora_{self._loras[0]}_{part}" for part in ("A_weight", "B_weight"))
        row = self._rows.row(index, [*names, a, b])  # small columns: the first LoRA's factors give the shape
        cells = {name: row.column(name)[0].as_py() for name in names}
        name = str(cells["layer_name"])
        d, k = self._tensor(row, b, name).shape[0], self._tensor(row, a, name).shape[1]
        model = str(cells["layer_model"] or "")
        return LayerInfo(model, name, str(cells["pre_ft_name"]), d, k, tuple(int(cells[rank]) for rank in ranks))

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Read one layer with the LoRAs asked for (positions in `model_names`; all by default).

        Raises LowraError when a factor's shape does not fit the weight or its stated rank.
        """
        info = self.infos[index]
        wanted = [self._loras[m] for m in (range(len(self._loras)) if models is None else models)]
        columns = [f"lora_{i}_{part}" for i in wanted for part in _LORA_COLUMNS]
        row = self._rows.row(index, ["pre_ft_weight", *columns])
        weight = self._tensor(row, "pre_ft_weight", info.label)
        loras = []
        for i in wanted:
            a = self._tensor(row, f"lora_{i}_A_weight", info.label)
            b = self._tensor(row, f"lora_{i}_B_weight", info.label)
            rank = int(row.column(f"lora_{i}_rank")[0].as_py())
            d, k = weight.shape
            if a.shape != (rank, k) or b.shape != (d, rank):
                raise LowraError(
                    f"LoRA {i} of layer {info.label!r} does not fit in {self._where}: A is {tuple(a.shape)} and B "
                    f"{tuple(b.shape)}, but the weight is {(d, k)} and the rank {rank}, so A must be {(rank, k)} and "
                    f"B {(d, rank)}."
                )
            alpha = row.column(f"lora_{i}_alpha")[0].as_py()
            name = str(row.column(f"lora_{i}_name")[0].as_py())
            loras.append(Lora(name, rank, float(rank if alpha is None else alpha), a, b))
        return Layer(info.model, info.name, info.pre_ft_name, weight, tuple(loras))

    def fingerprint(self) -> str:
        """Read every layer once, refuse NaN and infinity, and digest all that was read (see `scan`)."""
        return scan(self)


def scan(table: LayerTable) -> str:
    """One validating pass over all layers: shapes fit, numbers are finite, ranks are possible. Returns a digest.

    Raises LowraError, naming the layer, before any recovery has cost time.
    """
    digest = hashlib.sha256()
    for index, info in enumerate(tqdm(table.infos, desc="check data", unit="layer", delay=2, leave=False)):
        layer = table.read(index)
        if max(info.ranks) > min(info.d, info.k):
            raise LowraError(
                f"Layer {info.label!r} is {info.d} x {info.k} and cannot hold a LoRA of rank {max(info.ranks)}."
            )
        digest.update(f"{info.label}|{info.ranks}|{[lora.alpha for lora in layer.loras]}".encode())
        named = [("pre_ft_weight", layer.weight)]
        for lora in layer.loras:
            named += [(f"A of {lora.name}", lora.A), (f"B of {lora.name}", lora.B)]
        for what, tensor in named:
            if not torch.isfinite(tensor).all():
                raise LowraError(f"{what} of layer {info.label!r} contains NaN or infinity; mend or drop that model.")
            digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def _lora_indices(columns: Sequence[str], where: str) -> tuple[int, ...]:
    """The LoRA numbers in the columns; raises LowraError when a needed column is missing."""
    missing = [name for name in _LAYER_COLUMNS if name not in columns]
    found: dict[int, set[str]] = {}
    for column in columns:
        if match := _LORA_COLUMN.match(column):
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


def open_dataset(path: Path) -> StoredTable:
    """Open a folder of parquet files, one parquet file, or a `datasets.save_to_disk` folder.

    Raises LowraError when nothing readable is there or the schema does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise LowraError(f"{path} does not exist; expected a folder of parquet files or a save_to_disk folder.")
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        from datasets import DatasetDict, load_from_disk

        try:
            dataset = load_from_disk(str(path))
        except Exception as error:
            raise LowraError(f"{path} is not a readable save_to_disk folder ({error}).") from None
        if isinstance(dataset, DatasetDict):
            if "train" not in dataset:
                raise LowraError(f"{path} has splits {', '.join(sorted(dataset))}; expected a split 'train'.")
            dataset = dataset["train"]
        return StoredTable(_ArrowRows(dataset), str(path))
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise LowraError(f"{path} holds no .parquet file; expected the LoWRA-Bench files or a save_to_disk folder.")
    return StoredTable(_ParquetRows(files), str(path))


def open_hub(repo: str, config: str) -> StoredTable:
    """Fetch one configuration of a LoWRA-Bench data set from the Hugging Face Hub (memory-mapped after that).

    Raises LowraError naming the alternatives when the Hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(repo, config, split="train")
    except Exception as error:  # many kinds, all meaning that it cannot be had: offline, missing, refused
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(
            f"Cannot get {repo} ({config}) from the Hugging Face Hub: {first} "
            "Use source=mini (built here, offline) or source.path=FOLDER with a local copy."
        ) from None
    return StoredTable(_ArrowRows(dataset), f"{repo} ({config})")
