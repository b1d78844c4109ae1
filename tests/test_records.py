from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lowra.bench.draws import Draw
from lowra.records import Cell, Store, weights_digest


def cell(trial: int = 0, **settings: Any) -> Cell:
    return Cell(Draw("vit", trial, (0, 1, 2)), "mean_lora", settings)


def record(of: Cell, w_error: float = -5.0, fingerprint: str = "f", failed: int = 0) -> dict[str, Any]:
    where = {"n_loras": 3, "trial": of.draw.trial, "method": of.method, "merge_dtype": "float32", "knows_rank": True}
    return {
        "cell": of.digest,
        "fingerprint": fingerprint,
        "trial": where | {"w_error": w_error, "failed_layers": failed, "cell": of.digest},
        "layers": [where | {"w_error": w_error}],
    }


def test_a_digest_is_stable_and_tells_settings_apart() -> None:
    assert cell(seed=0).digest == cell(seed=0).digest
    assert len({cell(seed=0).digest, cell(seed=1).digest, cell().digest, cell(1, seed=0).digest}) == 4


@pytest.mark.parametrize("value", [-5.25, math.inf, -math.inf, math.nan])
def test_numbers_come_back(tmp_path: Path, value: float) -> None:
    store = Store(tmp_path)
    store.finish(cell(), record(cell(), value))
    found = store.load(cell())
    assert found is not None
    back = found["layers"][0]["w_error"]
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_failed_cells_are_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.finish(cell(), record(cell(), failed=1))
    assert store.load(cell()) is None


def test_a_line_cut_short_is_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.journal(cell()) == []
    store.append(cell(), {"layer": 0})
    store.append(cell(), {"layer": 1, "w_error": math.nan})
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_text(path.read_text() + '{"layer": 2, "w_er')
    assert [row["layer"] for row in store.journal(cell())] == [0, 1]
    store.append(cell(), {"layer": 2})
    assert [row["layer"] for row in store.journal(cell())] == [0, 1, 2]


def test_tables_hold_one_data_set_and_prefer_the_current_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new, other = cell(seed=0), cell(seed=1), cell(1, seed=0)
    store.finish(old, record(old, -1.0))
    store.finish(new, record(new, -2.0))
    store.finish(other, record(other, -3.0))
    stranger = cell(2)
    store.finish(stranger, record(stranger, -4.0, fingerprint="other data"))
    _, trials = store.tables("f", [old.digest])
    assert trials["w_error"].tolist() == [-1.0, -3.0]
    _, trials = store.tables("f", [])
    assert trials["w_error"].tolist() == [-2.0, -3.0]


def test_kept_weights_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    candidates = torch.randn(2, 4, 3)
    store.keep_weights(cell(), 7, candidates)
    assert store.has_weights(cell(), 7)
    assert not store.has_weights(cell(), 8)
    found = store.weights(cell(), 7)
    assert all(torch.equal(found[str(c)], candidates[c]) for c in (0, 1))
    store.finish(cell(), record(cell()))
    assert not store.has_weights(cell(), 7)


def test_equal_weights_have_one_digest() -> None:
    a = {("", "x"): torch.ones(2, 2), ("", "y"): torch.zeros(2, 2)}
    b = dict(reversed(list(a.items())))
    assert weights_digest(a) == weights_digest(b)
    assert weights_digest(a) != weights_digest({**a, ("", "y"): torch.full((2, 2), -0.0)})
