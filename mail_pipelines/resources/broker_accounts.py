"""The account of a dispatch server at RabbitMQ, which has the server's name, made and ended by RabbitMQ's management API.

What belongs here: asking that API, by the centre's own account for it (docs/decisions/0056-accounts-at-the-broker-by-its-api.md), and what a server may do at
the broker. What does not: its password, which others keep and hand in (`provisioning.credentials`).
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import ssl
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from mail_pipelines.config import BrokerSettings
from mail_pipelines.errors import MailPipelinesError

_SECONDS = 15
_DOCS = "docs/production.md"
_RIGHTS = ("configure", "write", "read")


class BrokerAccountError(MailPipelinesError):
    """The account was not made or deleted; the message says what to do where."""


def rights(server: str) -> str:
    """What the account of a server may configure, write and read, as a regular expression: its own queues, the one that all read, and what its workers use."""
    name = server.replace(".", r"\.")
    return rf"^(dispatch|{name}(-ctl)?|{name}\.pidbox|{name}(-ctl)?@.*)$"


@dataclass(frozen=True, repr=False)
class BrokerAccounts:
    """Accounts of servers in the virtual host of `broker.url`. All methods raise `BrokerAccountError`."""

    settings: BrokerSettings

    @classmethod
    def of(cls, settings: BrokerSettings) -> BrokerAccounts | None:
        """None where runs are not carried by RabbitMQ."""
        return cls(settings) if urlsplit(settings.url or "").scheme in ("amqp", "amqps") else None

    def check(self) -> None:
        """Whether accounts could be made now."""
        said = self._ask("GET", "whoami")
        if "administrator" not in said.get("tags", ()):
            name = said.get("name")
            raise BrokerAccountError(f"{name} may not make accounts at RabbitMQ: as root on its host run `rabbitmqctl set_user_tags {name} administrator`")

    def put(self, account: str, password: str) -> None:
        """Make an account that may use the queues of the server of its name, or give it another password. Rights that it has are left to it: on a host with
        several servers the first one's account has those of all.
        """
        self._refuse_own(account)
        self._ask("PUT", "users", account, body={"password": password, "tags": ""})
        vhost = unquote(urlsplit(self.settings.url or "").path.removeprefix("/")) or "/"
        place = ("permissions", vhost, account)
        if self._ask("GET", *place, absent={}) == {}:
            self._ask("PUT", *place, body=dict.fromkeys(_RIGHTS, rights(account)))

    def delete(self, account: str) -> None:
        """Delete an account, if there is one, which ends its connections."""
        self._refuse_own(account)
        try:
            self._ask("DELETE", "users", account, absent={})
        except BrokerAccountError as error:
            raise BrokerAccountError(f"the account {account} is still there: {error}; or run `rabbitmqctl delete_user {account}` as root there") from None

    def _refuse_own(self, account: str) -> None:
        if account in (urlsplit(self.settings.url or "").username, self._address().username):
            raise BrokerAccountError(f"{account} is the name of the centre's own account at RabbitMQ: a server has to have another one")

    def _address(self) -> SplitResult:
        """`broker.management_url`, if it can be used."""
        given = self.settings.management_url
        if not given:
            raise BrokerAccountError(f"broker.management_url is not set: accounts of servers at RabbitMQ are made and ended by its management API ({_DOCS})")
        try:
            address = urlsplit(given)
            is_whole = address.scheme in ("http", "https") and all((address.hostname, address.username, address.password, address.port))
        except ValueError:
            is_whole = False
        if not is_whole:
            raise BrokerAccountError(f"broker.management_url is not of the form http://USER:PASSWORD@127.0.0.1:15672 ({_DOCS})")
        if address.scheme == "http" and not _is_loopback(str(address.hostname)):
            raise BrokerAccountError("broker.management_url has to begin with https:// for a broker on another host: it carries a password")
        return address

    def _ask(self, method: str, *path: str, body: Mapping[str, str] | None = None, absent: Any = None) -> Any:
        """The answer to a request; `absent`, if given, for what is not there."""
        address = self._address()
        place, user = f"{address.hostname}:{address.port}", unquote(str(address.username))
        login = base64.b64encode(f"{user}:{unquote(str(address.password))}".encode()).decode("ascii")
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        words = "/".join((address.path.rstrip("/"), "api", *(quote(word, safe="") for word in path)))
        try:
            with closing(self._connection(address)) as connection:
                connection.request(method, words, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BrokerAccountError(
                f"RabbitMQ's management API does not answer at {place} ({error}): look whether RabbitMQ runs there, and as root there run "
                f"`rabbitmq-plugins enable rabbitmq_management` (broker.management_url, broker.ca; {_DOCS})"
            ) from None
        return _read(status, text, place, user, absent)

    def _connection(self, address: SplitResult) -> http.client.HTTPConnection:
        host = str(address.hostname)
        if address.scheme == "http":
            return http.client.HTTPConnection(host, address.port, timeout=_SECONDS)
        trusted = ssl.create_default_context(cafile=self.settings.ca or None)
        return http.client.HTTPSConnection(host, address.port, timeout=_SECONDS, context=trusted)


def _read(status: int, text: bytes, place: str, user: str, absent: Any) -> Any:
    """What an answer says. Raises `BrokerAccountError` for a refusal."""
    try:
        said = json.loads(text) if text else {}
        reason = str(said.get("reason", said.get("error", status)))
    except (ValueError, AttributeError):
        raise BrokerAccountError(f"what answers at {place} (status {status}) is not RabbitMQ's management API: correct broker.management_url") from None
    if status < 300:
        return said
    if status == http.client.NOT_FOUND and absent is not None:
        return absent
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        raise BrokerAccountError(
            f"RabbitMQ refuses the account {user} of broker.management_url ({reason}): it needs the password that is there, and the tag administrator; as root "
            f"on its host run `rabbitmqctl change_password {user}` and `rabbitmqctl set_user_tags {user} administrator`"
        )
    raise BrokerAccountError(
        f"RabbitMQ at {place} answers {status} ({reason}): look whether broker.url and broker.management_url are of one broker, and its virtual host is there"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
