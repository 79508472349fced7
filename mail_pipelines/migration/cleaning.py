"""What PHP programs and old character sets have made of texts and times, undone."""

from __future__ import annotations

import datetime as dt
import html
import ipaddress
import json
import re

_NUMBER = re.compile(rb"[ibd]:([^;]*);")
# A time as programs in Go print it: `2020-01-02 03:04:05.123456 +0000 UTC`.
_GO_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d{1,6})?\d* ([+-]\d{4}) \S+")
_HEAD = re.compile(rb'a:(\d+):\{|s:(\d+):"|[ibd]:[^;]*;|N;')


def text(value: object) -> str:
    """A text with its entities resolved, and read as UTF-8 where somebody once took that for Latin-1."""
    given = html.unescape(str(value)) if value is not None else ""
    return mended(given).strip()


def mended(given: str) -> str:
    """`MÃ¼ller` becomes `Müller`; a text that is not UTF-8 read as Windows-1252 or Latin-1 stays as it is."""
    if given.isascii():
        return given
    try:
        return b"".join(_byte(letter) for letter in given).decode()
    except (UnicodeEncodeError, UnicodeDecodeError):
        return given


def _byte(letter: str) -> bytes:
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        # MySQL's latin1 keeps the five bytes that Windows-1252 leaves out.
        return letter.encode("latin-1")


def choices(value: str) -> str:
    """The texts of a serialised PHP array, joined by commas; any other text is itself."""
    data = value.encode()
    if not re.match(rb"a:\d+:\{", data):
        return text(value)
    found = _php_values(data)
    if found is None:
        # The lengths no longer fit where the character set was changed.
        found = [match.decode() for match in re.findall(rb's:\d+:"(.*?)";', data)]
    return ", ".join(cleaned for cleaned in map(text, found) if cleaned)


def _php_values(data: bytes) -> list[str] | None:
    """The values of a flat array, every second element; None if it is not well-formed."""
    tokens: list[str] = []
    at = 0
    while at < len(data) - 1:
        head = _HEAD.match(data, at)
        if head is None:
            return None
        at = head.end()
        if head[1] is not None:
            if tokens:
                return None
        elif head[2] is not None:
            end = at + int(head[2])
            if data[end : end + 2] != b'";':
                return None
            try:
                tokens.append(data[at:end].decode())
            except UnicodeDecodeError:
                return None
            at = end + 2
        else:
            number = _NUMBER.match(head[0])
            tokens.append(number[1].decode() if number else "")
    return tokens[1::2] if data[at:] == b"}" else None


def unix_time(value: object) -> dt.datetime | None:
    """Seconds since 1970, where 0 stands for never."""
    try:
        return dt.datetime.fromtimestamp(int(str(value)), dt.UTC) if value and int(str(value)) > 0 else None
    except (ValueError, OverflowError, OSError):
        return None


def time(value: object) -> dt.datetime | None:
    """A time of a database or file, in UTC if it names no zone; None for none and for those of no calendar (`0000-00-00`, Go's year 1)."""
    if isinstance(value, str):
        match = _GO_TIME.fullmatch(value.strip())
        try:
            value = dt.datetime.fromisoformat(f"{match[1]}{match[2] or ''}{match[3]}" if match else value.strip())
        except ValueError:
            return None
    if not isinstance(value, dt.datetime) or value.year == 1:
        return None
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def day(value: str, *, month_first: bool = False) -> str:
    """A day as YYYY-MM-DD where it is written DD/MM/YYYY (or MM/DD/YYYY) or YYYY/MM/DD; nothing for a day of zeros, and any other text is itself."""
    cleaned = text(value)
    if not cleaned.strip("0-/ :"):
        return ""
    if match := re.fullmatch(r"(\d{4})/(\d{1,2})/(\d{1,2})", cleaned):
        return f"{match[1]}-{int(match[2]):02}-{int(match[3]):02}"
    if match := re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", cleaned):
        number, month = (match[2], match[1]) if month_first else (match[1], match[2])
        return f"{match[3]}-{int(month):02}-{int(number):02}"
    return cleaned


def ip(value: str) -> str:
    """An IP address; nothing for words in its place (`Unknown IP Address`)."""
    try:
        return str(ipaddress.ip_address(value.strip()))
    except ValueError:
        return ""


def evidence(**facts: object) -> dict[str, str]:
    """What is known of a consent: times as text, and nothing that is empty."""
    found = {name: value.isoformat().replace("+00:00", "Z") if isinstance(value, dt.datetime) else text(value) for name, value in facts.items()}
    return {name: value for name, value in found.items() if value}


def json_text(value: object) -> str:
    """A JSON value as the text of a field: members of an array joined by commas, objects as JSON."""
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, list) and not any(isinstance(member, dict | list) for member in value):
        return ", ".join(filter(None, map(json_text, value)))
    return mended(value).strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
