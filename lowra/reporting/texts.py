"""Side-by-side tables of generated texts, the words that agree with the pre-fine-tuning model's marked (Figs. 2, 17).

Texts are aligned word by word with the reference by `difflib` (longest matching runs first), so words that come back
after a difference agree again; a word is what stands between blanks, punctuation included. Figs. 2 and 17 show agreeing
words in green and others in red: so does the HTML (others also underlined); the Markdown prints agreeing words bold.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path

from lowra.errors import LowraError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
th { width: 11em; font-weight: 600; }
td { white-space: pre-wrap; }
.same { color: #116329; }
.other { color: #b42318; text-decoration: underline dotted; }
"""


def agreement(reference: str, text: str) -> list[bool]:
    """For each word of `text`: whether it is part of a run of words that the reference has in the same order."""
    words = text.split()
    agrees = [False] * len(words)
    matcher = SequenceMatcher(None, reference.split(), words, autojunk=False)
    for block in matcher.get_matching_blocks():
        agrees[block.b : block.b + block.size] = [True] * block.size
    return agrees


def write_texts(artifacts: Path, labels: Sequence[str] | Mapping[str, str], out: Path, title: str) -> tuple[Path, Path]:
    """Write `out/texts.md` and `out/texts.html`: for each prompt, a row per label with its text.

    artifacts: folder with `<label>.json` files, lists of {"prompt", "text"} over the same prompts. labels: the first is
    the reference the others are compared with; a mapping gives each its heading. Returns the two paths.
    Raises LowraError when a label's file is missing or is about other prompts.
    """
    if not labels:
        raise LowraError("No texts to show: give at least the reference's label.")
    names = dict(labels) if isinstance(labels, Mapping) else {label: label.replace("_", " ") for label in labels}
    columns = {label: _read(artifacts, label) for label in names}
    first, reference = next(iter(columns.items()))
    prompts = [prompt for prompt, _ in reference]
    for label, column in columns.items():
        if [prompt for prompt, _ in column] != prompts:
            raise LowraError(f"The texts of {label!r} in {artifacts} answer other prompts than those of {first!r}.")
    markdown = [f"# {title}", "", f"**Bold** words agree with the text of *{names[first]}*.", ""]
    page = [f"<h1>{html.escape(title)}</h1>"]
    page.append(f'<p><span class="same">Green</span> words agree with the text of {html.escape(names[first])}, ')
    page.append('<span class="other">red</span> ones do not.</p>')
    for i, (prompt, expected) in enumerate(reference):
        markdown += [f"## {i + 1}. {_escape(prompt)}", "", "| model | text |", "|---|---|"]
        page += [f"<h2>{i + 1}. {html.escape(prompt)}</h2>", "<table>"]
        for label, column in columns.items():
            text = column[i][1]
            agrees = agreement(expected, text)
            markdown.append(f"| {names[label]} | {_markdown(text, agrees)} |")
            page.append(f"<tr><th>{html.escape(names[label])}</th><td>{_html(text, agrees)}</td></tr>")
        markdown.append("")
        page.append("</table>")
    document = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(page) + "\n</body>\n</html>\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    return _write(out / "texts.md", "\n".join(markdown)), _write(out / "texts.html", document)


def _read(artifacts: Path, label: str) -> list[tuple[str, str]]:
    path = artifacts / f"{label}.json"
    if not path.is_file():
        known = sorted(str(p.relative_to(artifacts).with_suffix("")) for p in artifacts.rglob("*.json"))
        raise LowraError(f"There are no texts of {label!r} in {artifacts}; there are: {', '.join(known) or 'none'}.")
    return [(row["prompt"], row["text"]) for row in json.loads(path.read_text(encoding="utf-8"))]


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _escape(text: str) -> str:
    """Text as it is in a Markdown table cell: one line, nothing taken for markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))


def _markdown(text: str, agrees: Sequence[bool]) -> str:
    """The text with runs of agreeing words in bold."""
    runs = groupby(zip(text.split(), agrees, strict=True), key=lambda pair: pair[1])
    joined = ((same, _escape(" ".join(word for word, _ in run))) for same, run in runs)
    return " ".join(f"**{words}**" if same else words for same, words in joined)


def _html(text: str, agrees: Sequence[bool]) -> str:
    """The text with each word marked and its blanks and line breaks kept."""
    marks = iter(agrees)
    pieces = (piece for piece in re.split(r"(\s+)", text.strip()) if piece)
    return "".join(
        piece if piece.isspace() else f'<span class="{"same" if next(marks) else "other"}">{html.escape(piece)}</span>'
        for piece in pieces
    )
