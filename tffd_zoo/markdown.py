"""Markdown that GitHub and the Hub render, and that reads well as plain text: tables and lists."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is aligned as plain text too: words to the left, figures to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    numeric = [all(re.match(r"[-+]?[\d.]", row[column]) for row in rows) for column in range(len(header))]
    # A rule needs a dash, and by some renderers three of them, beside the colon that aligns to the right.
    widths = [max(3 + right, *(len(row[column]) for row in cells)) for column, right in enumerate(numeric)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(cells[0]), "| " + " | ".join(rule) + " |", *(line(row) for row in cells[1:])])


def escaped(text: str) -> str:
    """Return `text` so that Markdown and HTML show it as it is, on one line, in a table's cell too."""
    plain = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()
    return re.sub(r"[\\`*\[\]<>|~&$]|_(?!\w)|(?<!\w)_", lambda found: f"\\{found[0]}", plain)


def code(text: str) -> str:
    """Return `text` as code in a line; what would end it there or in a table's cell is left out."""
    return f"`{re.sub(r'[`|]', '', ''.join(c if c.isprintable() else ' ' for c in text))}`"


def bullets(lines: Sequence[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
