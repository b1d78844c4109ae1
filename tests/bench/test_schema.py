from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import planted_layers

from lowra.bench.schema import Layer, Lora, open_dataset, open_hub, to_tensor, write_dataset
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
    bad = Lora("task_1", 2, 2.0, torch.zeros(2, 23), layer.loras[1].B)
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
    table = open_dataset(write_dataset(planted_layers(layers=1, d=6, k=5, ranks=(7,)), tmp_path / "d"))
    with pytest.raises(LowraError, match="is 6 x 5 and cannot hold a LoRA of rank 7"):
        table.fingerprint()


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
