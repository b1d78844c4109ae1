from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from lowra.digests import file_digest, folder_digest, remembered, visible_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lowra.digests._RACY_S", -1.0)  # files of a test are all young
    return tmp_path / "cache" / "digests"


def answer(path: Path, calls: list[int]) -> str:
    return remembered("test", [path], lambda: calls.append(1) or path.read_text())  # type: ignore[func-returns-value]


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()[:16]


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    calls: list[int] = []
    (tmp_path / "a").write_text("one")
    assert [answer(tmp_path / "a", calls) for _ in range(3)] == ["one"] * 3
    assert len(calls) == 1
    (tmp_path / "b").write_text("one")
    assert answer(tmp_path / "b", calls) == "one"
    assert len(calls) == 2


def test_a_changed_file_is_read_again_though_size_and_date_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    before = path.stat()
    assert answer(path, []) == "one"
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert answer(path, []) == "two"


def test_what_is_too_young_to_be_trusted_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowra.digests._RACY_S", 2.0)
    calls: list[int] = []
    (tmp_path / "a").write_text("one")
    assert [answer(tmp_path / "a", calls) for _ in range(2)] == ["one"] * 2
    assert len(calls) == 2


@pytest.mark.parametrize("garbage", ["", "{}", "[1]", "nonsense", '{"files": 3, "answer": 3}'])
def test_a_broken_cache_is_as_good_as_none(tmp_path: Path, cache: Path, garbage: str) -> None:
    (tmp_path / "a").write_text("one")
    assert answer(tmp_path / "a", []) == "one"
    (entry,) = cache.iterdir()
    entry.write_text(garbage)
    assert answer(tmp_path / "a", []) == "one"
    assert answer(tmp_path / "a", calls := []) == "one"
    assert not calls  # mended


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "file" / "inside"))
    assert answer(tmp_path / "file", []) == ""


def test_a_folders_digest_follows_names_and_contents(tmp_path: Path) -> None:
    def digest(files: dict[str, str], name: str) -> str:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return folder_digest(tmp_path / name)

    first = digest({"a/x": "1", "b": "2"}, "first")
    assert digest({"b": "2", "a/x": "1", ".hidden/y": "3", "a/.z": "4"}, "second") == first
    assert digest({"a/x": "1", "b": "3"}, "third") != first
    assert digest({"a/y": "1", "b": "2"}, "fourth") != first
    names = [path.relative_to(tmp_path / "second").as_posix() for path in visible_files(tmp_path / "second")]
    assert names == ["a/x", "b"]
