"""The document as a test reads it: chapters, with blocks of commands and of what is printed, in their order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/runbook.md"
COMMANDS, PRINTED = "sh runbook", "text printed"


@dataclass(frozen=True)
class Block:
    kind: str
    lines: tuple[str, ...]


def chapters() -> dict[str, list[Block]]:
    """The blocks of each chapter, by its heading."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
        found[heading] = [Block(kind, tuple(lines.splitlines())) for kind, lines in blocks]
    return found


def filled(line: str, names: dict[str, str]) -> str:
    """A line with names in place of the words in capitals."""
    for word, name in names.items():
        line = re.sub(rf"\b{word}\b", name, line)
    return line


def is_printed(line: str, output: str) -> bool:
    """Whether a line is in what was printed; `…` stands for anything on it, and tables have frames and any number of spaces."""
    pattern = "[^\n]*".join(re.escape(part.strip()).replace(r"\ ", r"\s+") for part in line.split("…"))
    return re.search(pattern, re.sub(r"[ │┃]+", " ", output)) is not None
