from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from planted_checkpoints import base_state, save, three, tuned

from lowra import recover_checkpoints
from lowra.checkpoints.writing import Slot, Workshop, check_space
from lowra.errors import LowraError

KILLS = int(os.environ.get("LOWRA_KILLS", "5"))


def work(models: list[Path], output: Path) -> None:
    torch.set_num_threads(1)
    recover_checkpoints(models, output, adapters=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_random_moments_the_same_bytes_at_the_end(tmp_path: Path) -> None:
    base = base_state()
    models = [save(tmp_path / f"m{i}", tuned(base, i, parts=("proj",)), shards=2) for i in range(3)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowra.recovery.session", "matplotlib.backends.backend_agg"])

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(models, output))
        process.start()
        return process

    journal = tmp_path / "out.partial" / ".journal.jsonl"

    def lines() -> int:
        return len(journal.read_bytes().splitlines()) if journal.exists() else 0

    start(tmp_path / "warm").join()
    start(tmp_path / "whole").join()
    expected = files(tmp_path / "whole")
    assert files(tmp_path / "warm") == expected
    out, rng, ended, kept = tmp_path / "out", random.Random(0), 0, set()
    for _ in range(KILLS):
        wanted = lines() + rng.randint(0, 4)  # so many tensors, and a moment into the next
        process = start(out)
        while process.is_alive() and lines() < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        if out.exists():  # it bears its name: it is complete
            assert {k: v for k, v in files(out).items() if k != ".journal.jsonl"} == expected
            start(out).join()
            assert files(out) == expected
            shutil.rmtree(out)
            ended += 1
        elif journal.exists():
            kept.add(lines())
    start(out).join()
    assert files(out) == expected
    assert not (tmp_path / "out.partial").exists()
    assert len(kept) > 1, (ended, kept)  # kills did fall into the work


@pytest.mark.parametrize("moment", ["fsync", "clean"])
def test_killed_while_it_ends_it_can_still_be_ended(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of adapters are needed until the folder has its name: before, a kill left what no command could end."""
    base = base_state()
    models = [save(tmp_path / f"m{i}", tuned(base, i)) / "model.safetensors" for i in range(3)]
    recover_checkpoints(models, tmp_path / "whole", adapters=True)
    made = sorted(path.name for path in (tmp_path / "whole" / "adapters").iterdir())
    assert made == ["model_0", "model_1", "model_2"]
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr("lowra.checkpoints.writing.os.fsync", kill)
        else:
            patch.setattr(Workshop, "_clean", kill)
        with pytest.raises(Killed):
            recover_checkpoints(models, out, adapters=True)
    assert (out if moment != "fsync" else tmp_path / "out.partial").is_dir()
    recover_checkpoints(models, out, adapters=True)
    expected, found = files(tmp_path / "whole"), files(out)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if name.endswith(".safetensors"))
    assert not (tmp_path / "out.partial").exists()


def test_adapters_of_models_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    base = base_state()
    models = [save(tmp_path / place, tuned(base, i)) for i, place in enumerate(("a/m", "b/m", "c/m_0"))]
    recover_checkpoints(models, tmp_path / "out", adapters=True)
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 3


def test_a_finished_tensor_that_changed_since_is_done_again(tmp_path: Path) -> None:
    models = three(tmp_path)
    recover_checkpoints(models, tmp_path / "whole")
    states = [path.read_bytes() for path in (tmp_path / "whole" / "model.safetensors",)]

    class Stop(Exception):
        pass

    lines: list[str] = []
    real = Workshop.done

    def stop(self: Workshop, item: str, record: dict[str, object]) -> None:
        real(self, item, record)
        lines.append(item)
        if len(lines) == 9:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workshop, "done", stop)
        with pytest.raises(Stop):
            recover_checkpoints(models, tmp_path / "out")
    partial = tmp_path / "out.partial" / "model.safetensors"
    assert len(partial.read_bytes()) == len(states[0])  # its full size from the start
    with open(partial, "r+b") as file:  # what a power cut may leave: a journal ahead of the data
        file.seek(-len(states[0]) // 2, os.SEEK_END)
        file.write(b"\0" * (len(states[0]) // 2))
    with open(tmp_path / "out.partial" / ".journal.jsonl", "a") as file:
        file.write('{"item": "torn')
    said: list[str] = []
    recover_checkpoints(models, tmp_path / "out", say=said.append)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert any("of 14 tensors are done" in line for line in said)


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    models = three(tmp_path)
    (tmp_path / "out.partial").mkdir()
    held = Workshop(tmp_path / "out", "a key")
    held.begin("a command")
    with pytest.raises(LowraError, match="Another process is writing"):
        recover_checkpoints(models, tmp_path / "out")


def test_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match=r"needs 931322574\.62 GiB and .* free; make room"):
        check_space(tmp_path / "not" / "there", 10**18)
    if Path("/dev/full").exists():
        with pytest.raises(LowraError, match=r"The disk is full .*What is finished is kept"):
            Slot(Path("/dev/full"), torch.float32, 0, 4).write(torch.ones(4))


def test_a_changed_input_is_another_command(tmp_path: Path) -> None:
    models = three(tmp_path)
    recover_checkpoints(models, tmp_path / "out")
    os.utime(models[0] / "model.safetensors", (1, 1))
    with pytest.raises(LowraError, match="is not empty"):
        recover_checkpoints(models, tmp_path / "out")
    key = json.loads((tmp_path / "out" / "recovery.json").read_text())["key"]
    assert len(key) == 16
