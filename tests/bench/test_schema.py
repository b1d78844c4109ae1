from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import KINDS_PLANTED, planted_kinds, planted_layers, planted_update

from lowra.bench.schema import Layer, StoredTable, open_dataset, open_hub, to_tensor, write_dataset
from lowra.bench.updates import Update
from lowra.errors import LowraError


def rows(layers: list[Layer], cell: Callable[[torch.Tensor], object]) -> dict[str, list[object]]:
    """The schema's columns as Python lists, made without the project's writer."""
    columns: dict[str, list[object]] = {
        "layer_model": [x.model for x in layers],
        "layer_name": [x.name for x in layers],
        "pre_ft_name": [x.pre_ft_name for x in layers],
        "pre_ft_weight": [cell(x.weight) for x in layers],
    }
    for i in range(len(layers[0].loras)):
        columns[f"lora_{i}_name"] = [x.loras[i].name for x in layers]
        columns[f"lora_{i}_rank"] = [x.loras[i].rank for x in layers]
        columns[f"lora_{i}_alpha"] = [x.loras[i].alpha for x in layers]
        columns[f"lora_{i}_A_weight"] = [cell(x.loras[i].A) for x in layers]
        columns[f"lora_{i}_B_weight"] = [cell(x.loras[i].B) for x in layers]
    return columns


def assert_same(found: Layer, planted: Layer) -> None:
    assert (found.model, found.name, found.pre_ft_name) == (planted.model, planted.name, planted.pre_ft_name)
    assert torch.equal(found.weight, planted.weight)
    for a, b in zip(found.loras, planted.loras, strict=True):
        assert (a.name, a.rank, a.alpha) == (b.name, b.rank, b.alpha)
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    planted = list(planted_layers(ranks=(2, 3)))
    table = open_dataset(write_dataset(planted, tmp_path / "data"))
    assert len(table) == 3
    assert table.model_names == tuple(f"task_{i}" for i in range(6))
    assert table.infos[1].ranks == (2, 3, 2, 3, 2, 3)
    assert (table.infos[1].d, table.infos[1].k) == (40, 24)
    for i, layer in enumerate(planted):
        assert_same(table.read(i), layer)
    some = table.read(2, [4, 1])
    assert [lora.name for lora in some.loras] == ["task_4", "task_1"]


def test_plain_subsets_are_written_byte_for_byte_as_before_there_were_kinds(tmp_path: Path) -> None:
    planted = list(planted_layers(layers=2, models=2))
    (path,) = write_dataset(planted, tmp_path / "data").glob("*.parquet")
    matrix = pa.list_(pa.list_(pa.float32()))
    columns = rows(planted, lambda t: t.tolist())
    kinds = {key: matrix if key.endswith("weight") else pa.int64() for key in columns}
    kinds |= {key: pa.string() for key in columns if key.endswith(("name", "model"))}
    kinds |= {key: pa.float64() for key in columns if key.endswith("alpha")}
    table = pa.table(columns, schema=pa.schema(kinds))
    with pq.ParquetWriter(tmp_path / "b.parquet", pa.schema(kinds), compression="none", use_dictionary=False) as file:
        for i in range(len(table)):
            file.write_table(table.slice(i, 1).combine_chunks(), row_group_size=1)
    assert path.read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize("kind", ["one_group", "save_to_disk", "fixed", "large"])
def test_other_writers_files_are_read(kind: str, tmp_path: Path) -> None:
    planted = list(planted_layers())
    columns = rows(planted, lambda t: t.tolist())
    path = tmp_path / "data"
    if kind == "save_to_disk":
        datasets.Dataset.from_dict(columns).save_to_disk(path)
    else:
        table = pa.table(columns)
        if kind != "one_group":
            fields = []
            for field in table.schema:
                if field.name.endswith("weight"):
                    shape = np.array(columns[field.name][0]).shape
                    kinds = {
                        "fixed": pa.list_(pa.list_(pa.float32(), shape[1]), shape[0]),
                        "large": pa.large_list(pa.large_list(pa.float32())),
                    }
                    field = field.with_type(kinds[kind])
                fields.append(field)
            table = table.cast(pa.schema(fields))
        path.mkdir()
        pq.write_table(table, path / "train.parquet")  # all layers in one row group
    found = open_dataset(path)
    for i in (0, 1, 2, 1):  # going back reopens the row group
        assert_same(found.read(i), planted[i])


def test_half_precision_is_read_into_float32(tmp_path: Path) -> None:
    planted = list(planted_layers(layers=1))
    table = open_dataset(write_dataset(planted, tmp_path / "data", dtype="float16"))
    layer = table.read(0)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, planted[0].weight.half().float())


def test_convolutions_of_one_by_one_are_matrices() -> None:
    cell = pa.array([[[[[1.0]], [[2.0]], [[3.0]]], [[[4.0]], [[5.0]], [[6.0]]]]])
    assert torch.equal(to_tensor(cell, "x"), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))


def test_ragged_and_missing_cells_are_refused() -> None:
    with pytest.raises(LowraError, match="x is ragged: rows of 1 to 2 numbers"):
        to_tensor(pa.array([[[1.0], [2.0, 3.0]]]), "x")
    with pytest.raises(LowraError, match="x has missing values"):
        to_tensor(pa.array([None], pa.list_(pa.list_(pa.float32()))), "x")
    with pytest.raises(LowraError, match="x holds string values"):
        to_tensor(pa.array([["a"]]), "x")


def test_a_read_tensor_can_be_changed_without_touching_the_file(dataset: Path) -> None:
    table = open_dataset(dataset)
    table.read(0).weight.zero_()
    assert table.read(0).weight.abs().sum() > 0


def test_fingerprint_follows_the_numbers(tmp_path: Path) -> None:
    def digest(seed: int, name: str) -> str:
        return open_dataset(write_dataset(planted_layers(seed=seed), tmp_path / name)).fingerprint()

    assert digest(0, "a") == digest(0, "b")
    assert digest(0, "a") != digest(1, "c")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def broken() -> object:
        yield next(planted_layers())
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_dataset(broken(), tmp_path / "data")  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()
    with pytest.raises(LowraError, match="no layers to write"):
        write_dataset([], tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_missing_or_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="does not exist; expected a folder of parquet files"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowraError, match=r"holds no \.parquet file"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "empty" / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(LowraError, match="not a readable parquet file"):
        open_dataset(tmp_path / "empty")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    columns = rows(list(planted_layers()), lambda t: t.tolist())
    del columns["lora_3_alpha"]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "d" / "x.parquet")
    with pytest.raises(LowraError, match="it lacks lora_3_alpha"):
        open_dataset(tmp_path / "d")


def test_factors_that_do_not_fit(tmp_path: Path) -> None:
    (layer,) = planted_layers(layers=1)
    bad = Update("task_1", 2, 2.0, torch.zeros(2, 23), layer.loras[1].B)
    loras = (layer.loras[0], bad, *layer.loras[2:])
    table = open_dataset(write_dataset([Layer("", layer.name, "base", layer.weight, loras)], tmp_path / "d"))
    with pytest.raises(LowraError, match=r"LoRA 1 of layer .* does not fit .*A is \(2, 23\)"):
        table.fingerprint()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    (layer,) = planted_layers(layers=1)
    layer.loras[2].B[0, 0] = value
    table = open_dataset(write_dataset([layer], tmp_path / "d"))
    with pytest.raises(LowraError, match=r"B of task_2 of layer .* contains NaN or infinity"):
        table.fingerprint()


def test_rank_above_the_layer(tmp_path: Path) -> None:
    write_dataset(planted_layers(layers=1, d=6, k=5, ranks=(7,)), tmp_path / "d")
    with pytest.raises(LowraError, match="is 6 x 5 and cannot hold a LoRA of rank 7"):
        open_dataset(tmp_path / "d")


# ---- Other kinds of updates -------------------------------------------------------------------------------------


def test_every_kind_is_written_and_read_back(tmp_path: Path) -> None:
    planted = list(planted_kinds())
    folder = write_dataset(planted, tmp_path / "data")
    table = open_dataset(folder)
    assert table.infos[0].ranks == tuple(update.limit(40, 24) for update in planted[0].loras)
    assert (table.infos[0].d, table.infos[0].k) == (40, 24)
    chosen = [5, 2, 10]
    for i, layer in enumerate(planted):
        for found, made in zip(table.read(i).loras, layer.loras, strict=True):
            assert found.kind == ("lora" if made.kind == "rslora" else made.kind)
            assert found.name == made.name
            assert found.tensors.keys() == made.tensors.keys()
            assert all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())
            assert torch.equal(found.apply(layer.weight), made.apply(layer.weight))
        assert [update.name for update in table.read(i, chosen).loras] == [f"m{m}" for m in chosen]
    columns = pq.read_table(folder).to_pylist()[0]
    assert columns["lora_0_A_weight"] is not None
    assert "lora_0_kind" not in columns
    lokr = KINDS_PLANTED.index("lokr")
    assert (columns[f"lora_{lokr}_A_weight"], columns[f"lora_{lokr}_B_weight"]) == (None, None)
    assert (columns[f"lora_{lokr}_kind"], columns[f"lora_{lokr}_rank"]) == ("lokr", 8)


def without_factors(tmp_path: Path) -> Path:
    return write_dataset(planted_kinds(("ia3", "oft", "full")), tmp_path / "data")


def test_layers_without_any_factors_have_the_shape_of_their_weight(tmp_path: Path) -> None:
    table = open_dataset(without_factors(tmp_path))
    assert (table.infos[1].d, table.infos[1].k, table.infos[1].ranks) == (40, 24, (24, 24, 24))
    assert len(table.fingerprint()) == 16


def test_layers_of_one_model_may_differ_in_kind(tmp_path: Path) -> None:
    weight = torch.ones(40, 24)
    kinds = ("lora", "lokr", "oft outputs", "lora")
    layers = [
        Layer("", str(i), "", weight, (planted_update(kind, name="a"), planted_update("lora", name="b")))
        for i, kind in enumerate(kinds)
    ]
    folder = write_dataset(layers, tmp_path / "data")
    assert [path.name for path in folder.iterdir()] == ["train-00000-of-00001.parquet"]
    table = open_dataset(folder)
    for i, layer in enumerate(layers):
        found = table.read(i).loras[0]
        assert found.kind == kinds[i].split()[0]
        assert torch.equal(found.apply(weight), layer.loras[0].apply(weight))


@pytest.mark.parametrize("kind", [kind for kind in KINDS_PLANTED if kind not in ("lora", "rslora")])
def test_the_fingerprint_follows_every_tensor(kind: str, tmp_path: Path) -> None:
    def digest(layer: Layer) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_dataset(write_dataset([layer], folder)).fingerprint()

    (layer,) = planted_kinds((kind, "lora"), layers=1)
    seen = {digest(layer)}
    for tensor in layer.loras[0].tensors.values():
        tensor[0, 0] += 1e-3
        seen.add(digest(layer))
    assert len(seen) == 1 + len(layer.loras[0].tensors)
    next(iter(layer.loras[0].tensors.values()))[0, 0] = float("nan")
    with pytest.raises(LowraError, match=r"of m0 of layer .* contains NaN or infinity"):
        digest(layer)


def test_a_merge_that_is_not_finite(tmp_path: Path) -> None:
    (layer,) = planted_kinds(("dora", "lora"), layers=1)
    layer.weight[3] = 0
    layer.loras[0].B[3] = 0
    with pytest.raises(LowraError, match=r"The DoRA merge of m0 of layer .* is not finite"):
        open_dataset(write_dataset([layer], tmp_path / "data")).fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_0_kind": ["boft"] * 2}, r"Unknown kind of update 'boft'; known: dora, .*It is lora_0_kind of layer"),
        ({"lora_0_kind": [3] * 2}, r"Unknown kind of update 3; known"),
        ({"lora_0_magnitude": None}, r"Layer .* in .*: The DoRA update 'm0' holds no tensors .*magnitude \(d, 1\)"),
        ({"lora_0_magnitude": [None] * 2}, r"The DoRA update 'm0' holds no tensors"),
        ({"lora_0_magnitude": [[[1.0]] * 7] * 2}, r"updates a 40 x 24 weight with magnitude \(7, 1\), where DoRA has"),
        ({"lora_1_w1": [[[1.0, 2.0]] * 3] * 2}, r"with w1 \(3, 2\), w2 \(10, 12\), where LoKr has .* with p q = d"),
    ],
)
def test_columns_of_kinds_that_do_not_fit(
    changes: dict[str, list[object] | None], message: str, tmp_path: Path
) -> None:
    columns = pq.read_table(write_dataset(planted_kinds(("dora", "lokr")), tmp_path / "data")).to_pydict()
    columns = {key: value for key, value in (columns | changes).items() if value is not None}
    with pytest.raises(LowraError, match=message):
        open_dataset(write_rows(columns, tmp_path / "d" / "x.parquet")).fingerprint()


# ---- Numbers that are none: refused on opening ------------------------------------------------------------------


def write_rows(columns: dict[str, list[object]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path.parent


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("rank", ["2", "2", "2"], r"lora_1_rank of layer .* is '2'; expected a whole number"),
        ("rank", [2, None, 2], "lora_1_rank of layer .*layers.1.* is missing; expected a whole number"),
        ("rank", [[2], [2], [2]], r"lora_1_rank of layer .* is \[2\]"),
        ("rank", [2, 2, 0], "lora_1_rank of layer .*layers.2.* is 0"),
        ("alpha", ["4", "4", "4"], "lora_1_alpha of layer .* is '4'; expected a finite number"),
        ("alpha", [4.0, None, 4.0], "lora_1_alpha of layer .*layers.1.* is missing"),
        ("alpha", [[4.0], [4.0], [4.0]], r"lora_1_alpha of layer .* is \[4.0\]"),
        ("alpha", [4.0, float("nan"), 4.0], "lora_1_alpha .* is nan"),
        ("alpha", [4.0, float("inf"), 4.0], "lora_1_alpha .* is inf"),
        ("alpha", [4.0, 4.0, 1e300], r"lora_1_alpha .* is 1e\+300"),
        ("name", ["task_1", None, "task_1"], "lora_1_name in .* is None in some row"),
    ],
)
def test_ranks_alphas_and_names_are_checked_on_opening(
    column: str, values: list[object], message: str, tmp_path: Path
) -> None:
    columns = rows(list(planted_layers()), lambda t: t.tolist())
    folder = write_rows(columns | {f"lora_1_{column}": values}, tmp_path / "d" / "x.parquet")
    with pytest.raises(LowraError, match=message):
        open_dataset(folder)


def test_an_update_that_float32_cannot_hold(tmp_path: Path) -> None:
    columns = rows(list(planted_layers()), lambda t: t.tolist())
    columns["lora_1_A_weight"][1] = (1e4 * planted(1).loras[1].A).tolist()
    folder = write_rows(columns | {"lora_1_alpha": [4.0, 1e38, 4.0]}, tmp_path / "d" / "x.parquet")
    with pytest.raises(LowraError, match=r"update of task_1 of layer .* is too large for float32: alpha is 1e\+38"):
        open_dataset(folder).fingerprint()


def planted(index: int) -> Layer:
    return list(planted_layers())[index]


def test_columns_with_leading_zeros(tmp_path: Path) -> None:
    columns = rows(list(planted_layers()), lambda t: t.tolist())
    named = {key.replace("lora_1_", "lora_007_"): value for key, value in columns.items()}
    with pytest.raises(LowraError, match="has a column 'lora_007_name'; LoRAs are numbered without leading zeros"):
        open_dataset(write_rows(named, tmp_path / "d" / "x.parquet"))


def test_names_swapped_between_rows(tmp_path: Path) -> None:
    columns = rows(list(planted_layers()), lambda t: t.tolist())
    for i, name in ((0, "task_1"), (1, "task_0")):
        columns[f"lora_{i}_name"][2] = name
    with pytest.raises(LowraError, match=r"lora_0_name of layer .*layers\.2.* is 'task_1', and 'task_0' in the first"):
        open_dataset(write_rows(columns, tmp_path / "d" / "x.parquet"))


# ---- Which files belong together --------------------------------------------------------------------------------


@pytest.fixture
def parts() -> list[pa.Table]:
    """Two parquet tables of one data set, three layers each."""
    tables = []
    for half in (0, 1):
        columns = rows(list(planted_layers(layers=6))[3 * half : 3 * half + 3], lambda t: t.tolist())
        tables.append(pa.table(columns))
    return tables


def lay_out(parts: list[pa.Table], folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(parts[i % 2], folder / name)
    return folder


def test_shards_are_one_table(parts: list[pa.Table], tmp_path: Path) -> None:
    lay_out(parts, tmp_path, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    assert len(open_dataset(tmp_path)) == 6


def test_another_split_is_left_out(parts: list[pa.Table], tmp_path: Path) -> None:
    lay_out(parts, tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    assert [info.name[13] for info in open_dataset(tmp_path).infos] == ["0", "1", "2"]
    assert [info.name[13] for info in open_dataset(tmp_path, split="test").infos] == ["3", "4", "5"]
    with pytest.raises(LowraError, match="holds the splits test, train, and not 'dev'; source"):
        open_dataset(tmp_path, split="dev")


def test_hidden_files_are_left_out(parts: list[pa.Table], tmp_path: Path) -> None:
    lay_out(parts, tmp_path, "a.parquet", ".ipynb_checkpoints/b.parquet", "_old/b.parquet", ".b.parquet")
    (tmp_path / ".b.parquet").write_bytes(b"")
    assert len(open_dataset(tmp_path)) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("vit/a.parquet", "sd/b.parquet"), r"in several folders \(sd, vit\).*give source.path=FOLDER"),
        (("train.parquet", "extra.parquet"), "mixes splits: files that name none, train"),
        (("train-00000-of-00003.parquet", "train-00001-of-00003.parquet"), "holds 2 of 3 shards train-"),
        (("train-00000-of-00001.parquet", "train-00000-of-00002.parquet"), "expected one whole set"),
    ],
)
def test_files_that_do_not_belong_together(
    names: tuple[str, ...], message: str, parts: list[pa.Table], tmp_path: Path
) -> None:
    with pytest.raises(LowraError, match=message):
        open_dataset(lay_out(parts, tmp_path, *names))


def test_a_copy_of_the_whole_repository_is_read_by_its_configuration(parts: list[pa.Table], tmp_path: Path) -> None:
    lay_out(parts, tmp_path, "vit/train-00000-of-00001.parquet", "sd/train-00000-of-00001.parquet")
    assert open_dataset(tmp_path, "vit").infos[0].name[13] == "0"
    assert open_dataset(tmp_path, "sd").infos[0].name[13] == "3"
    with pytest.raises(LowraError, match="'mistral' is not one of them"):
        open_dataset(tmp_path, "mistral")


# ---- Other processes, other starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_another_process_opens_the_table_again(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        write_dataset(planted_layers(), tmp_path / "d")
    else:
        datasets.Dataset.from_dict(rows(list(planted_layers()), lambda t: t.tolist())).save_to_disk(tmp_path / "d")
    table = open_dataset(tmp_path / "d")
    table.read(1)
    again = pickle.loads(pickle.dumps(table))
    assert again.infos == table.infos
    assert_same(again.read(2, [1, 3]), table.read(2, [1, 3]))
    assert again.fingerprint() == table.fingerprint()


def test_an_unchanged_data_set_is_scanned_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.digests._RACY_S", -1.0)  # files of a test are all young
    first = open_dataset(dataset).fingerprint()
    reads: list[int] = []
    read = StoredTable.read
    monkeypatch.setattr(StoredTable, "read", lambda self, *where: reads.append(1) or read(self, *where))
    assert open_dataset(dataset).fingerprint() == first
    assert not reads
    write_dataset(planted_layers(seed=1), dataset)
    assert open_dataset(dataset).fingerprint() != first
    assert len(reads) == 3


def test_a_file_broken_inside_is_named(dataset: Path) -> None:
    (path,) = dataset.glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(LowraError, match=r"parquet is not a readable parquet file"):
        open_dataset(dataset).fingerprint()


def test_a_path_longer_than_any_file_system_takes() -> None:
    with pytest.raises(LowraError, match=r"cannot be a folder|does not exist"):
        open_dataset(Path("/tmp/" + "x" * 5000))


def test_a_hub_data_set_is_read_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layout of the published data set: a folder per configuration, named in the card's header.
    planted = list(planted_layers())
    write_dataset(planted, tmp_path / "repo" / "vit")
    write_dataset(planted_layers(seed=1), tmp_path / "repo" / "other")
    header = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n" for c in ("vit", "other")
    )
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs:\n{header}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = open_hub(str(tmp_path / "repo"), "vit")
    assert len(table) == 3
    for i, layer in enumerate(planted):
        assert_same(table.read(i), layer)
    assert [lora.name for lora in table.read(1, [5, 0]).loras] == ["task_5", "task_0"]


def test_the_hub_out_of_reach_names_the_alternatives() -> None:
    with pytest.raises(LowraError, match=r"source=mini .*source\.path=FOLDER"):
        open_hub("Eliahu/LoWRA-Bench", "vit")
