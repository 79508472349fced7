"""The centre's steps of a recovery: begin, give up on a server, finish. An operator takes them (`mail-pipelines recover`).

What belongs here: their order and conditions. What does not: what servers do meanwhile (`reading`), and how rows change (`applying`).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import states
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Brand, Campaign, Contact, RecoveredOffer, State
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.archive import Archive
from mail_pipelines.dispatch.files import DispatchError, ServerFolders
from mail_pipelines.dispatch.recovery import applying, archived, standing
from mail_pipelines.dispatch.recovery.reading import OVERLAP, Store
from mail_pipelines.dispatch.recovery.standing import Part, Standing
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.inbound import maildir
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.messages.keyring import KeyRing

HELD = "the database was restored from a backup: check that this campaign is still wanted as it is here, then resume it"
# Of campaigns in these states, what the logs say is needed when their audience is frozen.
_TO_BE_FROZEN = (CampaignState.SCHEDULED, CampaignState.BUILDING)
_UNDER_WAY = (CampaignState.SENDING, CampaignState.PAUSED)


@dataclass
class Report:
    """What a recovery did. `ends`: rows of each campaign by their new state; `lost`: offers in campaigns that the backup does not have, by the key made."""

    ends: dict[str, Counter[State]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    doubtful: int = 0
    mails_again: int = 0
    uncovered: list[str] = field(default_factory=list)


def begin(engine: Engine, now: dt.datetime) -> Standing:
    """Stop all sending and await the servers' logs. An open recovery goes on."""

    def work(connection: Connection) -> Standing:
        found = standing.begin(connection, now)
        wanted = sa.select(Campaign.id).where(Campaign.state.in_([state.value for state in (*_TO_BE_FROZEN, *_UNDER_WAY)]))
        for campaign_id in connection.execute(wanted).scalars().all():
            states.hold(connection, campaign_id, HELD, now)
        return found

    return transact(engine, work)


@dataclass(frozen=True)
class Lost:
    """A server that was given up: how many rows it had in hand, and its part in the recovery with what was read from the archive of logs."""

    rows: int
    part: Part
    offers: int = 0
    note: str = ""


def lose(engine: Engine, settings: Settings, key: str) -> Lost:
    """Go on without a server that will not come back: what it had in hand becomes unknown, and so at the end does all that may have been its.

    What the archive of logs has of it is taken over; if its log was shipped to the end, as before retirement, nothing more is in doubt. Raises
    `ArchiveError` if there is an archive and it cannot be read.
    """
    with reading(engine) as connection:
        server, found = servers.find(connection, key), standing.newest(connection)
    part = found.of_server(server.id) if found is not None else None
    if found is None or not found.is_open or part is None or part.part is not Part.AWAITED:
        raise DispatchError(f"no recovery awaits server {key}")
    given_up = registry.lose(engine, key) or 0
    store = Store(engine, server.id)
    archive = Archive.of(settings.server.log_archive)
    journal = journal_of(ServerFolders.of(settings.server, key), server.kind)
    result, note = Part.LOST, ""
    if archive is not None:
        keys = KeyRing.of(settings.token_key(), {server.id: key})
        from_archive = archived.read(archive, part, journal, keys, store, shares=server.worker != key)
        result, note = from_archive or (Part.LOST, "the archive has nothing of it since the backup")
    if result is Part.READ:
        # It was retired after the backup was made.
        registry.retire_lost(engine, key)
    transact(engine, lambda connection: standing.set_part(connection, found.generation, server.id, result, offers=store.count, note=note))
    return Lost(given_up, result, store.count, note)


def finish(engine: Engine, settings: Settings, now: dt.datetime, advance: Callable[[int], None] = lambda _: None) -> Report:
    """Complete the ledger and let the servers send again. A killed call may be repeated.

    Raises `DispatchError` while a server's log or the settlement of its claims is awaited.
    """
    with reading(engine) as connection:
        found = standing.newest(connection)
        if found is None or not found.is_open:
            raise DispatchError("no recovery has begun")
        if awaited := found.awaited():
            raise DispatchError(f"the logs of {', '.join(awaited)} are not read yet")
        if count := applying.open_claims(connection):
            raise DispatchError(f"{count} claims of the restored database are not settled yet")
        told = applying.campaigns(connection)
        known = {row.id: row for row in connection.execute(sa.select(Campaign.id, Campaign.key, Campaign.state))}
    report = Report(uncovered=found.uncovered())
    for campaign_id in told:
        if campaign_id not in known:
            report.lost.update(transact(engine, lambda connection, lost=campaign_id: _remember_lost(connection, lost, now)))  # type: ignore[misc]
        elif ends := applying.apply(engine, campaign_id, settings.sending, now, advance):
            report.ends[known[campaign_id].key] = ends
    if report.uncovered:
        report.doubtful = sum(applying.doubt(engine, campaign.id, now) for campaign in known.values() if campaign.state in _UNDER_WAY)
    report.mails_again = _read_mail_again(settings, found)

    def work(connection: Connection) -> None:
        to_be_frozen = sa.select(Campaign.id).where(Campaign.state.in_([state.value for state in _TO_BE_FROZEN]))
        # A contact that the backup does not have may give its number to another one.
        needed = sa.and_(RecoveredOffer.campaign_id.in_(to_be_frozen), RecoveredOffer.contact_id.in_(sa.select(Contact.id)))
        connection.execute(sa.delete(RecoveredOffer).where(~needed))
        standing.finish(connection, found.generation, now)

    transact(engine, work)
    return report


def _remember_lost(connection: Connection, campaign_id: int, now: dt.datetime) -> dict[str, int]:
    """Keep the id of a campaign that the backup does not have, or answers to its mail would be taken for those to another one's."""
    offers = connection.execute(sa.select(sa.func.count()).select_from(RecoveredOffer).where(RecoveredOffer.campaign_id == campaign_id)).scalar_one()
    brand = connection.execute(sa.select(sa.func.min(Brand.id))).scalar_one()
    key = f"lost-{campaign_id}"
    if brand is not None:
        connection.execute(
            sa.insert(Campaign).values(
                id=campaign_id,
                key=key,
                name=f"Campaign {campaign_id}, which the restored backup does not have",
                state=CampaignState.CANCELLED.value,
                brand_id=brand,
                segments={"include": [], "exclude": []},
                unsubscribe="all",
                on_unknown="hold",
                priority=1,
                created_at=now,
                updated_at=now,
                finished_at=now,
            )
        )
    return {key: offers}


def _read_mail_again(settings: Settings, found: Standing) -> int:
    """Have mail that came back since the backup read once more, for what it said is forgotten; how many messages."""
    beats = [part.heartbeat_at for part in found.servers if part.heartbeat_at is not None]
    since = min(beats) - OVERLAP if beats else dt.datetime.fromtimestamp(0, dt.UTC)
    return sum(maildir.read_again(folder, since) for folder in InboundFolders.of(settings.inbound).maildirs())
