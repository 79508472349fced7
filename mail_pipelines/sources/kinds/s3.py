"""A store that speaks S3 (AWS, MinIO, Ceph, Hetzner …) as a file system of fsspec, by the client that is in Arrow: listed page by page, read in ranges.

What belongs here: the client, and what its errors mean. What does not: the form of the declaration and what is in an object (`files`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.spec import AbstractBufferedFile

from mail_pipelines.sources.errors import LoginError, SourceError
from mail_pipelines.sources.kinds.http import ATTEMPTS, TIMEOUT_SECONDS

# So much of an object is asked for, and held, at once.
RANGE_BYTES = 8 * 2**20
_WAIT_SECONDS = 0.1
_ANSWER = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during (\w+) operation: (?:Unable to parse ExceptionName: (\w+))?")
_REGION = re.compile(r"expecting '?([a-z0-9-]+)")
# What the store or the client says: what to do.
_LOGINS = {
    "ACCESS_DENIED": "the keys of connection.secrets are missing or wrong, or may not list the bucket and read its objects",
    "INVALID_ACCESS_KEY_ID": "it does not know the access key; put it into the environment variable of connection.secrets.access_key",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is not that of the access key; put it into the environment variable of connection.secrets.secret_key",
    "INVALID_CLIENT_TOKEN_ID": "the session token is not valid; get another one, with its keys",
    "EXPIRED_TOKEN": "the session token has expired; get another one, with its keys",
    "REQUEST_TIME_TOO_SKEWED": "the clock of this host is wrong by more than a quarter of an hour",
}
_LOGINS |= {"InvalidToken": _LOGINS["INVALID_CLIENT_TOKEN_ID"], "ExpiredToken": _LOGINS["EXPIRED_TOKEN"]}
_WRONG = {
    "NO_SUCH_BUCKET": "there is no such bucket: check connection.url and connection.options.endpoint",
    "NETWORK_CONNECTION": f"it does not answer, {ATTEMPTS} times in a row: check connection.options.endpoint and the network",
}
CHANGED = "an object was changed or removed while it was read; nothing of this run was merged, and the next one reads it anew"
# One answer: of the same one the client reads the words, or only the status.
_BUSY = frozenset({"SLOW_DOWN", "SERVICE_UNAVAILABLE"})
_GONE = frozenset({"NO_SUCH_KEY", "RESOURCE_NOT_FOUND"})
_ELSEWHERE = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"})


class S3(ArrowFSWrapper):  # type: ignore[misc]
    """Objects by `bucket/key`. Everything raises `SourceError` if the store refuses, or does not answer after `ATTEMPTS`.

    Without keys, and unless `anonymous`, a login is looked for as by AWS's own tools: variables, files, the role of the host.
    """

    cachable = False

    def __init__(self, *, endpoint: str | None, region: str | None, path_style: bool, anonymous: bool, secrets: Mapping[str, str]) -> None:
        from pyarrow import fs

        client = fs.S3FileSystem(
            **secrets,
            anonymous=anonymous,
            endpoint_override=endpoint,
            # Nothing is asked of a cloud's metadata service where the endpoint says that it is another store.
            region=region or ("us-east-1" if endpoint else None),
            force_virtual_addressing=not path_style,
            connect_timeout=TIMEOUT_SECONDS[0],
            request_timeout=TIMEOUT_SECONDS[1],
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )
        super().__init__(client)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        """A key may have any character; only slashes at its end are no part of a name."""
        return path.removeprefix("s3://").rstrip("/")

    def glob(self, path: str, **kwargs: Any) -> Any:
        """Objects only: a folder is no object, and who may list it may not ask for it as one."""
        return super().glob(path, withdirs=False, **kwargs)

    def ls(self, path: str, detail: bool = False, **_: Any) -> list[Any]:
        from pyarrow.fs import FileSelector

        with _told():
            found = self.fs.get_file_info(FileSelector(self._strip_protocol(path)))
        return [self._make_entry(entry) if detail else entry.path for entry in found]

    def info(self, path: str, **_: Any) -> Any:
        with _told():
            return super().info(path)

    def ukey(self, path: str) -> str:
        """The version of an object: its ETag, length and time."""
        with _told():
            return str(self.fs.open_input_file(path).metadata())

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> _Object:
        with _told():
            stream = self.fs.open_input_file(path)
            return _Object(self, path, stream, size=stream.size(), block_size=RANGE_BYTES)


class _Object(AbstractBufferedFile):  # type: ignore[misc]
    def __init__(self, store: S3, path: str, stream: Any, **kwargs: Any) -> None:
        super().__init__(store, path, "rb", **kwargs)
        self._stream = stream

    def _fetch_range(self, start: int, end: int) -> bytes:
        with _told():
            data = self._read(start, end)
        if len(data) < end - start:
            raise SourceError(CHANGED)
        return data

    def _read(self, start: int, end: int) -> bytes:
        """The client takes the words of an error into the place of the data; where that is too small for them, it does not ask again by itself."""
        attempt = 1
        while True:
            try:
                data: bytes = self._stream.read_at(end - start, start)
                return data
            except OSError as error:
                if attempt == ATTEMPTS or "flush response stream" not in str(error):
                    raise
            time.sleep(_WAIT_SECONDS * 2**attempt)
            attempt += 1


@contextmanager
def _told() -> Iterator[None]:
    """Say what an error of the client means. What is not there stays `FileNotFoundError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _meant(str(error)) from error


def _meant(words: str) -> SourceError:
    answer = _ANSWER.search(words)
    if answer is None:
        return SourceError("the store cannot be read: check connection.url and connection.options")
    code = answer[4] or answer[1]
    if code in _LOGINS:
        return LoginError(f"the store refuses the login ({code}): {_LOGINS[code]}")
    if "SSL peer certificate" in words:
        return SourceError("the store's certificate is not trusted: add its authority to those of this host, or give the name that it is for in the endpoint")
    if code in _WRONG:
        return SourceError(f"the store cannot be read ({code}): {_WRONG[code]}")
    if code in _GONE or answer[2] == "416":
        return SourceError(CHANGED)
    if code in _ELSEWHERE or answer[2] == "301":
        region = _REGION.search(words)
        return SourceError(f"the bucket is in another region: set connection.options.region{f' to {region[1]}' if region else ''}")
    if answer[2] == "400":
        # An answer to HEAD has no words.
        return SourceError("the store takes the request for a wrong one (status 400): check connection.options.region, and the session token if there is one")
    if code in _BUSY:
        return SourceError(f"the store is too busy for {answer[3]} (status 503), {ATTEMPTS} times in a row; it is read again in the next run")
    status = f", status {answer[2]}" if answer[2] else ""
    return SourceError(f"the store answers {code}{status} to {answer[3]}, {ATTEMPTS} times in a row if it is one that passes; it is read again in the next run")
