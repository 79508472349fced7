"""Google's Postmaster Tools API v2: for each day of a domain, how much of its mail people reported as spam, was refused, and was authenticated.

Version 1 was shut down at the end of 2025, and with it went the reputations of domains and addresses. Google tells of a day one or two days later, by its own
calendar (Pacific time), of none with little mail, and corrects it afterwards.
https://developers.google.com/workspace/gmail/postmaster/reference/rest/v2
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from mail_pipelines.config import ReputationSettings
from mail_pipelines.reputation.readings import GOOGLE, Fetched, Reading, second_of
from mail_pipelines.sources.errors import LoginError, SourceError
from mail_pipelines.sources.kinds import oauth
from mail_pipelines.sources.kinds.http import PatientSession

SCOPE = "https://www.googleapis.com/auth/postmaster.traffic.readonly"
TOKEN_URL = "https://oauth2.googleapis.com/token"
MOST_PAGES = 50
_PAGE_SIZE = 200
_SPAM_RATE, _DELIVERY_ERRORS = "spam_rate", "delivery_errors"
# Our name of each statistic: Google's, and its filter.
_METRICS: dict[str, tuple[str, str]] = {
    _SPAM_RATE: ("SPAM_RATE", ""),
    _DELIVERY_ERRORS: ("DELIVERY_ERROR_RATE", ""),
    **{f"{kind}_success": ("AUTH_SUCCESS_RATE", f'auth_type = "{kind}"') for kind in ("spf", "dkim", "dmarc")},
}
# What credentials of each type need to have.
_NEEDED = {"authorized_user": ("client_id", "client_secret", "refresh_token"), "service_account": ("client_email", "private_key")}
# Reasons of a 403 that tell of the credentials; any other one tells of the domain.
_OF_THE_LOGIN = frozenset({"ACCESS_TOKEN_SCOPE_INSUFFICIENT", "SERVICE_DISABLED", "CONSUMER_INVALID", "USER_PROJECT_DENIED", "BILLING_DISABLED"})


class _DomainRefused(Exception):
    """Google tells this login nothing of the domain."""


class _Unknown(Exception):
    """Google does not know a statistic that is asked for."""


def read(settings: ReputationSettings, domains: Collection[str], first: dt.date, last: dt.date, session: PatientSession) -> Fetched:
    """What Google has of these domains from `first` to `last`. Raises `SourceError` if it cannot be asked, or tells of none of them."""
    readings: list[Reading] = []
    refused: dict[str, str] = {}
    rejected: Counter[str] = Counter()
    api = _Api(settings, session)
    for domain in sorted(domains):
        try:
            readings += _readings(domain, api.statistics(domain, first, last), rejected)
        except _DomainRefused as error:
            refused[domain] = str(error)
    if refused and len(refused) == len(domains):
        words = next(iter(refused.values()))
        raise SourceError(f"Google tells this login nothing of any sending domain ({', '.join(refused)}: {words}): add them in Postmaster Tools, as its user")
    return Fetched(tuple(readings), refused, rejected)


def _readings(domain: str, statistics: Iterator[Mapping[str, Any]], rejected: Counter[str]) -> Iterator[Reading]:
    by_day: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for one in statistics:
        try:
            day = second_of(dt.date(**{part: int(one["date"][part]) for part in ("year", "month", "day")}))
            value = next(float(one["value"][kind]) for kind in ("floatValue", "doubleValue", "intValue") if kind in one["value"])
        except (KeyError, TypeError, ValueError, StopIteration):
            rejected["no date or value"] += 1
            continue
        if one.get("metric") not in _METRICS or not 0 <= value <= 1:
            rejected["an unknown statistic, or not a part of 1"] += 1
            continue
        by_day[day][one["metric"]] = value
    for day, found in by_day.items():
        details = {name: value for name, value in found.items() if name not in (_SPAM_RATE, _DELIVERY_ERRORS)}
        yield Reading(GOOGLE, domain, day, found.get(_SPAM_RATE), found.get(_DELIVERY_ERRORS), details=details)


class _Api:
    """The API as one login sees it."""

    def __init__(self, settings: ReputationSettings, session: PatientSession) -> None:
        credentials = _credentials(settings.google_credentials or "")
        url = credentials.get("token_uri") or TOKEN_URL
        oauth.log_in(session, url, _form(credentials, settings.google_user, url))
        self._url = settings.google_url.rstrip("/")
        self._session = session
        self._headers = {"X-Goog-User-Project": project} if (project := credentials.get("quota_project_id")) else {}

    def statistics(self, domain: str, first: dt.date, last: dt.date) -> Iterator[Mapping[str, Any]]:
        """All statistics of a domain; if Google does not know one of them any more, the spam rates alone."""
        try:
            found = list(self._query(domain, first, last, list(_METRICS)))
        except _Unknown:
            try:
                found = list(self._query(domain, first, last, [_SPAM_RATE]))
            except _Unknown as error:
                raise SourceError(f"Google does not understand the question any more ({error}): a newer version of mail-pipelines may") from None
        yield from found

    def _query(self, domain: str, first: dt.date, last: dt.date, metrics: Collection[str]) -> Iterator[Mapping[str, Any]]:
        definitions = []
        for name in metrics:
            standard, chosen = _METRICS[name]
            definitions.append({"name": name, "baseMetric": {"standardMetric": standard}} | ({"filter": chosen} if chosen else {}))
        body: dict[str, Any] = {
            "metricDefinitions": definitions,
            "timeQuery": {"dateRanges": {"dateRanges": [{"start": _date(first), "end": _date(last)}]}},
            "aggregationGranularity": "DAILY",
            "pageSize": _PAGE_SIZE,
        }
        for _ in range(MOST_PAGES):
            answer = self._post(f"domains/{quote(domain)}/domainStats:query", body)
            yield from answer.get("domainStats", ())
            if not answer.get("nextPageToken"):
                return
            body["pageToken"] = answer["nextPageToken"]
        raise SourceError(f"Google's answer about {domain} does not end after {MOST_PAGES} pages")

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            response = self._session.post(f"{self._url}/{path}", json=body, headers=self._headers)
        except LoginError as error:
            raise SourceError(f"Google refuses the login ({error}); docs/reputation.md says how to make new credentials") from None
        if response.ok:
            return _document(response.content)
        words, reasons = _error(response.content)
        if response.status_code == 400:
            raise _Unknown(words)
        if response.status_code == 404 or (response.status_code == 403 and not reasons & _OF_THE_LOGIN):
            raise _DomainRefused(words)
        if response.status_code in (401, 403):
            raise SourceError(f"Google refuses the login ({words}): make new credentials with the scope {SCOPE}, and enable the API in their project")
        raise SourceError(f"Google answers with status {response.status_code} ({words})")


def _date(day: dt.date) -> dict[str, int]:
    return {"year": day.year, "month": day.month, "day": day.day}


def _document(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise SourceError("Google's answer is not a JSON object: is reputation.google_url right?")
    return document


def _error(content: bytes) -> tuple[str, set[str]]:
    """What Google says in an error, and the reasons in its details."""
    try:
        error = json.loads(content)["error"]
        reasons = {detail["reason"] for detail in error.get("details", ()) if "reason" in detail}
        return f"{error.get('status', '')} {error.get('message', '')}".strip()[:300], reasons
    except (ValueError, KeyError, TypeError, AttributeError):
        return "without words", set()


# --- login --------------------------------------------------------------------------------------------------------


def _credentials(text: str) -> dict[str, str]:
    """The JSON that Google's tools write. Raises `SourceError`, which does not repeat it."""
    try:
        document: dict[str, str] = json.loads(text)
        understood = all(isinstance(document[name], str) for name in _NEEDED[document["type"]])
    except (ValueError, KeyError, TypeError):
        understood = False
    if not understood:
        kinds = " or ".join(f"{kind} ({', '.join(names)})" for kind, names in _NEEDED.items())
        raise SourceError(f"reputation.google_credentials is no JSON of the type {kinds}: docs/reputation.md says how to get one")
    return document


def _form(credentials: Mapping[str, str], user: str, url: str) -> dict[str, str]:
    """What is sent to get a token, which holds for an hour."""
    if credentials["type"] == "authorized_user":
        return {"grant_type": "refresh_token"} | {name: credentials[name] for name in ("client_id", "client_secret", "refresh_token")}
    return {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": _assertion(credentials, user, url)}


def _assertion(credentials: Mapping[str, str], user: str, audience: str) -> str:
    """What a service account signs to get a token (RFC 7523)."""
    try:
        key = serialization.load_pem_private_key(credentials["private_key"].encode(), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise SourceError("private_key in reputation.google_credentials is no RSA key in PEM: take the file as Google made it")
    now = int(time.time())
    head = {"alg": "RS256", "typ": "JWT"} | ({"kid": credentials["private_key_id"]} if "private_key_id" in credentials else {})
    claims = {"iss": credentials["client_email"], "scope": SCOPE, "aud": audience, "iat": now, "exp": now + 3600} | ({"sub": user} if user else {})
    signed = f"{_base64(json.dumps(head).encode())}.{_base64(json.dumps(claims).encode())}"
    return f"{signed}.{_base64(key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
