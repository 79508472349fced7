"""The broker: that it and the results of runs answer, and that orders can be verified."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.doctor import waiting
from mail_pipelines.doctor.finding import Finding


def check_broker(settings: config.Settings) -> Iterator[Finding]:
    """Where runs are carried to workers: broker and results answer, and the two keys belong together."""
    given = settings.broker
    if not given.url and not given.signing_key:
        return
    from kombu.exceptions import OperationalError

    from mail_pipelines.resources import orders, tasks

    try:
        app = tasks.make_app(settings)
        # A worker waits for a minute; whoever asks what is wrong wants to hear it.
        app.conf.result_backend_always_retry = False
        if given.signing_key and orders.verify_key_of(given.signing_key) != given.verify_key:
            yield Finding("broker", "broker.verify_key is not that of broker.signing_key: every order is refused", "restore both from the backup of the centre")
        with app.connection_for_read(connect_timeout=waiting.STORAGE_SECONDS) as connection:
            connection.ensure_connection(max_retries=1, timeout=waiting.STORAGE_SECONDS)
    except config.ConfigError as error:
        yield Finding("broker", str(error), "set them on every host, each server with its own account")
        return
    except OperationalError as error:
        yield Finding("broker", f"the broker does not answer: {error}", "runs wait until it does; sessions that work go on")
    else:
        yield from _check_accounts(settings)

    def look() -> list[Finding]:
        try:
            app.backend.get_task_meta("none")
        except sa.exc.SQLAlchemyError as error:
            first_line = str(error).partition("\n")[0]
            return [Finding("broker", f"the database of results cannot be used: {first_line}", "look at broker.results, and at the rights of its account")]
        return []

    yield from waiting.within(
        waiting.STORAGE_SECONDS, look, Finding("broker", f"the database of results does not answer within {waiting.STORAGE_SECONDS:g} s", waiting.HANGS)
    )


def _check_accounts(settings: config.Settings) -> Iterator[Finding]:
    """The centre, and nobody else, can make and end accounts of servers at the broker."""
    from mail_pipelines.resources.broker_accounts import BrokerAccountError, BrokerAccounts

    broker = BrokerAccounts.of(settings.broker)
    if settings.this_server is not None:
        if settings.broker.management_url:
            remedy = "take it off this host, and give the account that it names another password"
            yield Finding("broker", "broker.management_url is set on a server: whoever steals this one makes accounts for all", remedy)
    elif broker is not None:
        try:
            broker.check()
        except BrokerAccountError as error:
            yield Finding("broker", str(error), "until then no server can be made or revoked by the centre")
