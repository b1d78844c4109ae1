"""A method of somebody else's, entered and checked: robust PCA by alternating projections is the worked example."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lowra.bench.schema import write_dataset
from lowra.code import code_digest
from lowra.errors import LowraError
from lowra.records import Store, read, write_records
from lowra.submission import submit, verify
from tests.conftest import planted_layers

METHOD = '''
"""Robust PCA by alternating projections: what is low-rank in each model is taken out, what is left is one weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowra.methods import Observation, Recovery
from my_projection import low_rank


@dataclass(frozen=True)
class AlternatingProjections:
    steps: int = 15
    pretty: ClassVar[str] = "Alternating projections"
    reference: ClassVar[str] = "Netrapalli et al. 2014, Non-convex Robust PCA"
    needs_rank: ClassVar[bool] = True

    def recover(self, observation: Observation) -> Recovery:
        stack = observation.merged.double()
        weight = stack.mean(0)
        for _ in range(self.steps):
            weight = (stack - low_rank(stack - weight, observation.rank)).mean(0)
        return Recovery(weight.float().unsqueeze(0))
'''
PROJECTION = """
import torch


def low_rank(stack, rank):
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Somebody's folder with a method of two files and its config, and a small data set."""
    monkeypatch.setattr("lowra.plan.cores", lambda: 1)  # layers this small only wait for a second thread
    mine = tmp_path / "mine"
    (mine / "conf" / "methods").mkdir(parents=True)
    (mine / "my_rpca.py").write_text(METHOD)
    (mine / "my_projection.py").write_text(PROJECTION)
    config = "# @package methods.rpca\n_target_: my_rpca.AlternatingProjections\nsteps: 15\n"
    (mine / "conf" / "methods" / "rpca.yaml").write_text(config)
    monkeypatch.syspath_prepend(str(mine))
    for name in ("my_rpca", "my_projection"):  # of another test's folder
        monkeypatch.delitem(sys.modules, name, raising=False)
    code_digest.cache_clear()
    data = write_dataset(planted_layers(layers=2, models=15), tmp_path / "data")
    where = [f"cache_dir={tmp_path / 'cache'}", "source=published", f"source.path={data}", "jobs=1"]
    return ["methods=rpca", f"hydra.searchpath=[file://{mine / 'conf'}]", *where]


@pytest.fixture
def entry(settings: list[str], tmp_path: Path) -> tuple[Path, list[str]]:
    folder = submit(settings, ["paper", "three"], ["vit"], tmp_path / "leaderboard" / "rpca")
    return folder, settings[2:]


def change(folder: Path, edit: Any) -> None:
    """Rewrite the records of an entry."""
    store = Store(folder)
    store.refresh()
    records = [dict(record) for record in store.all("layer")]
    write_records(edit(records), store.contexts, folder / "records" / "records.parquet")


def test_an_entry_is_whole_and_verified(entry: tuple[Path, list[str]]) -> None:
    folder, where = entry
    said = json.loads((folder / "entry.json").read_text())
    assert said["label"] == "Alternating projections"
    assert said["files"] == ["my_projection.py", "my_rpca.py"]
    assert [each["track"] for each in said["runs"]] == ["paper"]  # `three` withholds the rank, which it needs
    assert str(folder.parent.parent) not in (folder / "entry.json").read_text()  # nobody's folders
    assert len(read([folder]).layers) == 10 * 2
    assert "Alternating projections" in (folder / "table.md").read_text()
    for seed in range(3):
        assert "run again: W-Error" in verify(folder, where, seed)


def test_records_of_other_code_are_refused(entry: tuple[Path, list[str]]) -> None:
    folder, where = entry
    (folder / "code" / "my_projection.py").write_text(PROJECTION.replace("rank, :]", "rank, :] * 1.0"))
    with pytest.raises(LowraError, match="its code and options make"):
        verify(folder, where, 0)
    change(folder, lambda records: [records[0] | {"variant": "0" * 16}, *records[1:]])
    with pytest.raises(LowraError, match="was not made by this method's code and options"):
        verify(folder, where, 0)


def test_nan_and_failures_are_refused(entry: tuple[Path, list[str]]) -> None:
    folder, where = entry
    change(folder, lambda records: [records[0] | {"w_error": float("nan")}, *records[1:]])
    with pytest.raises(LowraError, match="failed or is not a number"):
        verify(folder, where, 0)


def test_a_missing_draw_is_refused(entry: tuple[Path, list[str]]) -> None:
    folder, where = entry
    change(folder, lambda records: [record for record in records if record["trial"] != 7])
    with pytest.raises(LowraError, match=r"2 records of track paper of vit are missing, the first of draw vit/L05/t07"):
        verify(folder, where, 0)


def test_other_data_are_refused(entry: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, where = entry
    other = write_dataset(planted_layers(layers=2, models=15, seed=1), tmp_path / "other")
    with pytest.raises(LowraError, match=r"are of data .*; here it is"):
        verify(folder, [*where, f"source.path={other}"], 0)


def test_better_numbers_than_come_out_again_are_refused(entry: tuple[Path, list[str]]) -> None:
    folder, where = entry
    change(folder, lambda records: [record | {"w_error": record["w_error"] - 3} for record in records])
    with pytest.raises(LowraError, match=r"Run again, .* has W-Error .*; the record says"):
        verify(folder, where, 0)


def test_a_folder_of_something_else_is_left_alone(settings: list[str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "entry.json").write_text("{}")
    (place / "thesis.txt").write_text("precious")
    with pytest.raises(LowraError, match="is no entry to the leaderboard"):
        submit(settings, ["paper"], ["vit"], place)
    assert {path.name for path in place.iterdir()} == {"entry.json", "thesis.txt"}


def test_an_entry_is_replaced_and_what_lies_beside_it_kept(entry: tuple[Path, list[str]], settings: list[str]) -> None:
    folder, _ = entry
    (folder / "notes.txt").write_text("mine")
    (folder / "code" / "old.py").write_text("")
    assert submit(settings, ["paper"], ["vit"], folder) == folder
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "code" / "old.py").exists()
    assert [run["track"] for run in json.loads((folder / "entry.json").read_text())["runs"]] == ["paper"]


def test_what_is_no_entry_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="is no entry to the leaderboard"):
        verify(tmp_path)
    (tmp_path / "entry.json").write_text("{}")
    with pytest.raises(LowraError, match="is no entry to the leaderboard"):
        verify(tmp_path)


def test_a_method_that_breaks_its_contract_is_not_run(settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine" / "my_rpca.py"
    file.write_text(METHOD.replace("weight = stack.mean(0)", "observation.merged.zero_(); weight = stack.mean(0)"))
    with pytest.raises(LowraError, match="does not keep the contract"):
        submit(settings, ["paper"], ["vit"], tmp_path / "entry")
    assert not (tmp_path / "entry").exists()


def test_one_method_at_a_time(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="methods has 2 entries"):
        submit([*settings, "methods=[rpca,mean_lora]"], ["paper"], ["vit"], tmp_path / "entry")
