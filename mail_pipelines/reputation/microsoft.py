"""Microsoft's Smart Network Data Services (SNDS): for each address and day what Outlook.com thinks of its mail, as CSV without a head.

It tells of addresses with more than some hundred messages a day, one or two days later. The columns are address, begin and end of the activity, RCPT
commands, DATA commands, message recipients, filter result, complaint rate (a band), begin and end of the trap messages, trap hits, sample HELO, sample MAIL
FROM, comments. The API is of June 2026; the links with a key in them, which there were before, end after a month now.
https://substrate.office.com/ip-domain-management-snds/snds
"""

from __future__ import annotations

import csv
import datetime as dt
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mail_pipelines.config import ReputationSettings
from mail_pipelines.reputation import microsoft_login
from mail_pipelines.reputation.readings import FILTER_RESULTS, MICROSOFT, Fetched, Reading, second_of
from mail_pipelines.sources.errors import LoginError, SourceError
from mail_pipelines.sources.kinds.http import PatientSession

# The samples and comments may be missing; what they quote may have commas of its own.
_LEAST_COLUMNS = 11
_TIMES = ("%m/%d/%Y %I:%M %p", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y")
_BAND = re.compile(r"(?P<sign>[<>]?)\s*(?P<low>\d+(\.\d+)?)\s*%?\s*(-\s*\d+(\.\d+)?\s*)?%")
_SIGN_IN = f"sign in by `{microsoft_login.COMMAND}`"


def read(settings: ReputationSettings, days: Sequence[dt.date], session: PatientSession) -> Fetched:
    """What Microsoft has of these days; of a day without data it knows nothing (404), or not yet. Raises `SourceError` if it cannot be asked."""
    microsoft_login.log_in(settings, session)
    rejected: Counter[str] = Counter()
    found: dict[tuple[str, int], Reading] = {}
    for day in days:
        for reading in _readings(_report(settings, day, session), rejected):
            place = reading.subject, reading.day
            found[place] = _together(found[place], reading) if place in found else reading
    if rejected and not found:
        raise SourceError(f"Microsoft's rows have another form than they had ({rejected.most_common(1)[0][0]}): a newer version of mail-pipelines may know it")
    return Fetched(tuple(found.values()), rejected=rejected)


def _report(settings: ReputationSettings, day: dt.date, session: PatientSession) -> str:
    """The CSV of a day, empty if there is none."""
    try:
        response = session.get(f"{settings.microsoft_url.rstrip('/')}/api/report/data/{day}")
    except LoginError:
        raise SourceError(f"Microsoft gives no token: the sign-in was withdrawn, or not used for 90 days; {_SIGN_IN}") from None
    if response.status_code == 404:
        return ""
    if response.status_code in (401, 403):
        raise SourceError(f"Microsoft refuses the login (status {response.status_code}): {_SIGN_IN} with the account that has access in SNDS")
    if not response.ok:
        raise SourceError(f"Microsoft answers with status {response.status_code}")
    text = response.content.decode("utf-8-sig", "replace")
    if text.lstrip().startswith("<"):
        raise SourceError(f"Microsoft answers with a page and not with CSV: is reputation.microsoft_url right? If it is, {_SIGN_IN}")
    return text


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


def _count(cell: str) -> int | None:
    if not cell:
        return None
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

    def total(*counts: int | None) -> int | None:
        told = [count for count in counts if count is not None]
        return sum(told) if told else None

    messages, trap_hits = total(one.messages, other.messages), total(one.trap_hits, other.trap_hits)
    return replace(worse, spam_rate=max(rates, default=None), messages=messages, trap_hits=trap_hits)
