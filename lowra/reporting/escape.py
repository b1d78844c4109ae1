"""Names, titles, prompts and captions come from users and models: here each becomes text of a format and no more."""

from __future__ import annotations

import html
import re
import unicodedata

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "µ": r"\textmu{}",
    "×": r"$\times$",
} | {c: "\\" + c for c in "&%$#_{}"}


def clean(text: object) -> str:
    """One line that every file format takes: blanks collapsed, control characters and lone surrogates replaced."""
    line = " ".join(str(text).encode("utf-8", "replace").decode("utf-8").split())
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)


def markdown_text(text: object) -> str:
    """Text as it is in a line or table cell of Markdown: nothing is taken for markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", clean(text))


def markdown_caption(text: object) -> str:
    """The same for a sentence of a source's, whose **bold** is meant."""
    return re.sub(r"\\\*\\\*(.+?)\\\*\\\*", r"**\1**", markdown_text(text))


def html_text(text: object) -> str:
    """Text in HTML, in an element or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def html_caption(text: object) -> str:
    """The same for a sentence of a source's, whose **bold** is meant."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html_text(text))


def latex_text(text: object) -> str:
    """Text in LaTeX (pdflatex with utf8 input)."""
    return "".join(_TEX.get(c, c) for c in clean(text))


def plot_text(text: object, width: int = 70) -> str:
    """Text in a figure: cut at `width`, and never a leading underscore, which hides a legend's entry.

    Dollars and backslashes are drawn as they are because the figures' style turns mathtext off.
    """
    line = clean(text)
    line = line if len(line) <= width else line[: width - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def slug(text: object) -> str:
    """A part of a file name: letters, digits, dots, plus and minus signs only."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", clean(text)).strip("-.")[:60] or "x"
