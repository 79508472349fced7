"""Google's Postmaster Tools and Microsoft's SNDS as local HTTP servers: as strict as they are, with what they do wrong on demand."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from mail_pipelines.config import ReputationSettings
from mail_pipelines.reputation.google import SCOPE
from mail_pipelines.reputation.microsoft_login import CLIENT_ID
from mail_pipelines.reputation.microsoft_login import SCOPE as SNDS_SCOPE
from tests.parts import web
from tests.parts.web import Answer, Asked

METRICS = {"SPAM_RATE", "DELIVERY_ERROR_RATE", "AUTH_SUCCESS_RATE", "TLS_ENCRYPTION_RATE", "FEEDBACK_LOOP_ID", "FEEDBACK_LOOP_SPAM_RATE"}
REFRESH, SECRET = "refresh-that-no-log-shows", "secret-that-no-log-shows"
Provider = TypeVar("Provider", "Google", "Microsoft")


def error(code: int, status: str, message: str, reason: str = "") -> Answer:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}] if reason else []
    return code, {}, json.dumps({"error": {"code": code, "message": message, "status": status, "details": details}}).encode()


@dataclass
class Google:
    """`days`: domain → day → Google's name of a metric (with its filter, if it has one) → value. Days without anything are left out, as Google does.

    A token is good for `token_uses` questions, a page has `page_most` values at most. `before` are answers that are given first, in their order. `gone` are
    metrics that there are no more. A question about a domain of `waits` sets the event, and is not answered.
    """

    days: dict[str, dict[dt.date, dict[str, float]]] = field(default_factory=dict)
    token_uses: int = 1000
    page_most: int = 200
    before: list[Answer] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    refresh: str = REFRESH
    waits: dict[str, threading.Event] = field(default_factory=dict)
    end: threading.Event = field(default_factory=threading.Event)
    service_key: rsa.RSAPrivateKey | None = None
    # Of the service account's claims.
    claims: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    url: str = ""

    def tell(self, domain: str, day: dt.date, spam_rate: float | None = None, **more: float) -> None:
        self.days.setdefault(domain, {})[day] = ({} if spam_rate is None else {"SPAM_RATE": spam_rate}) | more

    def settings(self, **more: Any) -> ReputationSettings:
        credentials = {"type": "authorized_user", "client_id": "c", "client_secret": SECRET, "refresh_token": REFRESH, "token_uri": f"{self.url}/token"}
        return ReputationSettings(google_credentials=json.dumps(credentials), google_url=f"{self.url}/v2", **more)

    def service_account(self) -> ReputationSettings:
        self.service_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        form = serialization.PrivateFormat.PKCS8
        pem = self.service_key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
        account = {"type": "service_account", "client_email": "robot@p.iam", "private_key": pem, "private_key_id": "k1", "token_uri": f"{self.url}/token"}
        return ReputationSettings(google_credentials=json.dumps(account), google_user="ann@shop.test", google_url=f"{self.url}/v2")

    def __call__(self, asked: Asked) -> Answer:
        if asked.method != "POST":
            return error(404, "NOT_FOUND", asked.path)
        if asked.path == "/token":
            return self._token(asked.form)
        if self.before:
            return self.before.pop(0)
        login = asked.headers.get("Authorization")
        number = int(login.removeprefix("Bearer token-")) if login and login.startswith("Bearer token-") else -1
        if not 0 <= number < len(self.tokens) or self.tokens[number] >= self.token_uses:
            return error(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
        self.tokens[number] += 1
        parts = unquote(asked.path).split("/")
        if parts[:3] != ["", "v2", "domains"] or parts[4:] != ["domainStats:query"]:
            return error(404, "NOT_FOUND", "Method not found.")
        return self._query(parts[3], asked.json)

    def _token(self, form: dict[str, str]) -> Answer:
        if form.get("grant_type") == "refresh_token":
            good = (form.get("refresh_token"), form.get("client_secret"), form.get("client_id")) == (self.refresh, SECRET, "c")
        else:
            good = form.get("grant_type") == "urn:ietf:params:oauth:grant-type:jwt-bearer" and self._signed(form["assertion"])
        if not good:
            return 400, {}, b'{"error": "invalid_grant", "error_description": "Token has been expired or revoked."}'
        self.tokens.append(0)
        return 200, {}, json.dumps({"access_token": f"token-{len(self.tokens) - 1}", "expires_in": 3599, "token_type": "Bearer"}).encode()

    def _signed(self, assertion: str) -> bool:
        assert self.service_key is not None
        head, claims, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in assertion.split("."))
        self.service_key.public_key().verify(signature, assertion.rpartition(".")[0].encode(), padding.PKCS1v15(), hashes.SHA256())
        self.claims.append(json.loads(claims))
        return json.loads(head)["alg"] == "RS256" and self.claims[-1]["scope"] == SCOPE

    def _query(self, domain: str, body: dict[str, Any]) -> Answer:
        self.questions.append(body)
        if domain in self.waits:
            self.waits[domain].set()
            self.end.wait(600)
        if domain not in self.days:
            return error(403, "PERMISSION_DENIED", "The caller does not have permission")
        wanted = {}
        for definition in body["metricDefinitions"]:
            standard, chosen = definition["baseMetric"]["standardMetric"], definition.get("filter", "")
            if standard not in METRICS - self.gone or (standard == "AUTH_SUCCESS_RATE") != chosen.startswith("auth_type = "):
                return error(400, "INVALID_ARGUMENT", f"Invalid metric {standard}")
            wanted[definition["name"]] = standard + chosen
        (times,) = body["timeQuery"]["dateRanges"]["dateRanges"]
        first, last = (dt.date(**times[end]) for end in ("start", "end"))
        found = [
            {"name": f"domains/{domain}/domainStats/-", "date": {"year": day.year, "month": day.month, "day": day.day}, "metric": name, "value": value}
            for day, metrics in sorted(self.days[domain].items())
            if first <= day <= last
            for name, key in wanted.items()
            if key in metrics
            for value in [{"floatValue": metrics[key]}]
        ]
        size, start = min(body.get("pageSize", 10), self.page_most), int(body.get("pageToken", 0))
        answer: dict[str, Any] = {"domainStats": found[start : start + size]}
        if start + size < len(found):
            answer["nextPageToken"] = str(start + size)
        return 200, {}, json.dumps(answer).encode()


@dataclass
class Microsoft:
    """`days`: day → the rows of its CSV; of another day it answers 404. A question gets `before` in its place, while there are any.

    A token is good for `token_uses` questions, and each refresh token gives another one. `login` is the file of who has signed in.
    """

    login: Path
    days: dict[dt.date, list[str]] = field(default_factory=dict)
    before: list[Answer] = field(default_factory=list)
    token_uses: int = 1000
    refresh: str = REFRESH
    days_asked: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    url: str = ""
    _challenge: str = ""

    def tell(self, day: dt.date, address: str, *, rate: str = "< 0.1%", result: str = "GREEN", traps: int = 0, recipients: int = 1000) -> None:
        times = f"{day:%-m/%-d/%Y} 1:00 AM,{day:%-m/%-d/%Y} 11:00 PM"
        trapped = f"{day:%-m/%-d/%Y} 2:00 AM,{day:%-m/%-d/%Y} 3:00 AM" if traps else ","
        row = f"{address},{times},{recipients + 3},{recipients + 1},{recipients},{result},{rate},{trapped},{traps},mx1.shop.test,bounce@shop.test,"
        self.days.setdefault(day, []).append(row)

    def settings(self, *, signed_in: bool = True) -> ReputationSettings:
        if signed_in:
            self.login.write_text(self.refresh)
        return ReputationSettings(microsoft_token_file=str(self.login), microsoft_url=f"{self.url}/snds", microsoft_login_url=f"{self.url}/oauth2")

    def browser(self, address: str, code: str = "M.C5_code") -> str:
        """Where the browser of somebody who signs in at this address ends."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        assert address.startswith(f"{self.url}/oauth2/authorize?")
        assert (asked["client_id"], asked["redirect_uri"], asked["response_type"]) == (CLIENT_ID, "http://localhost", "code")
        assert (asked["scope"], asked["code_challenge_method"]) == (SNDS_SCOPE, "S256")
        self._challenge = asked["code_challenge"]
        return f"http://localhost/?code={code}&state={asked['state']}"

    def __call__(self, asked: Asked) -> Answer:
        if (asked.method, asked.path) == ("POST", "/oauth2/token"):
            return self._token(asked.form)
        login = asked.headers.get("Authorization") or ""
        number = int(login.removeprefix("Bearer token-")) if login.startswith("Bearer token-") else -1
        if not 0 <= number < len(self.tokens) or self.tokens[number] >= self.token_uses:
            return 401, {}, b""
        self.tokens[number] += 1
        if asked.method != "GET" or not asked.path.startswith("/snds/api/report/data/"):
            return 404, {}, b""
        self.days_asked.append(asked.path.rpartition("/")[2])
        if self.before:
            return self.before.pop(0)
        rows = self.days.get(dt.date.fromisoformat(self.days_asked[-1]))
        if rows is None:
            return 404, {}, b""
        return 200, {"Content-Type": "application/octet-stream"}, "".join(f"{row}\r\n" for row in rows).encode()

    def _token(self, form: dict[str, str]) -> Answer:
        good = (form["client_id"], form["scope"]) == (CLIENT_ID, SNDS_SCOPE)
        if form["grant_type"] == "refresh_token":
            good &= form["refresh_token"] == self.refresh
        else:
            verified = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
            good &= (form["code"], form["redirect_uri"], verified) == ("M.C5_code", "http://localhost", self._challenge)
        if not good:
            return 400, {}, b'{"error": "invalid_grant", "error_description": "AADSTS70000: The provided value for the input parameter is not valid."}'
        self.tokens.append(0)
        self.refresh = f"{REFRESH}-{len(self.tokens)}"
        given = {"token_type": "Bearer", "expires_in": 3600, "access_token": f"token-{len(self.tokens) - 1}", "refresh_token": self.refresh}
        return 200, {}, json.dumps(given).encode()


@contextmanager
def serving(provider: Provider) -> Iterator[Provider]:
    with web.serving(provider) as provider.url:
        try:
            yield provider
        finally:
            if isinstance(provider, Google):
                provider.end.set()
