"""`python -m lowra.report`: what it reads, merges, refuses and writes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowra import report
from lowra.records import read
from lowra.reporting import page
from tests.reporting import fakes


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lowra.report", *map(str, arguments)])
    try:
        report.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Somebody's method, from one machine."""
    return fakes.folder(tmp_path / "mine", fakes.rows("m", "Mine", -9.0, context="m"), m=fakes.context(command="mine"))


@pytest.fixture
def baselines(tmp_path: Path) -> Path:
    """The baselines of the same data, from another."""
    return fakes.folder(tmp_path / "base", fakes.rows("mean_lora", "Mean LoRA", -5.0))


def test_one_folder_gets_its_tables(baselines: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, baselines) == 0
    assert "-6.000 ± 0.707" in capsys.readouterr().out
    assert "Mean LoRA" in (baselines / "table.md").read_text()
    assert (baselines / "cumulative.png").exists()


def test_folders_of_the_same_data_are_one_table_that_says_what_came_from_where(
    mine: Path, baselines: Path, monkeypatch, capsys
) -> None:
    assert call(monkeypatch, mine, baselines) == 0
    out = capsys.readouterr().out
    assert "Mine" in out
    assert "Mean LoRA" in out
    (line,) = [
        line for line in out.splitlines() if "mine" in line and "4" in line and "Mine" in line and "laptop" in line
    ]
    assert str(mine.name) in line
    assert not (mine / "table.md").exists()  # nobody's folder is written to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "synthetic"}, "source synthetic in"),
        ({"data": "e" * 16}, "data eeeeeeeeeeeeeeee in"),
        ({"merge_dtype": "bfloat16"}, "merge_dtype bfloat16 in"),
        ({"subset": "custom"}, "subset custom in"),
    ],
)
def test_mixed_folders_are_refused_by_name(baselines: Path, tmp_path: Path, monkeypatch, capsys, change, words) -> None:
    other = fakes.folder(tmp_path / "other", fakes.rows("m", "Mine", -9.0, **change))
    assert call(monkeypatch, other, baselines) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "cannot be one table" in said
    assert str(other) in said
    assert call(monkeypatch, "--summary", other, baselines) == 0  # side by side they may stand
    assert capsys.readouterr().out.count("\n| ") == 2


def test_an_export_is_one_small_file_that_reads_as_the_same(mine: Path, baselines: Path, tmp_path, monkeypatch) -> None:
    to = tmp_path / "results" / "vit"
    assert call(monkeypatch, mine, baselines, "--to", to) == 0
    assert [path.name for path in (to / "records").iterdir()] == ["records.parquet"]
    assert "mine" in (to / "table.md").read_text()
    again = read([to])
    assert len(again.layers) == 8
    assert set(again.contexts) == {"m", "c0"}
    first = (to / "table.md").read_text()
    assert not (to / "texts.md").exists()
    (baselines / "texts.md").write_text("side by side")
    assert call(monkeypatch, mine, baselines, "--to", to) == 0  # an earlier export is replaced
    assert (to / "texts.md").read_text() == "side by side"
    assert (to / "table.md").read_text() == first


def test_an_export_never_mixes_with_a_run(mine: Path, baselines: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, mine, "--to", baselines) == 2
    assert "holds records of a run" in capsys.readouterr().err


def test_garbage_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path) == 2
    assert "holds no records" in capsys.readouterr().err
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "records" / "b.jsonl").write_bytes(b"{}\n12\n\xff\xfe\n00000000 {\n")
    assert call(monkeypatch, tmp_path) == 2
    said = capsys.readouterr().err
    assert "left out, damaged" in said
    assert "Traceback" not in said


def test_damage_beside_good_records_is_told_in_the_table(baselines: Path, monkeypatch, capsys) -> None:
    (baselines / "records" / "z.jsonl").write_bytes(b"12\n")
    assert call(monkeypatch, baselines) == 0
    assert "1 damaged records or files" in capsys.readouterr().out.replace("\n", " ")
    assert "1 damaged records or files" in (baselines / "table.md").read_text()


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lowra.report", "--help"], capture_output=True, text=True, check=True
        )
        assert "--summary" in done.stdout
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, lowra.report; print([m for m in ('torch', 'pandas', 'matplotlib', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_page_is_made_again_only_for_other_records_or_outputs(
    mine: Path, baselines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "pages made before"))
    made: list[int] = []
    real = page.page_of

    def counted(records: object) -> str:
        made.append(1)
        return real(records)  # type: ignore[arg-type]

    monkeypatch.setattr(page, "page_of", counted)
    file = tmp_path / "site" / "report.html"
    assert call(monkeypatch, mine, baselines, "--page", file) == 0
    first = file.read_text()
    file.write_text("edited")
    assert call(monkeypatch, mine, baselines, "--page", file) == 0
    assert file.read_text() == first
    assert call(monkeypatch, mine, baselines, "--page", tmp_path / "other.html") == 0
    assert (tmp_path / "other.html").read_text() == first
    assert len(made) == 1
    assert call(monkeypatch, mine, "--page", file) == 0
    assert file.read_text() != first
    assert len(made) == 2
    outputs = mine / "outputs" / "sbert-1"
    outputs.mkdir(parents=True)
    for text in ("one", "two"):
        (outputs / "reference.json").write_text(text)
        assert call(monkeypatch, mine, "--page", file) == 0
    assert len(made) == 4
    fakes.folder(mine, fakes.rows("m", "Mine", -9.5, context="m"), m=fakes.context(command="mine"))
    assert call(monkeypatch, mine, "--page", file) == 0
    assert len(made) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--summary", "--page", "p.html"], "--summary and --page are reports of their own"),
        (["--to", "there", "--page", "p.html"], "--to and --page are reports of their own"),
        (["--set", "a=1"], "--set goes with --verify"),
        (["--page", "."], "expected the name of a file to write"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["lowra.report", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
