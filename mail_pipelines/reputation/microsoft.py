"""Microsoft's Smart Network Data Services (SNDS), Automated Data Access: for each address and day what Outlook.com thinks of its mail, as CSV without a head.

It tells of addresses with more than some hundred messages a day, one day later. The columns are address, begin and end of the activity, RCPT commands, DATA
commands, message recipients, filter result, complaint rate (a band), begin and end of the trap messages, trap hits, sample HELO, sample MAIL FROM, comments.
https://sendersupport.olc.protection.outlook.com/snds/FAQ.aspx
"""

from __future__ import annotations

import csv
import datetime as dt
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from mail_pipelines.reputation.readings import FILTER_RESULTS, MICROSOFT, Fetched, Reading, second_of
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds.http import PatientSession

# The samples and comments may be missing; what they quote may have commas of its own.
_LEAST_COLUMNS = 11
_TIMES = ("%m/%d/%Y %I:%M %p", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y")
_BAND = re.compile(r"(?P<sign>[<>]?)\s*(?P<low>\d+(\.\d+)?)\s*%?\s*(-\s*\d+(\.\d+)?\s*)?%")


def read(link: str, days: Sequence[dt.date], session: PatientSession) -> Fetched:
    """What Microsoft has of these days. Raises `SourceError` if it cannot be asked, without the link: the key is in it."""
    rejected: Counter[str] = Counter()
    found: dict[tuple[str, int], Reading] = {}
    missing = 0
    for day in days:
        response = session.get(_of_day(link, day))
        if response.status_code == 404:
            missing += 1
            continue
        if not response.ok:
            raise SourceError(
                f"Microsoft answers with status {response.status_code}: the key in reputation.microsoft_link is wrong or was withdrawn; "
                "the page Automated Data Access of SNDS has the link that is right"
            )
        text = response.content.decode("utf-8-sig", "replace")
        if text.lstrip().startswith("<"):
            raise SourceError("Microsoft answers with a page and not with CSV: reputation.microsoft_link is not the link of Automated Data Access")
        for reading in _readings(text, rejected):
            place = reading.subject, reading.day
            found[place] = _together(found[place], reading) if place in found else reading
    if missing == len(days):
        raise SourceError("Microsoft answers with status 404 for each day: reputation.microsoft_link is not the link of Automated Data Access")
    if rejected and not found:
        raise SourceError(f"Microsoft's rows have another form than they had ({rejected.most_common(1)[0][0]}): a newer version of mail-pipelines may know it")
    return Fetched(tuple(found.values()), rejected=rejected)


def _of_day(link: str, day: dt.date) -> str:
    parts = urlsplit(link)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "date"]
    return urlunsplit(parts._replace(query=urlencode([*query, ("date", f"{day:%m%d%y}")])))


def _readings(text: str, rejected: Counter[str]) -> Iterator[Reading]:
    for row in csv.reader(text.splitlines()):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        try:
            yield _reading(cells)
        except ValueError as error:
            rejected[str(error)] += 1


def _reading(cells: Sequence[str]) -> Reading:
    """Raises `ValueError`, which says what is wrong without quoting."""
    if len(cells) < _LEAST_COLUMNS:
        raise ValueError(f"{len(cells)} columns, expected {_LEAST_COLUMNS} at least")
    try:
        address = str(ipaddress.ip_address(cells[0]))
    except ValueError:
        raise ValueError("no address in the first column") from None
    if cells[6].upper() not in FILTER_RESULTS:
        raise ValueError("an unknown filter result")
    day = second_of(_time(cells[1]).date())
    rate, band = _complaint_rate(cells[7]), {"complaint_rate": cells[7]} if cells[7] else {}
    comments = {"comments": cells[13][:200]} if len(cells) > 13 and cells[13] else {}
    return Reading(MICROSOFT, address, day, rate, None, _count(cells[5]), cells[6].upper(), _count(cells[10]), band | comments)


def _time(cell: str) -> dt.datetime:
    for form in _TIMES:
        try:
            return dt.datetime.strptime(cell, form)
        except ValueError:
            continue
    raise ValueError("no time in the second column")


def _count(cell: str) -> int:
    if not cell:
        return 0
    if not cell.isascii() or not cell.isdigit():
        raise ValueError("a count that is no number")
    return int(cell)


def _complaint_rate(cell: str) -> float | None:
    """The least that a band means: `< 0.1%` is 0, `0.3%`, `> 0.3%` and `0.3 - 0.5%` are 0.003. None if it is empty."""
    if not cell or cell.upper() in ("-", "N/A"):
        return None
    if not (match := _BAND.fullmatch(cell)):
        raise ValueError("an unknown complaint rate")
    return 0.0 if match["sign"] == "<" else round(float(match["low"]) / 100, 9)


def _together(one: Reading, other: Reading) -> Reading:
    """Two rows of an address and day, of several periods of activity: the sums, and the worse of the rest."""
    worse = max(one, other, key=lambda reading: (reading.measure("filter_result") or 0, reading.spam_rate or 0.0))
    rates = [rate for rate in (one.spam_rate, other.spam_rate) if rate is not None]
    messages, trap_hits = (sum(getattr(reading, name) or 0 for reading in (one, other)) for name in ("messages", "trap_hits"))
    return replace(worse, spam_rate=max(rates, default=None), messages=messages, trap_hits=trap_hits)
