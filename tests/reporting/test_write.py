"""The views of a folder: whole, escaped, never stale, never in another process's way."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pandas as pd
import pytest

from lowra import reporting
from lowra.errors import LowraError
from lowra.files import replacing, write_text
from lowra.reporting.escape import clean, html_caption, markdown_caption, plot_text, slug
from tests.reporting import fakes


def test_everything_of_a_run_is_written(tmp_path: Path) -> None:
    printed = reporting.write(fakes.records(), tmp_path, methods_order=["spectral_detuning", "mean_lora"])
    assert "source=mini" in printed
    assert "NOT the paper's experiment" in printed
    assert "**" not in printed
    table = (tmp_path / "table.md").read_text()
    assert "**a miniature built and attacked" in table
    assert table.index("| Spectral DeTuning |") < table.index("| Mean LoRA |")
    assert "## By layer type" in table
    assert "![cumulative](cumulative.png)" in table
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("table.md", "table.tex", "table.csv", "layers.parquet", "trials.parquet", "cumulative.png", "cumulative.svg")
    }
    assert len(pd.read_parquet(tmp_path / "layers.parquet")) == 8
    trials = pd.read_parquet(tmp_path / "trials.parquet")
    assert list(trials["w_error"]) == [-5.5, -6.5, -16.5, -17.5]
    assert "act_dist" in trials


def test_nothing_stale_stays_beside_a_new_table(tmp_path: Path) -> None:
    sweep = [row for n in (3, 5) for row in fakes.rows("m", "Mine", -5.0, n=n)]
    reporting.write(fakes.records(sweep), tmp_path)
    assert (tmp_path / "by_models.png").exists()
    reporting.write(fakes.records(), tmp_path)
    assert not list(tmp_path.glob("by_models*"))
    assert (tmp_path / "cumulative.svg").exists()
    reporting.write(fakes.records(), tmp_path, figures=False)  # after a draw: tables only
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("*.svg")]
    assert "![" not in (tmp_path / "table.md").read_text()


def test_two_settings_in_one_folder_have_a_table_and_figures_each(tmp_path: Path) -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows(
        "mean_lora", "Mean LoRA", -4.0, merge_dtype="bfloat16"
    )
    reporting.write(fakes.records(layers), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "## ViT, source=mini, merges stored in bfloat16" in table
    assert "-6.000 ± 0.707" in table
    assert "-5.000 ± 0.707" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"cumulative_bfloat16.png", "cumulative.png"}
    reporting.write(fakes.records(layers[:4]), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"cumulative.png"}


def test_names_titles_and_captions_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|[x](y)$"
    layers = fakes.rows("m", evil, -5.0)
    for row in layers:
        row["layer_type"] = evil
    reporting.write(fakes.records(layers, c0=fakes.context(title=evil, caption=evil)), tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "<script" not in re.sub(r"\\<", "", text)
    assert r"\<script\>alert(1)\</script\>\|\[x\](y)\$" in text


def test_no_records_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="no records to show"):
        reporting.write(fakes.records([], score=None), tmp_path)


def test_statistics_of_mixed_types_can_be_stored(tmp_path: Path) -> None:
    layers = fakes.rows("m", "Mine", -5.0)
    for row, value in zip(layers, ("two", 2, None, 2.5), strict=True):
        row["stat_rank"] = value
    reporting.write(fakes.records(layers), tmp_path)
    assert list(pd.read_parquet(tmp_path / "layers.parquet")["stat_rank"].dropna()) == ["two", "2", "2.5"]


def _write_often(folder: str) -> None:
    for _ in range(3):
        reporting.write(fakes.records(), Path(folder))


def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(LowraError, match=r"Cannot write .*file/a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_text_of_any_kind() -> None:
    assert clean("a\n\tb\x00\ud800") == "a b\N{REPLACEMENT CHARACTER}?"
    assert markdown_caption("**bold** and *not* <b>") == r"**bold** and \*not\* \<b\>"
    assert html_caption("**bold** & <b>") == "<strong>bold</strong> &amp; &lt;b&gt;"
    assert plot_text("x" * 100) == "x" * 69 + "…"
    assert slug("../../etc/passwd $x") == "etc-passwd-x"
