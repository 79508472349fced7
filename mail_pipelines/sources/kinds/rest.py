"""REST APIs: pages of JSON, by the paginators and logins of dlt's `rest_api`.

`paging` is one of dlt's paginators with its arguments (`{type: cursor, cursor_path: …, cursor_param: …}`, `offset`, `page_number`, `header_link`,
`json_link`, `single_page`), found by looking at the first answer if it is not given; or `{type: keyset, column: id, start: "0"}`: the last record's value is
asked for again as `{after}`, until a page is empty. What may stand in braces in a request is in `asking`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from mail_pipelines.sources.declaration import Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted, asking
from mail_pipelines.sources.kinds.logins import Connection, open_session


class Keyset(Form):
    type: Literal["keyset"]
    column: str
    start: str = "0"


class Read(Form):
    """`records` is the JSON path to the list. `since_param` is the parameter that takes the cursor, where no place in braces does.

    `columns_under` leaves of the columns that are asked for only those nested in that one.
    """

    path: str
    method: Literal["GET", "POST"] = "GET"
    params: dict[str, str | int | bool] = pydantic.Field(default={})
    body: dict[str, Any] | None = None
    records: str | None = None
    paging: dict[str, Any] | None = None
    since_param: str | None = None
    columns_under: str | None = None
    max_pages: int = pydantic.Field(default=1_000_000, ge=1)

    @property
    def keyset(self) -> Keyset | None:
        return Keyset.model_validate(self.paging) if self.paging and self.paging.get("type") == "keyset" else None

    @pydantic.model_validator(mode="after")
    def _knows_where_it_is(self) -> Read:
        if self.keyset and "{after}" not in str((self.params, self.body)):
            raise ValueError("paging: keyset needs {after} in params or body, where the value of the last record goes")
        return self


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    from dlt.sources.helpers.rest_client.client import RESTClient

    from mail_pipelines.sources.kinds.http import check_status

    given = asking.values(wanted.columns, read.columns_under, wanted.since)
    if read.keyset:
        given["after"] = read.keyset.start
    client = RESTClient(connection.url, headers=dict(connection.headers), paginator=_paginator(read, given), session=open_session(connection, wanted.secret))
    params, body = asking.filled(read.params, given), asking.filled(read.body, given)
    if read.since_param and wanted.since:
        params[read.since_param] = wanted.since
    checked = functools.partial(check_status, columns=wanted.columns)
    pages = client.paginate(read.path, method=read.method, params=params, json=body, data_selector=read.records, hooks={"response": [checked]})
    seen = b""
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


def _paginator(read: Read, given: dict[str, Any]) -> Any:
    from dlt.sources.rest_api.config_setup import create_paginator

    if read.keyset:
        return _by_keyset(read, read.keyset, given)
    try:
        return create_paginator(read.paging)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise SourceError(f"read.paging: {str(error).splitlines()[0]}") from None


def _by_keyset(read: Read, keyset: Keyset, given: dict[str, Any]) -> Any:
    from dlt.sources.helpers.rest_client.paginators import BasePaginator

    class KeysetPaginator(BasePaginator):
        def __init__(self) -> None:
            super().__init__()
            self._after = keyset.start

        def update_state(self, response: Any, data: list[Any] | None = None) -> None:
            self._has_next_page = bool(data)
            if data:
                last = data[-1]
                self._after = asking.after(last.get(keyset.column) if isinstance(last, dict) else None)

        def update_request(self, request: Any) -> None:
            request.params, request.json = (asking.filled(part, {**given, "after": self._after}) for part in (read.params, read.body))

    return KeysetPaginator()
