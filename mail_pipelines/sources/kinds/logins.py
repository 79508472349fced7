"""How a REST source is logged in to. Secrets come from environment variables and stand nowhere else; a token that has expired is renewed within a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal
from urllib.parse import urljoin

import pydantic
import requests
from requests.auth import AuthBase

from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import LoginError, SourceError

if TYPE_CHECKING:
    from mail_pipelines.sources.kinds.http import PatientSession

# A token is renewed so long before it ends.
_MARGIN_SECONDS = 60.0


class Auth(Form):
    """`bearer` with token_env; `api_key` with token_env, and name and place; `basic` with user_env and token_env.

    `oauth2` with user_env (client id) and token_env (client secret), by client credentials, or by a refresh token in refresh_env. `token_url` may be a path
    of the connection's host, and `name` a header that takes the token, if that is not `Authorization: Bearer`.
    """

    type: Literal["bearer", "api_key", "basic", "oauth2"]
    token_env: EnvironmentName
    user_env: EnvironmentName | None = None
    refresh_env: EnvironmentName | None = None
    name: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    place: Literal["header", "query"] = "header"
    token_url: str | None = None

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> Auth:
        if self.type in ("basic", "oauth2") and not self.user_env:
            raise ValueError("user_env is missing")
        if self.type == "oauth2" and not self.token_url:
            raise ValueError("token_url is missing")
        return self


class Connection(Form):
    """Where a REST source is. `graphql` says that an answer with `errors` has failed, whatever its status."""

    url: str
    headers: dict[str, str] = pydantic.Field(default={})
    auth: Auth | None = None
    graphql: bool = False
    first_wait_seconds: float = pydantic.Field(default=1.0, gt=0, description="wait before a request that failed is made again; doubled each time")


class OAuth2(AuthBase):
    """A token of RFC 6749, taken when the first request needs one and renewed before it ends, or when it is refused (`renew`).

    Raises `LoginError` if it is not given.
    """

    def __init__(self, session: PatientSession, token_url: str, form: Mapping[str, str], header: str | None) -> None:
        self.session, self.token_url, self.form, self.header = session, token_url, form, header
        self._token: str | None = None
        self._until: float | None = None

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is None or (self._until is not None and time.monotonic() >= self._until):
            self._take()
        request.headers[self.header or "Authorization"] = self._token if self.header else f"Bearer {self._token}"
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


def open_session(connection: Connection, secret: Callable[[str], str]) -> PatientSession:
    """A session that is logged in, or will be with its first request. Raises `SourceError` for a secret that is not set."""
    from mail_pipelines.sources.kinds.http import PatientSession

    auth = _login(connection, secret)
    renew = auth.renew if isinstance(auth, OAuth2) else None
    session = PatientSession(first_wait_seconds=connection.first_wait_seconds, graphql=connection.graphql, renew=renew)
    session.auth = auth
    return session


def _login(connection: Connection, secret: Callable[[str], str]) -> AuthBase | None:
    from dlt.sources.helpers.rest_client import auth as ways

    from mail_pipelines.sources.kinds.http import PatientSession

    auth = connection.auth
    if auth is None:
        return None
    token = secret(auth.token_env)
    if auth.type == "bearer":
        return ways.BearerTokenAuth(token)
    if auth.type == "api_key":
        return ways.APIKeyAuth(name=auth.name or "X-API-Key", api_key=token, location=auth.place)
    user = secret(auth.user_env or "")
    if auth.type == "basic":
        return ways.HttpBasicAuth(user, token)
    granted = {"grant_type": "refresh_token", "refresh_token": secret(auth.refresh_env)} if auth.refresh_env else {"grant_type": "client_credentials"}
    url = urljoin(f"{connection.url.rstrip('/')}/", auth.token_url)
    session = PatientSession(first_wait_seconds=connection.first_wait_seconds)
    return OAuth2(session, url, {**granted, "client_id": user, "client_secret": token}, auth.name)
