"""Frames and pictures as Markdown for asset metadata. Here is only the form: what is shown is decided by the assets."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    import pandas as pd

# Metadata is stored with every materialization: a table shows the first rows and says how many it leaves out.
MOST_ROWS = 50


def table(frame: pd.DataFrame) -> dg.MarkdownMetadataValue:
    """A Markdown table: whole numbers with thousands separators, floats as percentages, times to the minute."""
    from pandas.api.types import is_numeric_dtype

    lines = [_line([name.replace("_", " ") for name in frame.columns])]
    lines.append("|" + "|".join("---:" if is_numeric_dtype(kind) else "---" for kind in frame.dtypes) + "|")
    lines += [_line([_cell(value) for value in row]) for row in frame.head(MOST_ROWS).itertuples(index=False)]
    if len(frame) > MOST_ROWS:
        lines.append(f"\n… and {len(frame) - MOST_ROWS:,} more")
    return dg.MetadataValue.md("\n".join(lines))


def picture(png: bytes, words: str) -> dg.MarkdownMetadataValue:
    """An image inside the Markdown itself: it needs no file that somebody must serve; `words` say what it shows."""
    return dg.MetadataValue.md(f"![{words}](data:image/png;base64,{base64.b64encode(png).decode()})")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if hasattr(value, "strftime"):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, float):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
