"""How a REST source is logged in to. Secrets come from environment variables and stand nowhere else; a token that has expired is renewed within a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal
from urllib.parse import urljoin

import pydantic

from mail_pipelines.sources.declaration import EnvironmentName, Form

if TYPE_CHECKING:
    from mail_pipelines.sources.kinds.http import PatientSession


class Auth(Form):
    """`bearer` with token_env; `api_key` with token_env, and name and place; `basic` with user_env and token_env.

    `oauth2` with user_env (client id) and token_env (client secret), by client credentials, or by a refresh token in refresh_env. `token_url` may be a path
    of the connection's host, and `name` a header that takes the token, if that is not `Authorization: Bearer`.
    """

    type: Literal["bearer", "api_key", "basic", "oauth2"]
    token_env: EnvironmentName
    user_env: EnvironmentName | None = None
    refresh_env: EnvironmentName | None = None
    name: str | None = None
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


def open_session(connection: Connection, secret: Callable[[str], str]) -> PatientSession:
    """A session that is logged in, or will be with its first request. Raises `SourceError` for a secret that is not set."""
    from mail_pipelines.sources.kinds.http import PatientSession

    session = PatientSession(first_wait_seconds=connection.first_wait_seconds, graphql=connection.graphql)
    if connection.auth is not None:
        _log_in(session, connection.url, connection.auth, secret)
    return session


def _log_in(session: PatientSession, url: str, auth: Auth, secret: Callable[[str], str]) -> None:
    from dlt.sources.helpers.rest_client import auth as ways

    from mail_pipelines.sources.kinds import oauth

    token = secret(auth.token_env)
    if auth.type == "bearer":
        session.auth = ways.BearerTokenAuth(token)
    elif auth.type == "api_key":
        session.auth = ways.APIKeyAuth(name=auth.name or "X-API-Key", api_key=token, location=auth.place)
    elif auth.type == "basic":
        session.auth = ways.HttpBasicAuth(secret(auth.user_env or ""), token)
    else:
        granted = {"grant_type": "refresh_token", "refresh_token": secret(auth.refresh_env)} if auth.refresh_env else {"grant_type": "client_credentials"}
        form = {**granted, "client_id": secret(auth.user_env or ""), "client_secret": token}
        oauth.log_in(session, urljoin(f"{url.rstrip('/')}/", auth.token_url), form, header=auth.name)
