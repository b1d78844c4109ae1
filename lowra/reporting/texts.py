"""Side-by-side tables of generated texts, the words that agree with the pre-fine-tuning model's marked (Figs. 2, 17).

Texts are aligned word by word with the reference by `difflib` (longest matching runs first), so words that come back
after a difference agree again; a word is what stands between blanks, punctuation included. Figs. 2 and 17 show agreeing
words in green and others in red: so does the HTML (others also underlined); the Markdown prints agreeing words bold.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path

from lowra.errors import LowraError
from lowra.files import write_text
from lowra.reporting.escape import html_text, markdown_text

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
    columns = {label: read_texts(artifacts, label) for label in names}
    first, reference = next(iter(columns.items()))
    prompts = [prompt for prompt, _ in reference]
    for label, column in columns.items():
        if [prompt for prompt, _ in column] != prompts:
            raise LowraError(f"The texts of {label!r} in {artifacts} answer other prompts than those of {first!r}.")
    markdown = [
        f"# {markdown_text(title)}",
        "",
        f"**Bold** words agree with the text of *{markdown_text(names[first])}*.",
        "",
    ]
    page = [f"<h1>{html_text(title)}</h1>"]
    page.append(f'<p><span class="same">Green</span> words agree with the text of {html_text(names[first])}, ')
    page.append('<span class="other">red</span> ones do not.</p>')
    for i, (prompt, expected) in enumerate(reference):
        markdown += [f"## {i + 1}. {markdown_text(prompt)}", "", "| model | text |", "|---|---|"]
        page += [f"<h2>{i + 1}. {html_text(prompt)}</h2>", "<table>"]
        for label, column in columns.items():
            text = column[i][1]
            agrees = agreement(expected, text)
            markdown.append(f"| {markdown_text(names[label])} | {_markdown(text, agrees)} |")
            page.append(f"<tr><th>{html_text(names[label])}</th><td>{_html(text, agrees)}</td></tr>")
        markdown.append("")
        page.append("</table>")
    document = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html_text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(page) + "\n</body>\n</html>\n"
    )
    return write_text(out / "texts.md", "\n".join(markdown)), write_text(out / "texts.html", document)


def read_texts(artifacts: Path, label: str) -> list[tuple[str, str]]:
    """The prompts and texts of a label; raises LowraError when its file is missing or holds something else."""
    path = artifacts / f"{label}.json"
    if not path.is_file():
        known = sorted(str(p.relative_to(artifacts).with_suffix("")) for p in artifacts.rglob("*.json"))
        raise LowraError(f"There are no texts of {label!r} in {artifacts}; there are: {', '.join(known) or 'none'}.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(_unicode(row["prompt"]), _unicode(row["text"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LowraError(f"{path} holds no list of prompts and texts ({error}); delete it and run again.") from None


def _unicode(text: str) -> str:
    """Text that UTF-8 can hold: a model may generate half a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _markdown(text: str, agrees: Sequence[bool]) -> str:
    """The text with runs of agreeing words in bold."""
    runs = groupby(zip(text.split(), agrees, strict=True), key=lambda pair: pair[1])
    joined = ((same, markdown_text(" ".join(word for word, _ in run))) for same, run in runs)
    return " ".join(f"**{words}**" if same else words for same, words in joined)


def marked_html(reference: str, text: str) -> str:
    """A text in HTML, its words marked (classes `same` and `other`) by whether the reference has them in order."""
    return _html(text, agreement(reference, text))


def _html(text: str, agrees: Sequence[bool]) -> str:
    """The text with each word marked and its blanks and line breaks kept."""
    marks = iter(agrees)
    pieces = (piece for piece in re.split(r"(\s+)", text.strip()) if piece)
    return "".join(
        piece if piece.isspace() else f'<span class="{"same" if next(marks) else "other"}">{html.escape(piece)}</span>'
        for piece in pieces
    )
