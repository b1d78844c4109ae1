"""The page: whole, self-contained, and true to the records."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lowra.errors import LowraError
from lowra.files import write_text
from lowra.records import Records
from lowra.reporting.exhibits import EXHIBITS
from lowra.reporting.page import page_of
from tests.reporting import fakes

KEYS = ("subset", "source", "data", "n_loras", "trial", "models", "seed", "variant", "method", "label")
KEYS += ("merge_dtype", "merge_order", "knows_rank", "device", "layer_model", "layer_name")
METHODS = {
    "lora_ft": ("LoRA FT", -3.7),
    "mean_lora": ("Mean LoRA", -4.3),
    "spectral_detuning": ("Spectral DeTuning", -16.0),
    "subspace_intersection": ("Subspace intersection", -19.0),
}
SCORES = {
    "vit": ("act_dist", "Act.-Dist."),
    "stable_diffusion": ("lpips", "LPIPS (random trunk)"),
    "mistral_sft": ("sbert", "SBERT"),
    "mistral_dpo": ("sbert", "SBERT"),
}


def everything(folder: str = "runs") -> Records:
    """Records of every exhibit and track: four subsets, sweeps, the ablation, histories, stops, all tracks."""
    generator = np.random.default_rng(0)
    layers: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []

    def add(subset: str, method: str, label: str, base: float, n: int, trials: int = 4, **changes: Any) -> None:
        place = {"subset": subset, "folder": f"{folder}/{subset}/mini", "context": f"c-{subset}"} | changes
        for row in fakes.rows(method, label, base - 0.05 * n, n=n, trials=trials, **place):
            row["w_error"] += 0.1 * generator.normal() + row["trial"]
            if method == "subspace_intersection":
                row |= {"stat_certificate": "certified", "stat_predicted_w_error": row["w_error"] + 0.5}
            layers.append(row)

    for subset, n in (("vit", 5), ("stable_diffusion", 5), ("mistral_sft", 12), ("mistral_dpo", 8)):
        for method, (label, base) in METHODS.items():
            for number in sorted({2, n, 15}):
                add(subset, method, label, base, number, options='{"scheduler": true, "steps": 300}')
            add(subset, method, label, base, 3, knows_rank=False)
            add(subset, method, label, base, n, merge_order="once, 1 foreign")
            add(subset, method, label, base / 2, n, merge_dtype="bfloat16", knows_rank=False)
    for row in layers:
        if row["method"] != "spectral_detuning":
            row["options"] = "{}"
    stable, name = "stable_diffusion", "Spectral DeTuning"
    add(stable, "without", f"{name} (scheduler=false)", -12, 5, options='{"scheduler": false, "steps": 300}')
    add(stable, "table_9", f"{name} (steps=200)", -15, 5, options='{"scheduler": true, "steps": 200}')
    for stop in (1, 10, 100):
        options = json.dumps({"steps": 200, "stop_after": stop})
        add(stable, f"after_{stop}", f"{name} (stop_after={stop})", -4 - stop / 10, 5, trials=1, options=options)
    for label, steps in ((f"{name} (keep_history=true)", 40), (f"{name} (keep_history=true, steps=20)", 20)):
        add(stable, "h", label, -16, 5, trials=1, options=json.dumps({"keep_history": True, "steps": steps}))
        for row in layers[-2:]:
            place = {key: row[key] for key in KEYS}
            history += [place | {"step": s, "loss": 10 ** (-s / 5), "w_error": -3 - s / 5} for s in range(steps)]
    add("vit", "mean_lora", "Mean LoRA", -5, 5, data="e" * 16, context="c-defended")
    add("mistral_dpo", "lora_ft", "LoRA FT", -4, 8, data="f" * 16, context="c-reading")
    table = pd.DataFrame(layers)
    scored = []
    for subset, (column, heading) in SCORES.items():
        mine = table[(table["subset"] == subset) & table["knows_rank"] & (table["merge_order"] == "once")]
        part = fakes.scores(mine, 0.1, column, heading)
        part["value"] = 0.05 + 0.01 * np.arange(len(part)) / len(part)
        part["weights"] = [[f"model-{subset}-{label}"] for label in part["label"]]
        scored.append(part)
    contexts = {
        f"c-{subset}": fakes.context(title=title, config={"builder": {"continues": "merged_sft"}})
        for subset, title in zip(SCORES, ("ViT", "Stable Diffusion", "Mistral SFT", "Mistral DPO"), strict=True)
    }
    contexts["c-defended"] = fakes.context(note="One frozen A.", config={"builder": {"shared_a": True}})
    contexts["c-reading"] = fakes.context(note="A reading.", config={"builder": {"continues": "sft_adapter"}})
    return Records(table, pd.concat(scored), pd.DataFrame(history), contexts)


def with_outputs(place: Path) -> Records:
    """The same, with texts and pictures in the run folders."""
    records = everything(str(place / "runs"))
    texts = place / "runs" / "mistral_dpo" / "mini" / "outputs" / "sbert-1"
    texts.mkdir(parents=True)
    for label in ("reference", *{f"model-mistral_dpo-{label}" for label, _ in METHODS.values()}):
        rows = [{"prompt": f"Why {i} < 3?", "text": f"Because {label} & <b>so</b>."} for i in range(12)]
        (texts / f"{label}.json").write_text(json.dumps(rows))
    pictures = place / "runs" / "stable_diffusion" / "mini" / "outputs" / "lpips-1"
    for label in ("reference", *{f"model-stable_diffusion-{label}" for label, _ in METHODS.values()}):
        (pictures / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (80 * i, 0, len(label))).save(pictures / label / f"{i:03d}.png")
    (pictures / "prompts.json").write_text(json.dumps(["a <red> circle", "a $ sign", r"a \frac"]))
    return records


class Reader(HTMLParser):
    """Collects ids, links, images and headings."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))
        if tag == "img":
            self.images.append(str(found["src"]))
            assert found.get("alt")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("page")
    return page_of(with_outputs(place))


def test_every_exhibit_is_there(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert {f"mini-{name}" for name in EXHIBITS} <= set(reader.ids)
    assert "deviations" in reader.ids
    assert "Table 2: ViT, 5 models" in page
    assert "98.1% with the rank scheduler" in page  # the paper's own words beside Figure 6


def test_it_is_self_contained_and_its_links_lead_somewhere(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert all(image.startswith("data:image/") for image in reader.images)
    assert len(reader.images) > 12 + 15
    outside = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", outside)


def test_the_leaderboard_has_every_track_and_subset(page: str) -> None:
    board = page[page.index('<table id="board">') : page.index("source-mini", page.index('<table id="board">'))]
    for track in ("paper", "three", "released", "one_short", "defended"):
        assert f'<td data-value="{track}">{track}</td>' in board
    rows = board.split("<tr>")[2:]
    assert len(rows) == 4 * 4 * 4 + 2 + 1  # tracks x subsets x methods, two of Stable Diffusion's variants, the defence
    assert all(re.search(r'<a href="#record-\d+">', row) for row in rows)
    assert "100%" in board  # certified


def test_names_and_texts_are_escaped(page: str) -> None:
    assert "Because" in page
    assert "<b>so" not in page
    assert "a &lt;red&gt; circle" in page
    assert "<strong>a miniature built and attacked" in page


def test_contradictions_are_measured(page: str) -> None:
    assert "with 200 steps," in page
    assert "with merged_sft" in page
    assert "with sft_adapter" in page


def test_a_page_of_little_says_what_was_not_measured(tmp_path: Path) -> None:
    text = page_of(fakes.records())
    assert "Table 2: ViT, 5 models" in text
    assert "Not measured here: experiment=steps_200" in text
    assert "mini-fig7" not in text


def test_nothing_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="no records to make a page of"):
        write_text(tmp_path / "report.html", page_of(fakes.records([], score=None)))
    assert not list(tmp_path.iterdir())
