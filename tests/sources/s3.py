"""A store that speaks S3 over HTTP, as far as it is read: signatures of version 4 are computed anew and compared, listings come in pages, objects in ranges.

After the API reference of Amazon S3: ListObjectsV2, HeadObject, GetObject, "Authenticating Requests (AWS Signature Version 4)", "Error Responses".
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import format_datetime
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

from tests.parts.web import Answer, Asked

ACCESS_KEY, SECRET_KEY, TOKEN = "AKIATHATISNOKEYATALL", "a/secret+key of nobody", "a session's token"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<day>\d{8})/(?P<region>[^/]+)/s3/aws4_request, "
    r"SignedHeaders=(?P<names>[^,]+), Signature=(?P<signature>\w{64})"
)
_SKEW = dt.timedelta(minutes=15)
_WRITTEN = dt.datetime(2026, 11, 2, 9, 30, tzinfo=dt.UTC)


def _failed(status: int, code: str, message: str, **more: str) -> Answer:
    tags = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in {"Code": code, "Message": message, **more}.items())
    return status, {"Content-Type": "application/xml"}, f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{tags}</Error>'.encode()


def half(answer: Answer) -> Answer:
    """The connection breaks in the middle of an answer."""
    status, headers, content = answer
    return status, {**headers, "Content-Length": str(len(content))}, content[: len(content) // 2]


SLOW_DOWN = _failed(503, "SlowDown", "Please reduce your request rate.")
INTERNAL_ERROR = _failed(500, "InternalError", "We encountered an internal error. Please try again.")


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@dataclass
class S3:
    """`objects` by key, in one bucket. A listing has at most `page` entries at once. `before` may answer in its place, given the number of the request.

    `virtual` is the bucket's name where it stands in the host's and not in the path.
    """

    objects: dict[str, bytes]
    bucket: str = "exports"
    region: str = "us-east-1"
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    token: str | None = None
    public: bool = False
    page: int = 1000
    virtual: bool = False
    before: Callable[[int, Asked], Answer | None] | None = None
    asked: list[Asked] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if self.before and (given := self.before(len(self.asked), asked)) is not None:
            return given
        return self.answer(asked)

    def answer(self, asked: Asked) -> Answer:
        if not (self.public and "authorization" not in asked.headers) and (refused := self._refused(asked)) is not None:
            return refused
        path = unquote(asked.path).removeprefix("/")
        bucket, _, key = (self.bucket, "", path) if self.virtual else path.partition("/")
        if bucket != self.bucket:
            return _failed(404, "NoSuchBucket", "The specified bucket does not exist", BucketName=bucket)
        if asked.method == "GET" and not key:
            return self._list(dict(parse_qsl(asked.target.partition("?")[2], keep_blank_values=True)))
        return self._object(asked, key)

    def listings(self) -> int:
        return sum("list-type" in asked.query for asked in self.asked)

    def ranges(self) -> list[str]:
        """What was asked of objects, in order."""
        return [value for asked in self.asked for name, value in asked.headers.items() if name.lower() == "range"]

    def _refused(self, asked: Asked) -> Answer | None:
        """What is wrong with the login, if anything is."""
        headers = {name.lower(): value for name, value in asked.headers.items()}
        given = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        if given is None:
            return _failed(403, "AccessDenied", "Access Denied")
        if given["key"] != self.access_key:
            return _failed(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.", AWSAccessKeyId=given["key"])
        if given["region"] != self.region:
            message = f"The authorization header is malformed; the region '{given['region']}' is wrong; expecting '{self.region}'"
            return _failed(400, "AuthorizationHeaderMalformed", message, Region=self.region)
        when = dt.datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
        if abs(dt.datetime.now(dt.UTC) - when) > _SKEW:
            return _failed(403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
        signed = given["names"].split(";")
        must = {"host", *(name for name in headers if name.startswith("x-amz-"))}
        hashed = hashlib.sha256(asked.content).hexdigest()
        if must - set(signed) or headers["x-amz-content-sha256"] != hashed or not hmac.compare_digest(given["signature"], signature(asked, self.secret_key)):
            return _failed(403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
        if headers.get("x-amz-security-token") != self.token:
            return _failed(400, "InvalidToken", "The provided token is malformed or otherwise invalid.")
        return None

    def _list(self, query: dict[str, str]) -> Answer:
        if query.get("list-type") != "2":
            return _failed(501, "NotImplemented", "Only ListObjectsV2 is")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: dict[str, bool] = {}
        for key in sorted(self.objects):
            if key.startswith(prefix):
                head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                found[prefix + head + cut if cut else key] = bool(cut)
        after = query.get("continuation-token", query.get("start-after", ""))
        names = [name for name in found if name > after]
        page = names[: min(self.page, int(query.get("max-keys", 1000)))]
        shown = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if found[name]
            else f"<Contents><Key>{escape(name)}</Key><LastModified>{_WRITTEN:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            f"<ETag>{escape(etag(self.objects[name]))}</ETag><Size>{len(self.objects[name])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name in page
        )
        more = len(page) < len(names)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        head = (
            f"<Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        )
        content = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{shown}</ListBucketResult>'
        return 200, {"Content-Type": "application/xml"}, content.encode()

    def _object(self, asked: Asked, key: str) -> Answer:
        data = self.objects.get(key)
        if data is None:
            return _failed(404, "NoSuchKey", "The specified key does not exist.", Key=key)
        headers = {"Content-Type": "binary/octet-stream", "ETag": etag(data), "Last-Modified": format_datetime(_WRITTEN, usegmt=True), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", next((value for name, value in asked.headers.items() if name.lower() == "range"), ""))
        if wanted is None:
            return 200, headers, data
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first > last:
            return _failed(416, "InvalidRange", "The requested range is not satisfiable")
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]


def signature(asked: Asked, secret_key: str) -> str:
    """The signature that a request with its signed headers, its day and its region has to have."""
    headers = {name.lower(): " ".join(value.split()) for name, value in asked.headers.items()}
    given = _AUTHORIZATION.fullmatch(headers["authorization"])
    assert given is not None
    path, _, query = asked.target.partition("?")
    parameters = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in parse_qsl(query, keep_blank_values=True))
    canonical = "\n".join(
        (
            asked.method,
            quote(unquote(path), safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in parameters),
            *(f"{name}:{headers[name]}" for name in given["names"].split(";")),
            "",
            given["names"],
            headers["x-amz-content-sha256"],
        )
    )
    scope = (given["day"], given["region"], "s3", "aws4_request")
    text = "\n".join(("AWS4-HMAC-SHA256", headers["x-amz-date"], "/".join(scope), hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{secret_key}".encode()
    for part in (*scope, text):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()
