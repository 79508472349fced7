"""Tokens of OAuth 2.0 (RFC 6749): taken when the first request needs one, and renewed within a run, for some last shorter than reading everything does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import requests
from requests.auth import AuthBase

from mail_pipelines.sources.errors import LoginError, SourceError
from mail_pipelines.sources.kinds.http import PatientSession

# A token is renewed so long before it ends.
_MARGIN_SECONDS = 60.0


def log_in(session: PatientSession, token_url: str, form: Mapping[str, str], *, header: str | None = None, keep: Callable[[str], None] | None = None) -> None:
    """Log a session in as `OAuth2`, which asks for tokens by a session of its own with the same patience."""
    tokens = PatientSession(first_wait_seconds=session.first_wait_seconds, sleep=session.sleep)
    session.auth = auth = OAuth2(tokens, token_url, form, header, keep)
    session.renew = auth.renew


class OAuth2(AuthBase):
    """A token, by client credentials or a refresh token as `form` says; renewed before it ends, or when it is refused (`renew`).

    Where another refresh token comes with it, that one is used from then on (RFC 6749 §6), and given to `keep`. Raises `LoginError` if no token is given.
    """

    def __init__(
        self, session: PatientSession, token_url: str, form: Mapping[str, str], header: str | None = None, keep: Callable[[str], None] | None = None
    ) -> None:
        self.session, self.token_url, self.form, self.header, self.keep = session, token_url, form, header, keep
        self._token: str | None = None
        self._until: float | None = None

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is None or (self._until is not None and time.monotonic() >= self._until):
            self._take()
        request.headers[self.header or "Authorization"] = f"{self._token}" if self.header else f"Bearer {self._token}"
        return request

    def renew(self, request: requests.PreparedRequest) -> None:
        """Put a new token into a request whose token was refused. Raises as the first."""
        self._token = None
        self(request)

    def _take(self) -> None:
        response = self.session.post(self.token_url, data=self.form, allow_redirects=False)
        status = f"status {response.status_code} {response.reason}"
        if response.status_code >= 500 or response.status_code == 429:
            raise SourceError(f"the source gives no token now ({status})")
        try:
            document = response.json()
            self._token, seconds = str(document["access_token"]), document.get("expires_in")
            self._until = None if seconds is None else time.monotonic() + max(0.0, float(seconds) - _MARGIN_SECONDS)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LoginError(f"the source gives no token ({status}): check client id, client secret, and what the app may do") from None
        if "refresh_token" in self.form and isinstance(newest := document.get("refresh_token"), str):
            self.form = {**self.form, "refresh_token": newest}
            if self.keep:
                self.keep(newest)
