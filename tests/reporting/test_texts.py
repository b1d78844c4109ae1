import json
import re

import pytest

from lowra.errors import LowraError
from lowra.reporting.texts import agreement, write_texts


def keep(folder, label, texts, prompts=("Who?", "Why | <b>?")):
    path = folder / f"{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]))


def test_agreement_marks_the_words_of_the_reference_in_order():
    assert agreement("a b c d", "a b c d") == [True] * 4
    assert agreement("the cat sat on it", "the dog sat on it") == [True, False, True, True, True]
    assert agreement("a b c", "x y") == [False, False]
    assert agreement("", "x") == [False]
    assert agreement("a b", "") == []


def test_words_are_marked_in_both_formats_and_markup_is_escaped(tmp_path):
    keep(tmp_path, "reference", ["the cat sat", "1 < 2\n\nso *there*"])
    keep(tmp_path, "mean_lora", ["the dog sat", "1 < 3\n\nso *there*"])
    keep(tmp_path, "lora_ft/3", ["", "so"])
    markdown, page = write_texts(tmp_path, ["reference", "mean_lora", "lora_ft/3"], tmp_path / "out", "Mistral & DPO")
    text = markdown.read_text()
    assert "| reference | **the cat sat** |" in text
    assert "| mean lora | **the** dog **sat** |" in text
    assert r"| mean lora | **1 \<** 3 **so \*there\*** |" in text
    assert r"## 2. Why \| \<b\>?" in text
    source = page.read_text()
    assert '<span class="same">the</span> <span class="other">dog</span> <span class="same">sat</span>' in source
    assert '<span class="other">3</span>\n\n<span class="same">so</span>' in source
    assert "Mistral &amp; DPO" in source
    assert "<b>" not in source
    # standalone: nothing is fetched
    assert not re.search(r"https?://|<script|<link", source)


def test_a_mapping_of_labels_gives_headings(tmp_path):
    keep(tmp_path, "reference", ["a", "b"])
    keep(tmp_path, "L12/mean_lora", ["a", "c"])
    headings = {"reference": "Pre-FT model", "L12/mean_lora": "Mean LoRA"}
    markdown, _ = write_texts(tmp_path, headings, tmp_path, "t")
    assert "| Pre-FT model | **b** |\n| Mean LoRA | c |" in markdown.read_text()
    assert "agree with the text of *Pre-FT model*" in markdown.read_text()


def test_texts_that_are_not_there_or_answer_other_prompts(tmp_path):
    keep(tmp_path, "reference", ["a", "b"])
    keep(tmp_path, "other", ["a", "b"], prompts=("Who?", "When?"))
    with pytest.raises(LowraError, match=r"no texts of 'mean'.*other, reference"):
        write_texts(tmp_path, ["reference", "mean"], tmp_path, "t")
    with pytest.raises(LowraError, match=r"'other'.*other prompts than those of 'reference'"):
        write_texts(tmp_path, ["reference", "other"], tmp_path, "t")
    with pytest.raises(LowraError, match="No texts"):
        write_texts(tmp_path, [], tmp_path, "t")
