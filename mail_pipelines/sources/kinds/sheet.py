"""A link that gives CSV, as Google Sheets publishes one (File, Share, Publish to web, CSV)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted, files


class Connection(Form):
    """The link, or the variable that has it: who knows such a link can read the sheet."""

    url: str | None = None
    url_env: EnvironmentName | None = None


class Read(Form):
    delimiter: str | None = None


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    from mail_pipelines.sources.kinds.http import PatientSession, check_status

    url = connection.url or (wanted.secret(connection.url_env) if connection.url_env else None)
    if not url:
        raise SourceError("connection.url or connection.url_env: one of them is needed")
    response = PatientSession().get(url)
    check_status(response)
    if response.headers.get("content-type", "").startswith("text/html"):
        raise SourceError("the link gives a web page, not CSV: publish the sheet as CSV, so that it can be read without a login")
    yield from files.pages(io.BytesIO(response.content), "the sheet", "csv", read.delimiter)
