from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowra.builders import stages
from lowra.builders.stages import MARKER, finished, stage
from lowra.errors import LowraError


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(partial: Path) -> dict[str, float]:
        calls.append(partial)
        (partial / "weights").write_text("w")
        return {"loss": 0.5}

    assert stage(tmp_path / "s", work) == {"loss": 0.5}
    assert stage(tmp_path / "s", work) == {"loss": 0.5}
    assert len(calls) == 1
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [MARKER, "weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_killed_stage_finds_what_it_left(tmp_path: Path) -> None:
    def killed(partial: Path) -> None:
        (partial / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "s", killed)
    assert not (tmp_path / "s").exists()
    assert stage(tmp_path / "s", lambda partial: {"found": (partial / "checkpoint").read_text()}) == {"found": "half"}


# ---- Several processes ------------------------------------------------------------------------------------------


def build_slowly(folder: Path, log: Path) -> None:
    def work(partial: Path) -> dict[str, int]:
        with log.open("a") as file:
            file.write("built\n")
        (partial / "half").write_text("1")
        time.sleep(0.4)
        (partial / "weights").write_text("2")
        return {"pid": os.getpid()}

    report = stage(folder, work)
    assert (folder / "weights").read_text() == "2"
    with log.open("a") as file:
        file.write(f"{report['pid']}\n")


def test_processes_at_one_stage_all_end_well(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=build_slowly, args=(tmp_path / "c" / "s", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = log.read_text().splitlines()
    assert lines.count("built") == 1  # the others waited, and took what it made
    assert len(set(lines)) == 2
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["s"]


def test_the_lock_of_a_killed_process_is_free_and_its_work_resumed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from lowra.builders.stages import stage
def work(partial):
    (partial / "checkpoint").write_text("half")
    print("working", flush=True)
    time.sleep(60)
stage(Path({str(tmp_path / "s")!r}), work)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stage(tmp_path / "s", lambda partial: {"found": (partial / "checkpoint").read_text()}) == {"found": "half"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(stages.fcntl, "flock", flock)
    places: list[Path] = []
    assert stage(tmp_path / "s", lambda partial: places.append(partial) or {"n": 1}) == {"n": 1}  # type: ignore[func-returns-value]
    assert str(os.getpid()) in places[0].name  # nobody else's

    def beaten(partial: Path) -> dict[str, int]:  # another process finishes first
        stage(tmp_path / "t", lambda other: {"n": 2})
        return {"n": 3}

    assert stage(tmp_path / "t", beaten) == {"n": 2}
    assert not list(tmp_path.glob("t.*-*.partial"))


def test_a_lock_whose_owner_shows_no_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_POLL_S", 0.01)
    monkeypatch.setattr(stages, "_PATIENCE_S", 0.05)

    def hanging(partial: Path) -> dict[str, int]:  # locks do not mind that it is the same process
        assert stage(tmp_path / "s", lambda own: {"n": 2}) == {"n": 2}
        return {"n": 1}

    assert stage(tmp_path / "s", hanging) == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


# ---- A cache that somebody touched ------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path: Path) -> Path:
    def work(partial: Path) -> dict[str, int]:
        (partial / "class_00").mkdir()
        (partial / "class_00" / "00.png").write_bytes(b"image")
        (partial / "model.safetensors").write_bytes(bytes(1000))
        return {"n": 1}

    stage(tmp_path / "s", work)
    return tmp_path / "s"


def test_a_file_deleted_from_the_cache_is_noticed(done: Path) -> None:
    (done / "class_00" / "00.png").unlink()
    (done / "class_00").rmdir()
    with pytest.raises(LowraError, match=r"class_00/00.png is missing since it was built. Delete .*/s to have it"):
        finished(done)


def test_a_bit_flipped_in_the_cache_is_noticed(done: Path) -> None:
    data = bytearray((done / "model.safetensors").read_bytes())
    data[500] ^= 1
    (done / "model.safetensors").write_bytes(data)
    with pytest.raises(LowraError, match=r"model.safetensors was changed since it was built"):
        stage(done, lambda partial: {"n": 2})


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"report": 1, "files": {}}', b'{"report": {'])
def test_a_damaged_marker_is_a_sentence(done: Path, garbage: bytes) -> None:
    (done / MARKER).write_bytes(garbage)
    with pytest.raises(LowraError, match=r"stage.json is damaged. Delete .*/s to have it built again"):
        stage(done, lambda partial: {"n": 2})


def test_hidden_files_beside_a_part_do_not_matter(done: Path) -> None:
    (done / ".DS_Store").write_bytes(b"x")
    assert finished(done) == {"n": 1}
    assert "class_00/00.png" in json.loads((done / MARKER).read_text())["files"]
