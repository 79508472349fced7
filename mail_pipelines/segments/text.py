"""How text is compared in criteria: without regard to case, on one Unicode form."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """`text` as snapshots store it and criteria compare it: case-folded, composed (NFC), unpaired surrogates replaced by `?`.

    Both sides of every comparison are folded, so the query engine only ever compares bytes.
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", text.casefold()).encode("utf-8", "replace").decode()
