"""A sheet that is published as CSV: the link is the secret, and without a login Google answers with a page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.running import Report
from tests.parts.web import Answer, Asked, serving
from tests.sources.conftest import Declare, contacts, subscribed

pytestmark = pytest.mark.slow
MAP = {"Nr": "external_id", "Mail": "email", "Vorname": "first_name"}


@pytest.fixture
def answers() -> dict[str, tuple[str, bytes]]:
    """Type and content of what the link gives, by path; what is not there leads to the login."""
    return {"/pub": ("text/csv", '\ufeffNr,Mail,Vorname\r\n1,ann@example.test,Ann 😀\r\n2,bob@example.test,"Bob, jr"\r\n3,nobody,X\r\n'.encode())}


@pytest.fixture
def sheets(answers: dict[str, tuple[str, bytes]]) -> Iterator[str]:
    def answer(asked: Asked) -> Answer:
        kind, content = answers.get(asked.path, ("text/html; charset=utf-8", b"<html>Sign in</html>"))
        return 200, {"Content-Type": kind}, content

    with serving(answer) as url:
        yield url


def test_a_published_sheet_is_read_and_a_page_of_login_is_no_sheet(
    engine: sa.Engine, declare: Declare, sync: Callable[..., Report], sheets: str, answers: dict[str, tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHEET", f"{sheets}/pub")
    source = declare("sheet", kind="sheet", connection={"url_env": "SHEET"}, contacts={"map": MAP})
    report = sync(source)
    assert report.standing.rejected == {"address: it has no '@'": 1}
    assert contacts(engine) == {"ann@example.test": {"first_name": "Ann 😀"}, "bob@example.test": {"first_name": "Bob, jr"}}
    del answers["/pub"]
    with pytest.raises(SourceError, match="gives a web page, not CSV"):
        sync(source)
    answers["/pub"] = ("text/csv", b"Nr,E-Mail\r\n1,ann@example.test\r\n")
    with pytest.raises(SourceError, match="no column 'Mail' any more"):
        sync(source)
    assert subscribed(engine) == {"ann@example.test", "bob@example.test"}
