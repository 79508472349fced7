"""The account of a dispatch server at RabbitMQ, which has the server's name (docs/production.md)."""

from __future__ import annotations

import shutil
import subprocess

from mail_pipelines.errors import MailPipelinesError

_SECONDS = 60


class BrokerAccountError(MailPipelinesError):
    """The account was not deleted; the message says what to run where."""


def delete(account: str) -> None:
    """Delete an account, which ends its connections. Raises `BrokerAccountError` where that is not possible from this host."""
    command = ["rabbitmqctl", "--quiet", "delete_user", account]
    advice = f"run `rabbitmqctl delete_user {account}` as root on the broker's host"
    if shutil.which(command[0]) is None:
        raise BrokerAccountError(f"RabbitMQ is not on this host: {advice}")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BrokerAccountError(f"RabbitMQ did not answer within {_SECONDS} s: {advice}") from None
    said = (done.stderr or done.stdout).strip()
    # One that is not there any more is deleted.
    if done.returncode and "no_such_user" not in said and "does not exist" not in said:
        raise BrokerAccountError(f"the account at RabbitMQ was not deleted ({said.splitlines()[-1] if said else done.returncode}): {advice}")
