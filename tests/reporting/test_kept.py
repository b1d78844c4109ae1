"""Reports made before: taken again for the same alone, whatever became of the cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowra.errors import LowraError
from lowra.reporting import kept
from lowra.reporting.kept import Made

REPORT = Made({"table.md": "ü".encode(), "figures/a.png": bytes(range(256)) * 50}, "what is said: ±\n")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reports"


class Making:
    """Makes a report and counts how often."""

    def __init__(self, report: Made = REPORT) -> None:
        self.report, self.times = report, 0

    def __call__(self) -> Made:
        self.times += 1
        return self.report


def test_the_same_is_made_once_and_comes_back_whole() -> None:
    making = Making()
    assert [kept.made(["a", 1.5], making) for _ in range(3)] == [REPORT] * 3
    assert making.times == 1


@pytest.mark.parametrize("other", [["a", 1.5000000000000002], ["a"], ["a", "1.5"], ["a", 1.5, None], ["a", True]])
def test_anything_else_is_made_anew(other: list[object]) -> None:
    kept.made(["a", 1.5], Making(Made({}, "stale")))
    assert kept.made(other, making := Making()) == REPORT
    assert making.times == 1


def test_edited_code_and_other_packages_make_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kept.made("a", making := Making())
    monkeypatch.setattr(kept, "_CODE", "edited")
    kept.made("a", making)
    monkeypatch.setattr(kept, "versions", lambda names: {"matplotlib": "99"})
    kept.made("a", making)
    assert making.times == 3


def test_every_source_and_data_file_counts_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lowra"
    (package / "reporting").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(kept.lowra, "__file__", str(package / "__init__.py"))
    seen = {kept._code()}
    for name in ("reporting/figures.py", "reporting/paper.json", "reporting/page.html.j2"):
        (package / name).write_text("one")
        seen.add(kept._code())
        (package / name).write_text("two")
        seen.add(kept._code())
    assert len(seen) == 7


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text", "other"])
def test_a_damaged_one_is_made_again_and_mended(cache: Path, damage: str) -> None:
    kept.made("a", making := Making())
    (place,) = cache.iterdir()
    whole = place.read_bytes()
    middle = len(whole) // 2
    place.write_bytes(
        {
            "cut": whole[:-20],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "emptied": b"",
            "text": b"not an archive",
            "other": whole[16:],
        }[damage]
    )
    assert [kept.made("a", making), kept.made("a", making)] == [REPORT, REPORT]
    assert making.times == 2


def test_errors_pass_and_are_not_kept(cache: Path) -> None:
    def fails() -> Made:
        raise LowraError("no records")

    for _ in range(2):
        with pytest.raises(LowraError, match="no records"):
            kept.made("a", fails)
    assert kept.made("a", Making()) == REPORT


def test_without_a_cache_it_is_made_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "file" / "inside"))
    making = Making()
    assert [kept.made("a", making), kept.made("a", making)] == [REPORT, REPORT]
    assert making.times == 2


def test_the_ones_asked_for_last_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT", 3)
    for age, name in enumerate("abc"):
        kept.made(name, Making())
        for path in cache.iterdir():  # a clock that ticks between any two
            os.utime(path, (path.stat().st_mtime - 10 + age, path.stat().st_mtime - 10 + age))
    kept.made("a", making := Making())
    kept.made("d", making)
    assert len(list(cache.iterdir())) == 3
    kept.made("a", making)
    assert making.times == 1
    kept.made("b", making)
    assert making.times == 2


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LowraError, match="Cannot write"):
        REPORT.put(tmp_path / "file" / "inside")


def test_killed_at_any_moment_it_leaves_the_whole_or_nothing(tmp_path: Path, cache: Path) -> None:
    code = """
import itertools, sys
from lowra.reporting import kept
content = bytes(range(256)) * 4000
print("started", flush=True)
for turn in itertools.count():
    kept.made(turn % 7, lambda: kept.Made({"a": content, "b": str(turn % 7).encode()}, "text"))
    if turn % 7 == 6:
        [path.unlink() for path in __import__("pathlib").Path(sys.argv[1]).glob("*.zip")]
"""
    for i in range(6):
        two = [
            subprocess.Popen([sys.executable, "-c", code, str(cache)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in two:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(0.05 + 0.037 * i)
        for process in two:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for turn in range(7):
            report = Made({"a": bytes(range(256)) * 4000, "b": str(turn).encode()}, "text")
            assert kept.made(turn, Making(report)) == report
