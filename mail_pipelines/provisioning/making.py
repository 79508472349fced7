"""Taking a server from step to step until it is in service, waits for something, or is gone: each step is recorded before and after it is done.

What belongs here: recording, trying again, giving up, and going over to the next source. What does not: what a step does (`steps`, `removal`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import DatabaseUnreachable, database_now, reading, transact
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning import removal, steps, store
from mail_pipelines.provisioning.alone import alone
from mail_pipelines.provisioning.interfaces import CannotBeMade, NoHost, Parts, ProvisioningError, Say
from mail_pipelines.provisioning.reserving import FAILED_FOR
from mail_pipelines.provisioning.states import MAKING, Step
from mail_pipelines.provisioning.store import Provision

_LONGEST_WAIT = 64
# Of the time that it has waited already, and at most so long (s).
_PATIENCE = 0.1
_LONGEST_PAUSE = 3600.0
DO = {**steps.DO, **removal.DO}
# A command, or a play, that a killed process has left behind, ends within this or is waited for by the next run.
_LOCK_SECONDS = 60.0
# Where a host exists that the hoster may have switched off.
_WITH_HOST = frozenset({Step.EQUIP, Step.PLAY, Step.PUBLISH, Step.VERIFY})


class TryAgain(ProvisioningError):
    """A step has failed and is due again after `seconds`."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


def advance(parts: Parts, key: str, say: Say) -> Provision:
    """Do all that can be done now for a server that is made, or removed, here; returns where it stands.

    May be killed at any moment and called again. Raises `TryAgain`, `alone.Busy`, and `ProvisioningError` for a server that was not made here.
    """
    lock = Path(parts.settings.server.run_folder) / "centre" / f"provision-{key}"
    with alone(lock, f"server {key}", wait_seconds=_LOCK_SECONDS):
        while True:
            with reading(parts.engine) as connection:
                provision = store.find(connection, key)
            if provision.step is Step.NONE:
                return provision
            try:
                if (waits := _take(parts, provision, say)) is not None:
                    return waits
            except store.Changed as changed:
                # It was given up meanwhile: what there is of it goes.
                say(str(changed))


def _take(parts: Parts, provision: Provision, say: Say) -> Provision | None:
    """Take one step, which is recorded before and after it; returns where it stands if it waits. Raises `Changed`, `TryAgain`."""
    try:
        store.begin(parts.engine, provision, parts.settings.provisioning.retry_seconds)
        say(f"{provision.key}: {provision.step}" + (f", attempt {provision.attempt + 1}" if provision.attempt else ""))
        if (done := DO[provision.step](parts, provision, say)) is not None:
            to, values = done
            transact(parts.engine, lambda connection: store.move(connection, provision, to, **values))
    except steps.Waits as waits:
        say(f"{provision.key} waits: {waits}")
        return _wait(parts, provision, waits)
    except (DatabaseUnreachable, store.Changed):
        # Neither can the first be recorded.
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is: to go on for ever would cost for ever)
        _failed(parts, provision, error, say)
    return None


def _wait(parts: Parts, provision: Provision, waits: steps.Waits) -> Provision:
    """Looked at again the later the longer it has lasted: days of waiting for the DNS are some hundred runs, not thousands."""
    with reading(parts.engine) as connection:
        waited = (database_now(connection) - provision.state_at).total_seconds()
    seconds = max(parts.settings.provisioning.retry_seconds, min(waited * _PATIENCE, _LONGEST_PAUSE))
    store.wait(parts.engine, provision, seconds, str(waits), failed=False, records=waits.records)
    with reading(parts.engine) as connection:
        return store.find(connection, provision.key)


def _failed(parts: Parts, provision: Provision, error: Exception, say: Say) -> None:
    """Give the server up, or raise `TryAgain`."""
    settings = parts.settings.provisioning
    reason = str(error) if isinstance(error, MailPipelinesError) else f"{type(error).__name__}: {error}"
    say(f"{provision.key}: {provision.step} failed: {reason}")
    last = provision.attempt + 1 >= settings.attempts
    if provision.state in MAKING and (last or isinstance(error, CannotBeMade | NoHost)):
        unfit = isinstance(error, NoHost) or (last and _is_sources_fault(parts, provision))
        _give_up(parts, provision, f"{provision.step}: {reason}", unfit=unfit, listed=isinstance(error, steps.Listed), say=say)
        return
    seconds = settings.retry_seconds * min(2**provision.attempt, _LONGEST_WAIT)
    store.wait(parts.engine, provision, seconds, f"{provision.step}: {reason}", failed=True)
    raise TryAgain(f"server {provision.key}, {provision.step}: {reason}", seconds) from error


def _give_up(parts: Parts, provision: Provision, reason: str, *, unfit: bool, listed: bool, say: Say) -> None:
    """Record why, so that its parts are removed; and ask for another one in its place if only its source was to blame, or its host's address: which is the
    source's, too, if a server of it has failed of late.
    """

    def work(connection: Connection) -> tuple[bool, Provision | None]:
        source = provision.source
        aside = source is not None and (unfit or (listed and store.has_failed(connection, source, database_now(connection) - FAILED_FOR)))
        store.fail(connection, provision, reason)
        if source is not None and aside:
            store.put_aside(connection, source, f"{provision.key}, {reason}")
        left = {one.name for one in parts.sources} - store.set_aside(connection).keys()
        if not left or not (aside or listed):
            return aside, None
        return aside, store.request(connection, parts.settings.provisioning, provision.why, proposal_id=provision.proposal_id, pool=provision.pool)

    aside, another = transact(parts.engine, work)
    say(f"{provision.key} is given up")
    if aside:
        say(f"host source {provision.source} is set aside")
    if another is not None:
        say(f"{another.key} is asked for in the place of {provision.key}")


def _is_sources_fault(parts: Parts, provision: Provision) -> bool:
    """Whether the source could not make a host, or its host has gone without us."""
    if provision.step is Step.CREATE:
        return True
    if provision.step in _WITH_HOST and provision.source is not None:
        with contextlib.suppress(ProvisioningError):
            return parts.source(provision.source).find(steps.order_of(parts, provision)) is None
    return False
