"""The account of a dispatch server at RabbitMQ, which has the server's name (docs/production.md)."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from mail_pipelines.errors import MailPipelinesError

_SECONDS = 60
_EXISTS = "exists"


class BrokerAccountError(MailPipelinesError):
    """The account was not made or deleted; the message says what to run where."""


def put(account: str, password: str, vhost: str) -> None:
    """Make an account that may use the queues of the server of its name, or give it another password. Raises `BrokerAccountError`."""
    advice = f"make the account {account} as docs/production.md says"
    if _run(["add_user", account], advice, password) == _EXISTS:
        _run(["change_password", account], advice, password)
    name = account.replace(".", r"\.")
    right = rf"^(dispatch|{name}(-ctl)?|{name}\.pidbox|{name}(-ctl)?@.*)$"
    _run(["set_permissions", "-p", vhost, account, right, right, right], advice)


def delete(account: str) -> None:
    """Delete an account, which ends its connections. Raises `BrokerAccountError` where that is not possible from this host."""
    _run(["delete_user", account], f"run `rabbitmqctl delete_user {account}` as root on the broker's host")


def _run(words: list[str], advice: str, password: str | None = None) -> str:
    """Returns `_EXISTS` of an account that is there already; one that is not there any more is deleted. A password goes by standard input."""
    command = ["rabbitmqctl", "--quiet", *words]
    if shutil.which(command[0]) is None:
        raise BrokerAccountError(f"RabbitMQ is not on this host: {advice}")
    try:
        done = subprocess.run(command, input=f"{password}\n" if password else "", capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BrokerAccountError(f"RabbitMQ did not answer within {_SECONDS} s: {advice}") from None
    said = (done.stderr or done.stdout).strip()
    if not done.returncode or "no_such_user" in said or ("does not exist" in said and words[0] == "delete_user"):
        return ""
    if "already exists" in said and words[0] == "add_user":
        return _EXISTS
    raise BrokerAccountError(f"the account at RabbitMQ is not as it should be ({said.splitlines()[-1] if said else done.returncode}): {advice}")


@dataclass(frozen=True)
class BrokerAccounts:
    """Accounts of servers in one virtual host."""

    vhost: str

    def put(self, account: str, password: str) -> None:
        put(account, password, self.vhost)

    def delete(self, account: str) -> None:
        delete(account)
