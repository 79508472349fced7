"""Recipients in doubt: what is known of each, and decisions about them by hand, each with who made it and why.

What belongs here: choosing unknown rows by campaign, claim or recipient, their evidence, the decision. What does not: what is done
without being asked (`overdue`, `lifecycle`), and the changes of the ledger themselves (`delivery.resolving`, `resending`).
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import resending, store
from mail_pipelines.campaigns.campaign import CampaignError, OnUnknown
from mail_pipelines.campaigns.open_rows import BY_STATE, Slice, in_slice, slices
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.config import Settings
from mail_pipelines.contacts.addresses import mask
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, Contact, Delivery, DeliveryEvent, Server, State
from mail_pipelines.delivery import counters, resolving
from mail_pipelines.delivery.events import mask_addresses, resent_among
from mail_pipelines.delivery.recording import Result
from mail_pipelines.dispatch import tail
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.messages.keyring import derive
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery

_RUNNING = (CampaignState.SENDING, CampaignState.PAUSED)
_ROWS_A_TRANSACTION = 5_000


class Verdict(enum.StrEnum):
    """What an unknown row is decided to be. A resent message is the same attempt and carries the same Message-ID."""

    DELIVERED = "delivered"
    RESEND = "resend"
    UNRESOLVED = "unresolved"


_STATES = {Verdict.DELIVERED: State.DELIVERED, Verdict.UNRESOLVED: State.UNRESOLVED}


@dataclass(frozen=True)
class Scope:
    """The unknown rows of a campaign, or those of one claim or recipient in it."""

    campaign_id: int
    claim_id: int | None = None
    contact_id: int | None = None

    def condition(self) -> list[sa.ColumnElement[bool]]:
        """What a ledger row has to meet beside being unknown and of the campaign."""
        found: list[sa.ColumnElement[bool]] = []
        if self.claim_id is not None:
            found.append(Delivery.claim_id == self.claim_id)
        if self.contact_id is not None:
            found.append(Delivery.contact_id == self.contact_id)
        return found


@dataclass(frozen=True)
class Doubt:
    """An unknown row. `since` is when it became so, `sent_again` whether it had been decided once to send it again."""

    contact_id: int
    attempt: int
    address: str
    provider: str
    claim_id: int | None
    server: str
    since: dt.datetime
    reason: str
    sent_again: bool


@dataclass(frozen=True)
class Event:
    """What is remembered of a message: when, what, by which code or decision, in which words."""

    at: dt.datetime
    kind: str
    attempt: int
    code: int | None
    enhanced: str | None
    reason: str
    text: str


@dataclass(frozen=True)
class Evidence:
    """All that is known of an unknown row. `lines` is None where the server's log is on another host."""

    doubt: Doubt
    opened_at: dt.datetime | None
    closed_at: dt.datetime | None
    run_id: str
    events: tuple[Event, ...]
    lines: tuple[str, ...] | None


def scope_of(connection: Connection, *, campaign: str | None = None, claim_id: int | None = None, contact_id: int | None = None) -> Scope:
    """The scope an operator names: a campaign's key, a claim's id, or both; a recipient only with one of them. Raises `CampaignError`."""
    campaign_id = store.load(connection, campaign).id if campaign is not None else None
    if claim_id is not None:
        of_claim = connection.execute(sa.select(Claim.campaign_id).where(Claim.id == claim_id)).scalar_one_or_none()
        if of_claim is None:
            raise CampaignError(f"there is no claim {claim_id}: claims are kept for two weeks after their campaign; name the campaign instead")
        if campaign_id not in (None, of_claim):
            raise CampaignError(f"claim {claim_id} is of another campaign than {campaign}")
        campaign_id = of_claim
    if campaign_id is None:
        raise CampaignError("name a campaign (--campaign KEY) or a claim (--claim ID)")
    return Scope(campaign_id, claim_id, contact_id)


def with_doubts(connection: Connection) -> dict[str, int]:
    """Campaigns that have unknown rows, by key: how many, by the counters."""
    rows = sa.func.sum(models.CampaignCounter.count)
    query = (
        sa.select(models.Campaign.key, rows)
        .join(models.CampaignCounter, models.CampaignCounter.campaign_id == models.Campaign.id)
        .where(models.CampaignCounter.state == int(State.UNKNOWN))
        .group_by(models.Campaign.key)
        .having(rows > 0)
        .order_by(models.Campaign.key)
    )
    return {key: int(count) for key, count in connection.execute(query).tuples()}


def doubts(connection: Connection, scope: Scope, limit: int) -> list[Doubt]:
    """The first unknown rows of the scope, with masked addresses."""
    found: list[Doubt] = []
    for part in slices(connection, scope.campaign_id, (State.UNKNOWN,)):
        rows = connection.execute(
            sa.select(Delivery.contact_id, Delivery.attempt, Contact.email, Delivery.claim_id, Server.key, Delivery.sort_key, Delivery.reason)
            .outerjoin(Contact, Contact.id == Delivery.contact_id)
            .outerjoin(Server, Server.id == Delivery.server_id)
            .where(*in_slice(scope.campaign_id, part), *scope.condition())
            .order_by(Delivery.sort_key, Delivery.contact_id)
            .limit(limit - len(found))
        ).all()
        twice = resent_among(connection, scope.campaign_id, [row.contact_id for row in rows])
        found += [
            Doubt(
                row.contact_id,
                row.attempt,
                mask(row.email) if row.email else "erased",
                part.provider,
                row.claim_id,
                row.key or "",
                dt.datetime.fromtimestamp(row.sort_key, dt.UTC),
                row.reason or "",
                row.contact_id in twice,
            )
            for row in rows
        ]
        if len(found) >= limit:
            break
    return found


def evidence(engine: Engine, settings_of: Callable[[str], Settings], campaign: str, contact_id: int, now: dt.datetime) -> Evidence:
    """What is known of one unknown row, addresses masked. `settings_of`: those by which a server is spoken for here.

    Raises `CampaignError` if the recipient is not unknown in this campaign.
    """
    with reading(engine) as connection:
        scope = scope_of(connection, campaign=campaign, contact_id=contact_id)
        rows = doubts(connection, scope, 1)
        if not rows:
            raise CampaignError(f"recipient {contact_id} of {campaign} is not unknown: see `mail-pipelines unknown list --campaign {campaign}`")
        (doubt,) = rows
        claim = connection.execute(
            sa.select(Claim.opened_at, Claim.closed_at, Claim.run_id, Claim.journal_inode, Claim.journal_offset, Server.key, Server.kind)
            .join(Server, Server.id == Claim.server_id)
            .where(Claim.id == doubt.claim_id)
        ).one_or_none()
        columns = (DeliveryEvent.occurred_at, DeliveryEvent.kind, DeliveryEvent.attempt, DeliveryEvent.code, DeliveryEvent.enhanced)
        said = connection.execute(
            sa.select(*columns, DeliveryEvent.reason, DeliveryEvent.text)
            .where(DeliveryEvent.campaign_id == scope.campaign_id, DeliveryEvent.contact_id == contact_id)
            .order_by(DeliveryEvent.occurred_at)
        ).all()
    events = tuple(Event(row.occurred_at, row.kind, row.attempt, row.code, row.enhanced, row.reason or "", row.text or "") for row in said)
    if claim is None:
        return Evidence(doubt, None, None, "", events, None)
    settings = settings_of(claim.key)
    folders = ServerFolders.of(settings.server, claim.key)
    lines: tuple[str, ...] | None = None
    if folders.journal.exists():
        message, start = DeliveryToken(scope.campaign_id, contact_id, doubt.attempt), Position(claim.journal_inode, claim.journal_offset)
        keys = [settings.token_key()]
        if settings.this_server is None:
            # The installation's: a server of the same host may have one of its own.
            keys.append(derive(keys[0], claim.key))
        tokens = [sign_delivery(message, key) for key in keys]
        found = [line for token in tokens for line in tail.lines_about(journal_of(folders, claim.kind), start, token, now.timestamp())]
        lines = tuple(mask_addresses(line.decode("utf-8", "backslashreplace")) for line in found)
    return Evidence(doubt, claim.opened_at, claim.closed_at, claim.run_id, events, lines)


def decide(engine: Engine, scope: Scope, verdict: Verdict, now: dt.datetime, *, who: str, why: str, confirmed: bool = False) -> int:
    """Make all unknown rows of the scope what `verdict` says; returns how many. Who decided it, when and why becomes an event of each.

    Sending again needs a campaign that is sending or paused, and its `on_unknown: resend` or `confirmed`. Raises `StateError` otherwise,
    `CampaignError` without a reason. A killed call may be repeated.
    """
    if not why.strip():
        raise CampaignError("a decision needs its reason (--why TEXT), which is kept with each recipient")
    source = resolving.Source(verdict.value, f"{who}: {why.strip()}", number=str(uuid.uuid4()))
    if verdict is Verdict.RESEND:
        with reading(engine) as connection:
            campaign = store.select(connection, models.Campaign.id == scope.campaign_id)[0]
        if campaign.state not in _RUNNING:
            raise StateError(f"campaign {campaign.key} is {campaign.state}: only a sending or paused campaign can send again")
        if campaign.definition.on_unknown is not OnUnknown.RESEND and not confirmed:
            raise StateError(f"campaign {campaign.key} has on_unknown: hold; sending again may reach people twice, so it needs your explicit yes (--yes)")
        return resending.send_again(engine, campaign.id, now, _RUNNING, only=scope.condition(), decision=source)
    with reading(engine) as connection:
        parts = slices(connection, scope.campaign_id, (State.UNKNOWN,))
    return sum(_end_slice(engine, scope, part, _STATES[verdict], source, now) for part in parts)


def _end_slice(engine: Engine, scope: Scope, part: Slice, state: State, source: resolving.Source, now: dt.datetime) -> int:
    def work(connection: Connection) -> int:
        rows = connection.execute(
            sa.select(Delivery.contact_id, Delivery.attempt)
            .where(*in_slice(scope.campaign_id, part), *scope.condition())
            .order_by(Delivery.sort_key, Delivery.contact_id)
            .limit(_ROWS_A_TRANSACTION)
            .with_hint(Delivery, BY_STATE, "mysql")
            .with_hint(Delivery, BY_STATE, "mariadb")
            .with_for_update()
        ).all()
        results = [Result(row.contact_id, row.attempt, state) for row in rows]
        return resolving.resolve(connection, scope.campaign_id, counters.CENTRE, results, source, now).total() if results else 0

    ended = 0
    while count := transact(engine, work):
        ended += count
    return ended
