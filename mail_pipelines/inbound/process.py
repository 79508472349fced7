"""Receiving as a process: the verifier, and the Exim that asks it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import DatabaseError, open_engine, reading
from mail_pipelines.dispatch import token_keys
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.exim.process import watch
from mail_pipelines.dispatch.files import only_one
from mail_pipelines.dispatch.signals import until_signal
from mail_pipelines.inbound import verifier
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.inbound.known_keys import KnownKeys, LookUpFailed
from mail_pipelines.inbound.receiver import Receiver

# A database that takes connections and never answers is away: what Exim asks meanwhile waits for it no longer than for one that is down.
_ANSWER_SECONDS = 10.0


def run(settings: Settings) -> None:
    """Receive what comes back until SIGTERM or SIGINT.

    Raises `AlreadyRunning` if another process does, `EximError` if Exim cannot be started or ends by itself, `VerifierError`.
    """
    inbound, engine = settings.inbound, open_engine(settings.database, answer_seconds=_ANSWER_SECONDS)
    folders = InboundFolders.of(inbound)
    keys = KnownKeys(settings.token_key(), lambda: _servers(engine), folders.servers)
    binary = instance.find_binary()
    receiver = Receiver(
        binary,
        instance.account_for(binary),
        folders,
        tuple(inbound.listen),
        inbound.port,
        settings.sending.bounce_host,
        inbound.complaints.lower(),
        inbound.certificate,
        inbound.certificate_key,
    )
    with only_one(folders.run / "lock", "receiving mail"):
        instance.prepare(receiver)
        # Until Exim's last process has ended: each may still have a question.
        with verifier.listening(folders.verifier, keys, receiver.account.gid):
            output = receiver.log_folder / "exim.out"
            daemon = instance.start(receiver, output)
            try:
                asyncio.run(until_signal(watch(daemon, output)))
            finally:
                instance.stop(daemon.pid)
                daemon.wait()


def _servers(engine: Engine) -> Collection[str]:
    """The names of all registered servers. Raises `LookUpFailed`."""
    try:
        with reading(engine) as connection:
            return token_keys.names(connection).values()
    except (DatabaseError, SQLAlchemyError) as error:
        raise LookUpFailed(f"the central database does not say which servers there are: {error}") from error
