"""HTTP with the patience and the limits that a source needs: it waits where it is told to, and no answer is endless."""

from __future__ import annotations

import datetime as dt
import email.utils
import re
import time
from collections.abc import Callable, Collection
from typing import Any

import requests

from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import answers

TIMEOUT_SECONDS = (10, 60)
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0
# A source that wants to be left alone for longer is read in a later run.
MOST_WAIT_SECONDS = 300.0
# One answer: a page of 10,000 wide records has a tenth of it.
MOST_BYTES = 256 * 2**20
MOST_ANSWER_SECONDS = 600.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class PatientSession(requests.Session):
    """Asks again after 429, 5xx and broken connections, as the answer's Retry-After says; reads every answer whole, up to a limit.

    Where a token is refused (401), `renew` puts a new one into the request, once each time.
    """

    def __init__(
        self,
        *,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
        most_bytes: int = MOST_BYTES,
        graphql: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__()
        self.first_wait_seconds = first_wait_seconds
        self.most_bytes = most_bytes
        self.graphql = graphql
        self.renew: Callable[[requests.PreparedRequest], None] | None = None
        self.sleep = sleep

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """The answer, of whatever status. Raises `SourceError` if there is none, or none that ends."""
        options["timeout"] = TIMEOUT_SECONDS
        # dlt's paginators look at bodies after hooks, which run within `send`: the body has to be there before.
        options["stream"] = True
        hooks, request.hooks = request.hooks, {"response": []}
        try:
            response = self._send_patiently(request, options)
            if response.status_code == 401 and self.renew:
                self.renew(request)
                response = self._send_patiently(request, options)
        finally:
            request.hooks = hooks
        return requests.hooks.dispatch_hook("response", hooks, response, **options) or response

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Before a redirect is followed: with a login only on the same host. `requests` itself keeps no more than `Authorization` back."""
        if self.auth is not None and self.should_strip_auth(response.request.url or "", prepared_request.url or ""):
            raise SourceError("the source sends us to another host, where its login must not go: give that host's address in connection.url")
        super().rebuild_auth(prepared_request, response)

    def _send_patiently(self, request: requests.PreparedRequest, options: dict[str, Any]) -> requests.Response:
        for attempt in range(1, ATTEMPTS + 1):
            wait = self.first_wait_seconds * 2 ** (attempt - 1)
            try:
                response = super().send(request, **options)
                self._read(response)
                answers.as_http(response, graphql=self.graphql)
            except requests.RequestException as error:
                if attempt == ATTEMPTS:
                    raise SourceError(
                        f"the source does not answer ({type(error).__name__}), {ATTEMPTS} times in a row: check its address and the network"
                    ) from None
            else:
                if response.status_code not in _AGAIN or attempt == ATTEMPTS:
                    return response
                wait = retry_after(response.headers.get("retry-after"), dt.datetime.now(dt.UTC)) or wait
                if wait > MOST_WAIT_SECONDS:
                    raise SourceError(f"the source asks to be left alone for {wait:.0f} s (status {response.status_code}): it is read in a later run")
            self.sleep(wait)
        raise AssertionError("unreachable")

    def _read(self, response: requests.Response) -> None:
        begin, size, pieces = time.monotonic(), 0, []
        for piece in response.iter_content(2**16):
            size += len(piece)
            if size > self.most_bytes or time.monotonic() - begin > MOST_ANSWER_SECONDS:
                response.close()
                raise SourceError(f"an answer of the source does not end ({size:,} bytes so far): ask for smaller pages")
            pieces.append(piece)
        response._content = b"".join(pieces)
        response._content_consumed = True


def retry_after(header: str | None, now: dt.datetime) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110 §10.2.3); None if it is absent or not understood."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(header) - now).total_seconds())
    except (ValueError, TypeError):
        return None


def check_status(response: requests.Response, *_: Any, columns: Collection[str] = (), **__: Any) -> None:
    """Raise `SourceError` for an answer that is none, without its address: it may hold a key. Of its words only those are shown that are wanted columns."""
    status = response.status_code
    if status in (401, 403):
        raise SourceError(
            f"the source refuses the login (status {status} {response.reason}): the token is wrong or has expired; put a new one into its environment variable"
        )
    if status >= 400:
        # All columns are named where the whole query is quoted, so only a quoted one tells anything.
        named = [column for column in columns if re.search(rf"['\"]{re.escape(column.rpartition('.')[2])}['\"]", response.text)]
        about = f", about {', '.join(named)}" if named else ""
        raise SourceError(f"the source answers with status {status} ({response.reason}{about}), {ATTEMPTS} times in a row if it is one that passes")
