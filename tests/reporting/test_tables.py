"""Tables: what is in a cell, and what is said of what is not there."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from lowra.reporting.numbers import count, duration, number, pair, share
from lowra.reporting.paper import paper_numbers
from lowra.reporting.tables import breakdown, csv, latex, legend, main_table, markdown, plain, summary
from lowra.reporting.views import View, views
from tests.reporting import fakes


def only(records: fakes.Records) -> View:
    (view,) = views(records, list(fakes.METHODS))
    return view


def test_mean_and_deviation_over_draws() -> None:
    table = main_table(only(fakes.records())).set_index("Method")
    # draws -5.5 and -6.5: mean -6, sample deviation sqrt(0.5)
    assert table.loc["Mean LoRA", "W-Error ↓"] == "-6.000 ± 0.707"
    assert table.loc["Mean LoRA", "± layers"] == "0.707"
    assert table.loc["Mean LoRA", "Act.-Dist. ↓"] == "2e-05 ± 0"
    assert table.loc["Mean LoRA", "exact weights"] == "25.00%"
    assert table.loc["Mean LoRA", "exact layers"] == "0.0/2"
    assert table.loc["Mean LoRA", "draws"] == "2"
    assert table.loc["Mean LoRA", "time/layer"] == "500 ms"
    assert list(table.index) == ["Mean LoRA", "Spectral DeTuning"]
    assert "failed" not in table
    assert "missing" not in table


def test_rows_stand_in_the_order_asked_for() -> None:
    (view,) = views(fakes.records(), ["spectral_detuning", "mean_lora"])
    assert list(main_table(view)["Method"]) == ["Spectral DeTuning", "Mean LoRA"]


def test_the_papers_numbers_stand_in_their_own_columns() -> None:
    table = main_table(only(fakes.records())).set_index("Method")
    assert table.loc["Spectral DeTuning", "paper W-Error"] == "-15.942 ± 1.889"
    assert table.loc["Mean LoRA", "paper Act.-Dist."] == "0.050 ± 0.010"
    other_n = only(fakes.records([*fakes.rows("mean_lora", "Mean LoRA", -5.0, n=3)]))
    assert not any("paper" in column for column in main_table(other_n))
    bfloat16 = only(fakes.records(fakes.rows("mean_lora", "Mean LoRA", -5.0, merge_dtype="bfloat16")))
    assert not any("paper" in column for column in main_table(bfloat16))


def test_a_variant_is_a_row_of_its_own_without_the_papers_numbers() -> None:
    label = "Spectral DeTuning (scheduler=False)"
    layers = fakes.rows("spectral_detuning", "Spectral DeTuning", -16.0)
    layers += fakes.rows("spectral_detuning", label, -12.0)
    table = main_table(only(fakes.records(layers))).set_index("Method")
    assert list(table.index) == ["Spectral DeTuning", label]
    assert table.loc[label, "W-Error ↓"] == "-13.000 ± 0.707"
    assert table.loc[label, "paper W-Error"] == ""


def test_an_edited_method_stands_beside_what_it_was() -> None:
    layers = fakes.rows("m", "Mine", -5.0, variant="a" * 16) + fakes.rows("m", "Mine", -7.0, variant="b" * 16)
    assert list(main_table(only(fakes.records(layers)))["Method"]) == ["Mine [code aaaaaa]", "Mine [code bbbbbb]"]


def test_one_variant_on_two_kinds_of_device_is_two_rows() -> None:
    layers = fakes.rows("m", "Mine", -5.0) + fakes.rows("m", "Mine", -7.0, device="cuda")
    table = main_table(only(fakes.records(layers))).set_index("Method")
    assert table["W-Error ↓"].to_dict() == {"Mine on cpu": "-6.000 ± 0.707", "Mine on cuda": "-8.000 ± 0.707"}


@pytest.mark.parametrize(
    "change",
    [{"merge_dtype": "bfloat16"}, {"merge_order": "twice"}, {"knows_rank": False}, {"seed": 1}, {"data": "e" * 16}],
)
def test_settings_never_meet_in_a_row(change: dict[str, object]) -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows("mean_lora", "Mean LoRA", -9.0, **change)
    found = views(fakes.records(layers))
    errors = sorted(main_table(view)["W-Error ↓"].item() for view in found)
    assert errors == ["-10.000 ± 0.707", "-6.000 ± 0.707"]
    assert len({view.slug for view in found}) == 2


def test_all_the_draws_there_are() -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0, n=15, trials=10)
    table = main_table(only(fakes.records(layers)))
    assert table["draws"].item() == "1 (all there are)"
    assert table["W-Error ↓"].item() == "-5.500"  # one draw has no deviation: not ± 0.000


def test_a_failed_layer_leaves_no_denominator() -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows("m", "Mine", -16.0)
    layers[-1] = fakes.layer(
        "m", "Mine", np.nan, **{k: layers[-1][k] for k in ("trial", "models", "layer_name")}, failed=True
    )
    view = only(fakes.records(layers))
    table = main_table(view).set_index("Method")
    assert table.loc["Mine", "W-Error ↓"] == "-16.500 (1 of 2 draws)"
    assert table.loc["Mine", "exact weights"] == "18.75%"  # three quarters of 25%
    assert table.loc["Mine", "failed"] == "1 layer"
    assert table.loc["Mean LoRA", "failed"] == ""
    assert "failed layers are left out" in legend([view])


def test_a_method_that_always_fails_is_a_marked_row() -> None:
    layers = [
        *fakes.rows("mean_lora", "Mean LoRA", -5.0),
        *fakes.rows("m", "Mine", -5.0, failed=True, floor_w_error=np.nan),
    ]
    table = main_table(only(fakes.records(layers, score=None))).set_index("Method")
    assert table.loc["Mine", "W-Error ↓"] == "failed"
    assert table.loc["Mine", "failed"] == "4 layers"
    assert table.loc["Mine", "exact weights"] == ""
    alone = main_table(only(fakes.records(fakes.rows("m", "Mine", -5.0, failed=True), score=None)))
    assert alone["W-Error ↓"].item() == "failed"


def test_half_a_run_is_shown_and_marked() -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows("m", "Mine", -16.0)[:3]
    table = main_table(only(fakes.records(layers, score=None))).set_index("Method")
    assert table.loc["Mine", "W-Error ↓"] == "-16.500"  # its one whole draw
    assert table.loc["Mine", "draws"] == "1 of 2"
    assert table.loc["Mine", "missing"] == "1 layer"
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows("m", "Mine", -16.0)[:1]
    table = main_table(only(fakes.records(layers, score=None))).set_index("Method")
    assert table.loc["Mine", "W-Error ↓"] == "-16.000 (partial)"
    assert table.loc["Mine", "missing"] == "3 layers"


def test_scores_of_part_of_the_draws_say_so() -> None:
    records = fakes.records()
    part = records.scores[~((records.scores["method"] == "mean_lora") & (records.scores["trial"] == 1))]
    table = main_table(only(fakes.Records(records.layers, part, records.history, records.contexts)))
    assert list(table["Act.-Dist. ↓"]) == ["2e-05 (1 of 2 draws)", "2e-05 ± 0"]


def test_a_miniature_says_it_is_one() -> None:
    caption = only(fakes.records()).caption
    assert caption.startswith("ViT, source=mini: **a miniature built and attacked on one machine, NOT the paper's")
    assert "15 LoRA models, 2 layers, 2 draws." in caption


def test_one_draw_is_one_draw() -> None:
    assert "2 layers, 1 draw." in only(fakes.records(fakes.rows("m", "Mine", -5.0, trials=1))).caption


def test_summary_puts_views_below_each_other() -> None:
    view = only(fakes.records())
    table = summary([view, view])
    assert len(table) == 4
    assert set(table["Subset"]) == {"ViT, mini"}
    assert table.iloc[1]["semantic metric ↓"] == "Act.-Dist. 2e-05 ± 0"
    assert not any("paper" in column for column in table)


def test_breakdown_by_type() -> None:
    table = breakdown(only(fakes.records()), "layer_type").set_index("type")
    assert table.loc["query", "Mean LoRA"] == "-5.500"
    assert table.loc["value", "Spectral DeTuning"] == "-17.500"


def test_breakdown_says_what_failed() -> None:
    layers = fakes.rows("m", "Mine", -5.0) + fakes.rows("bad", "Bad", -5.0, failed=True)
    layers[1] |= {"failed": True, "w_error": np.nan}
    table = breakdown(only(fakes.records(layers, score=None)), "depth").set_index("depth")
    assert table.loc["0", "Mine"] == "-5.500"
    assert table.loc["1", "Mine"] == "-7.000 (1 of 2 failed)"
    assert table.loc["1", "Bad"] == "failed"


def test_certificates_are_counted_and_the_wrong_ones_too() -> None:
    layers = fakes.rows("m", "Mine", -16.0, stat_certificate="certified", stat_predicted_w_error=-16.0)
    layers[0] |= {"w_error": -9.0}
    layers[1] |= {"stat_certificate": "weak"}
    row = only(fakes.records(layers)).numbers.iloc[0]
    assert row["certified_share"] == 0.75
    assert row["wrong_certificates"] == 1


def test_csv_holds_every_number_and_the_setting() -> None:
    view = only(fakes.records())
    table = pd.read_csv(io.StringIO(csv([view])))
    assert table.loc[0, "w_error"] == -6.0
    assert table.loc[1, "paper_w_error"] == -15.942
    assert set(table["merge_dtype"]) == {"float32"}


def test_latex_is_booktabs_with_every_character_escaped() -> None:
    text = latex(pd.DataFrame({"a_b": [r"50% of $x$ & \y {z}"], "W-Error ↓": ["-6 ± 1"]}), "**A** caption #1", "one")
    assert r"\toprule" in text
    assert r"a\_b & W-Error $\downarrow$ \\" in text
    assert r"50\% of \$x\$ \& \textbackslash{}y \{z\} & -6 $\pm$ 1 \\" in text
    assert r"\caption{A caption \#1}" in text


def test_markdown_cells_are_no_markup() -> None:
    assert markdown(pd.DataFrame({"a": [1], "b": ["x"]})) == "| a | b |\n|---|---|\n| 1 | x |"
    text = markdown(pd.DataFrame({"a|b": ["<img src=x>\n| *c* | [d](e)"]}))
    assert text.splitlines()[0] == r"| a\|b |"
    assert text.splitlines()[2] == r"| \<img src=x\> \| \*c\* \| \[d\](e) |"


def test_plain_aligns() -> None:
    assert plain(pd.DataFrame({"a": ["xyz"], "b": ["1"]})) == "a    b\n------\nxyz  1"


@pytest.mark.parametrize("subset", ["vit", "stable_diffusion", "mistral_sft", "mistral_dpo"])
def test_the_papers_numbers_are_all_there(subset: str) -> None:
    paper = paper_numbers(subset)
    assert paper is not None
    assert list(paper["rows"]) == ["lora_ft", "mean_lora", "spectral_detuning"]
    assert all(len(row) == 2 for row in paper["rows"].values())
    # Each of its tables has Spectral DeTuning far below the mean, and LoRA FT worst.
    errors = [row["w_error"][0] for row in paper["rows"].values()]
    assert errors[0] > errors[1] > errors[2] + 7


def test_own_data_has_no_paper_numbers() -> None:
    assert paper_numbers("custom") is None


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (-15.9424, 1.889, "-15.942 ± 1.889"),
        (1e-6, 3e-6, "1e-06 ± 3e-06"),
        (-31.3, float("nan"), "-31.300"),
        (float("inf"), 1.0, "∞ ± 1.000"),
        (float("nan"), 1.0, ""),
    ],
)
def test_means_are_readable(mean: float, deviation: float, text: str) -> None:
    assert pair(mean, deviation) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (3.32303e-07, "<0.0001%"),
        (3.19481e-06, "0.0003%"),
        (0.530698, "53.07%"),
        (0.999995, "99.9995%"),
        (0.9999999, ">99.9999%"),
        (float("nan"), ""),
    ],
)
def test_shares_are_readable_and_never_rounded_to_none_or_all(fraction: float, text: str) -> None:
    assert share(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.45e-05, "24.5 µs"),
        (0.0788, "78.8 ms"),
        (1.234, "1.23 s"),
        (750, "12.5 min"),
        (12240, "3.40 h"),
        (0.9996, "1000 ms"),
    ],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_small_words() -> None:
    assert (count(1, "draw"), count(10, "draw")) == ("1 draw", "10 draws")
    assert number(0) == "0"
