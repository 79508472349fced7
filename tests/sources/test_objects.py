"""Files in a store that speaks S3, over HTTP and with signatures that are checked: logins, pages, ranges, and what goes wrong between and in them."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.sources import kinds, landing, status
from mail_pipelines.sources.errors import DeclarationError, LoginError, SourceError
from mail_pipelines.sources.kinds import s3
from mail_pipelines.sources.running import Report
from tests.parts.web import Answer, Asked, serving
from tests.sources.conftest import Declare, contacts
from tests.sources.s3 import ACCESS_KEY, INTERNAL_ERROR, S3, SECRET_KEY, SLOW_DOWN, TOKEN, half, signature

pytestmark = pytest.mark.slow
SECRETS = {"access_key": "SHOP_KEY", "secret_key": "SHOP_SECRET"}
WIDE = b"x" * 1000
RANGE_BYTES = 2**16


def csv(*numbers: int, filler: bytes = b"") -> bytes:
    return b"id,mail,filler\n" + b"".join(b"%d,p%d@example.test,%s\n" % (number, number, filler) for number in numbers)


# More than one range, and not a whole number of them.
LARGE = csv(*range(200), filler=WIDE)


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHOP_KEY": ACCESS_KEY, "SHOP_SECRET": SECRET_KEY, "SHOP_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def served() -> Iterator[Callable[[S3], str]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda store: stack.enter_context(serving(store))


@pytest.fixture
def read(served: Callable[[S3], str]) -> Callable[..., list[int]]:
    """The ids that a source in the store gives."""

    def given(store: S3, glob: str = "*", *, url: str = "s3://exports/shop", secrets: dict[str, str] = SECRETS, **options: Any) -> list[int]:
        options = {"endpoint": served(store), **options}
        pages = kinds.rows("files", {"url": url, "options": options, "secrets": secrets}, {"glob": glob}, kinds.Wanted(("id",), None, None, kinds.secret))
        records = (record for page in pages for record in (page.to_pylist() if isinstance(page, pa.Table) else page))
        return [int(record["id"]) for record in records]

    return given


Read = Callable[..., list[int]]


def test_the_signature_is_that_of_amazons_own_example() -> None:
    """The first example of "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)"."""
    names = "host;range;x-amz-content-sha256;x-amz-date"
    headers = {
        "Host": "examplebucket.s3.amazonaws.com",
        "Authorization": f"AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders={names}, Signature={'0' * 64}",
        "Range": "bytes=0-9",
        "x-amz-content-sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "x-amz-date": "20130524T000000Z",
    }
    asked = Asked("GET", "/test.txt", {}, headers, b"", "/test.txt")
    assert signature(asked, "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY") == "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"


def test_a_store_of_objects_is_a_source_and_what_was_merged_outlives_its_troubles(
    engine: sa.Engine, declare: Declare, sync: Callable[..., Report], served: Callable[[S3], str]
) -> None:
    store = S3({"shop/2026/a.csv": csv(1, 2), "shop/2026/b.csv.gz": gzip.compress(csv(3)), "shop/2026/": b"", "hr/2026/people.csv": csv(9)}, page=1)
    source = declare(
        kind="files",
        connection={"url": "s3://exports/shop", "options": {"endpoint": served(store)}, "secrets": SECRETS},
        contacts={"read": {"glob": "*/*.csv*"}, "map": {"id": "external_id", "mail": "email"}},
    )
    assert landing.check(source, source.contacts).usable == 2  # type: ignore[arg-type]
    assert sync(source).standing.counts["inserted"] == 3
    store.secret_key = "another one"
    with pytest.raises(LoginError, match=r"the secret key is not that of the access key; put it into the environment variable"):
        sync(source)
    assert "SIGNATURE_DOES_NOT_MATCH" in (status.read(engine, "crm", "contacts").error or "")
    assert set(contacts(engine)) == {"p1@example.test", "p2@example.test", "p3@example.test"}


def test_a_listing_of_many_pages_is_read_to_its_end_whatever_a_key_is_called(read: Read) -> None:
    keys = {f"shop/{number:03}.csv": csv(number) for number in range(7)} | {"shop/2026/a b#?ü+&%20.csv": csv(7), "shop/x.txt": b"-", "other/8.csv": csv(8)}
    store = S3(keys, page=2)
    assert read(store, "*.csv") == list(range(7))
    assert store.listings() == 5
    assert sorted(read(store, "**/*.csv")) == list(range(8))
    assert read(store, "004.csv") == [4]
    assert sorted(read(store, "*/*.csv", url="s3://exports")) == [*range(7), 8]
    with pytest.raises(SourceError, match="no file fits '9"):
        read(store, "9*.csv")


@pytest.mark.parametrize(
    ("store", "given"),
    [
        ({"region": "fsn1"}, {"region": "fsn1"}),
        ({"token": TOKEN}, {"secrets": {**SECRETS, "session_token": "SHOP_TOKEN"}}),
        ({"public": True, "secret_key": "another one"}, {"secrets": {}, "anonymous": True}),
    ],
    ids=["region", "session", "public"],
)
def test_a_login_is_as_the_store_wants_it(read: Read, store: dict[str, Any], given: dict[str, Any]) -> None:
    assert read(S3({"shop/a.csv": csv(1)}, **store), **given) == [1]


def test_a_login_may_be_where_amazons_own_tools_have_it(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert read(S3({"shop/a.csv": csv(1)}), secrets={}) == [1]


def test_the_bucket_may_stand_in_the_hosts_name(served: Callable[[S3], str]) -> None:
    store = S3({"shop/a.csv": csv(1)}, bucket="127", virtual=True)
    # The host is then 127.0.0.1 without a name server.
    endpoint = served(store).replace("127.0.0.1", "0.0.1")
    connection = {"url": "s3://127/shop", "options": {"endpoint": endpoint, "path_style": False}, "secrets": SECRETS}
    (page,) = kinds.rows("files", connection, {"glob": "*"}, kinds.Wanted(("id",), None, None, kinds.secret))
    assert page[0]["id"] == "1"
    assert {asked.path for asked in store.asked} == {"/", "/shop/a.csv"}


@pytest.mark.parametrize(
    ("store", "given", "error"),
    [
        ({"access_key": "another"}, {}, "does not know the access key; put it into the environment variable of connection.secrets.access_key"),
        ({"access_key": "another"}, {"glob": "a.csv"}, "refuses the login .* the keys of connection.secrets are missing or wrong, or may not"),
        ({}, {"secrets": {}, "anonymous": True}, "refuses the login .* may not list the bucket"),
        ({"token": TOKEN}, {}, "the session token is not valid"),
        ({"region": "fsn1"}, {}, "another region: set connection.options.region to fsn1"),
        ({"region": "fsn1"}, {"glob": "a.csv"}, "check connection.options.region"),
        ({"bucket": "another"}, {}, "no such bucket: check connection.url"),
    ],
)
def test_a_refusal_says_what_to_do_and_is_not_asked_for_again(read: Read, store: dict[str, Any], given: dict[str, Any], error: str) -> None:
    there = S3({"shop/a.csv": csv(1)}, **store)
    with pytest.raises(SourceError, match=error) as raised:
        read(there, **given)
    assert len(there.asked) <= 2
    assert not re.search(f"{re.escape(SECRET_KEY)}|{ACCESS_KEY}|{TOKEN}", str(raised.value))


def at_range(store: S3, faults: dict[int, Callable[[Asked], Answer | None]]) -> None:
    """What happens at the n-th reading of an object, counted from 1."""

    def before(_: int, asked: Asked) -> Answer | None:
        wanted = any(name.lower() == "range" for name in asked.headers)
        fault = faults.get(len(store.ranges())) if wanted else None
        return fault(asked) if fault else None

    store.before = before


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RANGE_BYTES", RANGE_BYTES)


@pytest.mark.usefixtures("small_ranges")
def test_a_large_object_is_read_in_ranges_and_what_passes_is_asked_for_again(read: Read) -> None:
    store = S3({"shop/large.csv": LARGE})
    at_range(store, {2: lambda _: SLOW_DOWN, 4: lambda _: INTERNAL_ERROR, 5: lambda asked: half(store.answer(asked))})
    assert read(store) == list(range(200))
    parts = [(int(first), int(last) + 1) for first, last in (asked.removeprefix("bytes=").split("-") for asked in store.ranges())]
    assert len(parts) == len(set(parts)) + 3
    assert max(end - begin for begin, end in parts) <= RANGE_BYTES + io.DEFAULT_BUFFER_SIZE
    # Each byte once.
    assert [0, *(end for _, end in sorted(set(parts)))] == [*(begin for begin, _ in sorted(set(parts))), len(LARGE)]


def test_an_object_smaller_than_an_errors_words_is_asked_for_again(read: Read) -> None:
    store = S3({"shop/a.csv": csv(1)})
    at_range(store, {1: lambda _: SLOW_DOWN})
    assert len(csv(1)) < len(SLOW_DOWN[2])
    assert read(store) == [1]


@pytest.mark.usefixtures("small_ranges")
def test_a_store_that_does_not_recover_ends_the_run(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    store = S3({"shop/large.csv": LARGE})
    at_range(store, {number: lambda _: SLOW_DOWN for number in (2, 3)})
    with pytest.raises(SourceError, match=r"too busy for GetObject \(status 503\), 2 times in a row; it is read again in the next run"):
        read(store)
    assert len(store.ranges()) == 3


def changed(store: S3, content: bytes | None) -> None:
    store.objects = {} if content is None else {"shop/large.csv": content}


@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize("content", [LARGE.replace(b"p199@", b"q199@"), csv(1), None], ids=["as long", "shorter", "gone"])
def test_an_object_that_changes_while_it_is_read_is_not_taken_for_one(read: Read, content: bytes | None) -> None:
    store = S3({"shop/large.csv": LARGE})
    at_range(store, {2: lambda _: changed(store, content)})
    with pytest.raises(SourceError, match="was changed or removed while it was read; nothing of this run was merged"):
        read(store)


def test_an_object_that_changes_between_listing_and_reading_is_read_as_it_is_then(read: Read) -> None:
    store = S3({"shop/large.csv": csv(1)})
    longer = csv(*range(30))
    store.before = lambda _, asked: changed(store, longer) if asked.method == "HEAD" else None
    assert read(store) == list(range(30))
    store.before = lambda _, asked: changed(store, None) if asked.method == "HEAD" else None
    with pytest.raises(SourceError, match=r"large\.csv was changed or removed"):
        read(store)


@pytest.mark.usefixtures("small_ranges")
def test_parquet_is_read_in_ranges_too_and_a_torn_archive_is_named(read: Read) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(20_000)), "x": [str(number) for number in range(20_000)]}), file, row_group_size=2_000, compression="none")
    store = S3({"shop/a.parquet": file.getvalue(), "shop/b.csv.gz": gzip.compress(csv(1))[:-9]})
    at_range(store, {2: lambda _: SLOW_DOWN})
    assert read(store, "*.parquet") == list(range(20_000))
    assert len(store.ranges()) > 3
    with pytest.raises(SourceError, match=r"b\.csv\.gz is no readable csv: EOFError"):
        read(store, "*.gz")


# More than twice what is held at once: ranges, and pages or row groups.
LARGE_RECORDS = {"csv": 60_000, "parquet": 120_000}


def large(kind: str) -> bytes:
    """Records of a kilobyte each."""
    if kind == "csv":
        return csv(*range(LARGE_RECORDS[kind]), filler=WIDE)
    file = io.BytesIO()
    with pq.ParquetWriter(file, pa.schema({"id": pa.int64(), "filler": pa.string()}), compression="none", use_dictionary=False) as writer:
        for begin in range(0, LARGE_RECORDS[kind], 4_000):
            writer.write_table(pa.table({"id": range(begin, begin + 4_000), "filler": [WIDE.decode()] * 4_000}))
    return file.getvalue()


_READS = """
import json, re, sys
from pathlib import Path
from mail_pipelines.sources import kinds
from mail_pipelines.sources.kinds import s3

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

pages = kinds.rows("files", json.loads(sys.argv[1]), {"glob": "*"}, kinds.Wanted(("id",), None, None, kinds.secret))
rows = len(next(pages))
begin = peak()
rows += sum(len(page) for page in pages)
print(rows, peak() - begin)
"""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_object(served: Callable[[S3], str], kind: str) -> None:
    store = S3({f"shop/large.{kind}": large(kind)})
    connection = {"url": "s3://exports/shop", "options": {"endpoint": served(store)}, "secrets": SECRETS}
    out = subprocess.run([sys.executable, "-c", _READS, json.dumps(connection)], capture_output=True, text=True, check=True).stdout
    rows, growth = map(int, out.split())
    assert rows == LARGE_RECORDS[kind]
    assert growth < len(store.objects[f"shop/large.{kind}"]) / 2


@pytest.mark.parametrize(
    ("connection", "error"),
    [
        ({"options": {"access_key": "AKIAX"}}, r"connection\.options\.access_key: stands under secrets, with the name of an environment variable"),
        ({"options": {"endpoint": "https://me:secret@s3.example.test"}}, r"connection\.options\.endpoint: expected the address of the store alone"),
        ({"options": {"endpoint": "https://s3.example.test/exports"}}, r"connection\.options\.endpoint: expected the address of the store alone"),
        ({"options": {"endpoint_url": "https://s3.example.test"}}, r"connection\.options\.endpoint_url: .*expected of endpoint, region, path_style, anonymous"),
        ({"secrets": {"access_key": "SHOP_KEY"}}, r"connection\.secrets\.secret_key: Field required"),
        ({"secrets": {**SECRETS, "secret_key": "a/secret+key"}}, r"connection\.secrets\.secret_key: expected the name of an environment variable"),
        ({"secrets": SECRETS, "options": {"anonymous": True}}, r"connection\.options\.anonymous: without a login there are no secrets"),
        ({"url": "s3:///"}, r"connection\.url: expected s3://BUCKET"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused_by_its_place(declare: Declare, connection: dict[str, Any], error: str) -> None:
    with pytest.raises(DeclarationError, match=error) as raised:
        declare(kind="files", connection={"url": "s3://exports", **connection}, contacts={"read": {"glob": "*"}})
    assert "secret@" not in str(raised.value)
    assert "a/secret+key" not in str(raised.value)
