"""REST APIs: pages of JSON, by the paginators and logins of dlt's `rest_api`.

`paging` is one of dlt's paginators with its arguments (`{type: cursor, cursor_path: …, cursor_param: …}`, `offset`, `page_number`, `header_link`,
`json_link`, `single_page`), found by looking at the first answer if it is not given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pydantic

from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted


class Auth(Form):
    """`bearer` with token_env; `api_key` with token_env, and name and place; `basic` with user_env and token_env; `oauth2` by client credentials."""

    type: Literal["bearer", "api_key", "basic", "oauth2"]
    token_env: EnvironmentName
    user_env: EnvironmentName | None = None
    name: str = "X-API-Key"
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
    url: str
    headers: dict[str, str] = pydantic.Field(default={})
    auth: Auth | None = None
    first_wait_seconds: float = pydantic.Field(default=1.0, gt=0, description="wait before a request that failed is made again; doubled each time")


class Read(Form):
    """`records` is the JSON path to the list. `since_param` is the parameter that takes the cursor."""

    path: str
    method: Literal["GET", "POST"] = "GET"
    params: dict[str, str | int | bool] = pydantic.Field(default={})
    body: dict[str, Any] | None = None
    records: str | None = None
    paging: dict[str, Any] | None = None
    since_param: str | None = None
    max_pages: int = pydantic.Field(default=1_000_000, ge=1)


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    from dlt.sources.helpers.rest_client.client import RESTClient
    from dlt.sources.rest_api.config_setup import create_paginator

    from mail_pipelines.sources.kinds.http import PatientSession, check_status

    try:
        paginator = create_paginator(read.paging)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise SourceError(f"read.paging: {str(error).splitlines()[0]}") from None
    session = PatientSession(first_wait_seconds=connection.first_wait_seconds)
    client = RESTClient(connection.url, headers=dict(connection.headers), auth=login(connection.auth, wanted.secret), paginator=paginator, session=session)
    params = {**read.params, **({read.since_param: wanted.since} if read.since_param and wanted.since else {})}
    seen = b""
    pages = client.paginate(read.path, method=read.method, params=params, json=read.body, data_selector=read.records, hooks={"response": [check_status]})
    for number, page in enumerate(pages, 1):
        digest = hashlib.blake2b(page.response.content, digest_size=16).digest()
        if page and digest == seen:
            raise SourceError(f"page {number} is the same as the one before it: the paging does not advance (check read.paging)")
        if number > read.max_pages:
            raise SourceError(f"the source has more than {read.max_pages:,} pages: its paging does not end, or read.max_pages is too small")
        seen = digest
        records = list(page)
        if wrong := next((record for record in records if not isinstance(record, dict)), None):
            raise SourceError(f"page {number} is no list of records but of {type(wrong).__name__}: check read.records")
        yield records


def login(auth: Auth | None, secret: Callable[[str], str]) -> Any:
    """An `AuthBase` of requests; None for none."""
    from dlt.sources.helpers.rest_client import auth as ways

    if auth is None:
        return None
    token = secret(auth.token_env)
    if auth.type == "bearer":
        return ways.BearerTokenAuth(token)
    if auth.type == "api_key":
        return ways.APIKeyAuth(name=auth.name, api_key=token, location=auth.place)
    user = secret(auth.user_env or "")
    if auth.type == "basic":
        return ways.HttpBasicAuth(user, token)
    return ways.OAuth2ClientCredentials(access_token_url=auth.token_url or "", client_id=user, client_secret=token)
