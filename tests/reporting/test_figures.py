"""Figures: what is drawn, and that nothing in a name, a prompt or a gap of the records stops them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowra.reporting import NAMES, figures
from lowra.reporting.views import View, views
from tests.reporting import fakes


def only(layers: list[dict[str, object]], score: float | None = 2e-5) -> View:
    (view,) = views(fakes.records(layers, score))
    return view


def sweep(label: str = "Mine", **changes: object) -> list[dict[str, object]]:
    return [row for n in (2, 3, 5) for row in fakes.rows("m", label, -5.0 - n, n=n, **changes)]


def test_cumulative_ends_below_all_layers_where_some_failed() -> None:
    layers = fakes.rows("mean_lora", "Mean LoRA", -5.0) + fakes.rows("m", "Mine", -16.0)
    layers[-1] |= {"failed": True, "w_error": np.nan}
    layers[-2] |= {"w_error": np.inf}  # a recovery that is not finite counts as one that never arrives
    figure = figures.cumulative([only(layers)])
    assert figure is not None
    whole, part = figure.axes[0].lines
    assert max(whole.get_ydata()) == 100
    assert max(part.get_ydata()) == 50
    assert part.get_label() == "Mine (2 of 4 layers failed)"


def test_numbers_of_models_have_whole_ticks() -> None:
    figure = figures.by_models([only(sweep())])
    assert figure is not None
    assert list(figure.axes[0].get_xticks()) == [2, 3, 5]


def test_a_mean_over_part_of_the_draws_is_marked() -> None:
    layers = sweep()
    layers[0] |= {"failed": True, "w_error": np.nan}
    figure = figures.by_models([only(layers)])
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Mine", figures.PART]


def test_legends_are_off_the_axes(tmp_path: Path) -> None:
    figure = figures.cumulative([only(sweep())])
    assert figure is not None
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0


def test_rows_are_told_apart_without_colour() -> None:
    looks = [figures.look(i) for i in range(16)]
    assert len({(str(each["linestyle"]), each["marker"]) for each in looks}) == 16


@pytest.mark.parametrize("name", ["costs $5 and $6", r"\frac{1", "_hidden", "a^b_c$", "x" * 300, "\u4f60\x00"])
def test_any_name_can_be_drawn(name: str) -> None:
    layers = sweep(name, stat_predicted_w_error=-9.0, stat_certificate="certified")
    records = fakes.records(layers, 0.1, c0=fakes.context(title=name, caption=name))
    (view,) = views(records)
    for draw in (
        figures.cumulative,
        figures.by_models,
        figures.semantic_by_models,
        figures.predicted,
        figures.histogram,
    ):
        assert list(figures.drawn(draw, [view], figures.FORMATS)) == ["png", "svg"]
    if name == "_hidden":
        figure = figures.cumulative([view])
        assert figure is not None
        assert figure.axes[0].get_legend_handles_labels()[1] == [" _hidden"]  # an underscore alone would hide it


def test_equal_records_give_equal_files() -> None:
    view = only(sweep())
    one = figures.drawn(figures.by_models, [view], figures.FORMATS)
    assert one == figures.drawn(figures.by_models, [view], figures.FORMATS)
    assert one["png"].startswith(b"\x89PNG")
    assert b"<svg" in one["svg"]


def test_no_numbers_no_figure() -> None:
    failed = only(fakes.rows("m", "Mine", -5.0, failed=True), score=None)
    for draw in figures.FIGURES.values():
        assert figures.drawn(draw, [failed], figures.FORMATS) == {}


def test_the_log_says_what_the_mse_does_not() -> None:
    figure = figures.histogram([only(fakes.rows("m", "Mine", -5.0))])
    assert figure is not None
    (label,) = figure.axes[0].get_legend_handles_labels()[1]
    # Layers at 10^-5 and 10^-6: the mean of the logarithms is -5.5, the mean of the errors 5.5e-6.
    assert label == "Mine: W-Error -5.500, MSE 5.500e-06, Act.-Dist. 2e-05"


def test_pictures_are_not_empty() -> None:
    png = figures.drawn(figures.cumulative, [only(sweep())], ["png"])["png"]
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert (pixels < 128).mean() > 0.005


def with_history(layers: list[dict[str, object]], steps: int = 20) -> View:
    """A method that gains a decade every five steps in loss and error alike."""
    keys = ("subset", "source", "data", "n_loras", "trial", "models", "seed", "variant", "method", "label")
    keys += ("merge_dtype", "merge_order", "knows_rank", "device", "layer_model", "layer_name")
    history = [
        {key: row[key] for key in keys} | {"step": s, "loss": 10 ** (-s / 5), "rank": 2.0, "w_error": -3 - s / 5}
        for row in layers
        for s in range(steps)
    ]
    records = fakes.records(layers + fakes.rows("mean_lora", "Mean LoRA", -4.0, n=5, trials=1), 0.1)
    (view,) = views(fakes.Records(records.layers, records.scores, fakes.pd.DataFrame(history), records.contexts))
    return view


def test_error_over_iterations_beside_the_level_of_the_mean() -> None:
    figure = figures.iterations([with_history(fakes.rows("m", "Mine", -7.0, n=5, trials=1))])
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["Mine"].get_xdata()) == list(range(1, 21))
    assert lines["Mine"].get_ydata()[-1] == pytest.approx(-6.8)
    assert set(lines["Mean LoRA"].get_ydata()) == {-4.5}


def test_error_against_loss_states_the_correlation() -> None:
    figure = figures.error_against_loss([with_history(fakes.rows("m", "Mine", -7.0, n=5, trials=1))])
    assert figure is not None
    assert "20 iterations (correlation 1.000)" in figure.legends[0].get_texts()[0].get_text()


def test_error_against_score_takes_what_was_stopped_early() -> None:
    layers = []
    for stop in (1, 2, 5, 10):
        layers += fakes.rows("m", f"Mine (stop_after={stop})", -3.0 - stop, options=f'{{"stop_after": {stop}}}')
    layers += fakes.rows("m", "Mine", -20.0)
    records = fakes.records(layers)
    values = {f"Mine (stop_after={stop})": float(stop) for stop in (1, 2, 5, 10)}
    scores = records.scores.assign(value=records.scores["label"].map(values).fillna(0.0))
    (view,) = views(fakes.Records(records.layers, scores, records.history, records.contexts))
    figure = figures.error_against_score([view])
    assert figure is not None
    assert figure.legends[0].get_texts()[0].get_text() == "4 numbers of iterations (correlation -1.000)"
    assert figures.error_against_loss([view]) is None


def test_all_subsets_in_one_figure() -> None:
    layers: list[dict[str, object]] = []
    for subset in ("vit", "mistral_sft"):
        layers += [
            r for n in (2, 3) for r in fakes.rows("spectral_detuning", "Spectral DeTuning", -9, n=n, subset=subset)
        ]
    figure = figures.all_subsets(views(fakes.records(layers)))
    assert figure is not None
    assert len(figure.legends[0].get_texts()) == 2
    assert figures.all_subsets(views(fakes.records())) is None


def test_every_figure_of_a_folder_has_its_name_listed() -> None:
    assert tuple(figures.FIGURES) == NAMES


def test_predictions_say_which_side_is_the_bad_one() -> None:
    figure = figures.predicted([only(fakes.rows("m", "Mine", -19.0, stat_predicted_w_error=-18.0))])
    assert figure is not None
    texts = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert texts["worse than predicted"] > 0.5 > texts["better than predicted"]
