"""Why somebody did or did not get a campaign: segment and criterion, freeze, claim, server, every reply, later events. Reads only.

The ledger knows of everybody in a frozen audience. That of an old campaign is in the archive, which is looked at after the database, since nothing is
deleted there before it is in the archive. Of those who are not in it the freeze kept only how many there were for each reason, so the reason of one person
is found by what is known now, and says so.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import store
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.contacts.addresses import Address, parse
from mail_pipelines.contacts.consent import Scope, campaign_scopes
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Contact, Delivery, DeliveryEvent, EngagementEvent, EngagementSum, Server, State, Subscription, Suppression
from mail_pipelines.delivery import evidence, retention
from mail_pipelines.delivery.events import DEFERRED
from mail_pipelines.delivery.ledger_archive import ArchivedClaim, Event, LedgerArchive, LedgerArchiveError, Manifest, Recipient
from mail_pipelines.dispatch import windows
from mail_pipelines.segments import explaining, saved
from mail_pipelines.segments.criteria import CriteriaError
from mail_pipelines.segments.saved import SegmentError
from mail_pipelines.segments.snapshots import Snapshots, open_snapshots
from mail_pipelines.segments.store import SnapshotMissing

# Without a campaign's name: so many of the newest.
RECENT_CAMPAIGNS = 20
_LAST = dt.datetime.max.replace(tzinfo=dt.UTC)
_MISSED = "came to the end of its time: its send window did not open again before"
_NOT_FROZEN = "its audience is not frozen yet"
_ENDED = {
    State.PENDING: "waits for its turn",
    State.CLAIMED: "is being sent",
    State.DELIVERED: "was taken by the destination",
    State.DEFERRED: "was put off by the destination, and is tried again",
    State.BOUNCED: "was refused for good",
    State.SUPPRESSED: "was left out at the last moment: suppressed after the freeze",
    State.EXPIRED: "came to the end of its time",
    State.CANCELLED: "ended with the campaign's cancellation",
    State.UNKNOWN: "is in doubt: nobody recorded what the destination said",
    State.UNRESOLVED: "stayed in doubt: what the destination said was never found out",
}


@dataclass(frozen=True)
class Moment:
    """One thing that happened; `at` is None for what has no time of its own."""

    at: dt.datetime | None
    what: str


@dataclass(frozen=True)
class Answer:
    """Why one address did or did not get one campaign: in a sentence, and what happened, in order."""

    campaign: str
    verdict: str
    moments: list[Moment] = field(default_factory=list)


@dataclass(frozen=True)
class _Person:
    """An address, and the contact that has it now, if there is one."""

    address: Address
    contact_id: int | None
    created_at: dt.datetime | None


@dataclass(frozen=True)
class _Row:
    """What the ledger or the archive has of one recipient. `server` is the key of the last claim's."""

    contact_id: int
    provider: str
    shard: int
    state: State
    sort_key: int
    attempt: int
    claim_id: int | None
    words: str
    server: str | None
    # Of a row that waits for its send window, or missed it: what there is to say of that.
    window: str


def recent(engine: Engine, settings: Settings, email: str) -> list[Answer]:
    """The newest campaigns, newest first, each with its sentence alone. Raises `AddressError`."""
    archive = LedgerArchive(settings.campaigns.archive)
    with reading(engine) as connection:
        person = _person(connection, email)
        campaigns = store.select(connection, models.Campaign.id > 0, order_by=(models.Campaign.id.desc(),), limit=RECENT_CAMPAIGNS)
        return [Answer(campaign.key, _verdict(connection, campaign, person, archive)) for campaign in campaigns]


def _verdict(connection: Connection, campaign: Campaign, person: _Person, archive: LedgerArchive) -> str:
    try:
        return _sentence(campaign, _row(connection, campaign, person, archive))
    except LedgerArchiveError as error:
        return f"not known now: {error}"


def of_campaign(engine: Engine, settings: Settings, email: str, key: str, now: dt.datetime) -> Answer:
    """Everything known of one address in one campaign.

    Raises `AddressError`, `CampaignError` for a campaign that does not exist, `LedgerArchiveError` if it is in an archive that is away.
    """
    archive = LedgerArchive(settings.campaigns.archive)
    with reading(engine) as connection:
        person = _person(connection, email)
        campaign = store.load(connection, key)
        row = _row(connection, campaign, person, archive)
        if row is not None:
            kept_from = retention.first_kept(now.date(), settings.retention.deferral_months)
            return Answer(key, _sentence(campaign, row), _history(connection, campaign, row, archive, kept_from))
        kept_out = [*_consent(connection, campaign, person), *_late(campaign, person)]
    if person.contact_id is not None:
        kept_out += _segments(engine, settings, campaign, person.contact_id, now)
    return Answer(key, _sentence(campaign, None), kept_out or [Moment(None, "nothing known now keeps it out: what did has changed since the freeze")])


def _person(connection: Connection, email: str) -> _Person:
    address = parse(email)
    found = connection.execute(sa.select(Contact.id, Contact.created_at).where(Contact.address_hash == address.hash)).one_or_none()
    return _Person(address, *(found or (None, None)))


def _row(connection: Connection, campaign: Campaign, person: _Person, archive: LedgerArchive) -> _Row | None:
    """The row of the address, also when its contact was erased since."""
    columns = [getattr(Delivery, name) for name in Recipient._fields]
    query = sa.select(*columns).where(Delivery.campaign_id == campaign.id, Delivery.address_hash == person.address.hash)
    found = connection.execute(query).one_or_none()
    manifest = _manifest(connection, campaign)
    row = Recipient(*found) if found else archive.recipient_of(campaign.id, manifest, person.address.hash) if manifest else None
    if row is None:
        return None
    state, words = State(row.state), _words(row.code, row.enhanced, row.reason)
    if manifest is not None or campaign.state is CampaignState.ARCHIVED:
        events = {(event.attempt, event.kind) for event in _events(connection, campaign, row.contact_id, archive)}
        state = evidence.known(row.state, row.attempt, events, is_archived=True).state
        # What was said instead is among the events.
        words = words if state == row.state else ""
    server = connection.execute(sa.select(Server.key).where(Server.id == row.server_id)).scalar_one_or_none()
    window = _window(connection, campaign, row.contact_id, state, row.sort_key, row.reason)
    return _Row(row.contact_id, row.provider, row.shard, state, row.sort_key, row.attempt, row.claim_id, words, server, window)


def _window(connection: Connection, campaign: Campaign, contact_id: int, state: State, sort_key: int, reason: str | None) -> str:
    """What is to be said of the send window of a row that waits for it, or expired without it; nothing of others."""
    window = campaign.definition.window
    if window is None or reason not in (windows.WAITS, windows.NEVER) or state not in (State.DEFERRED, State.EXPIRED):
        return ""
    if reason == windows.NEVER:
        return "is outside its send window, which does not open again before the campaign's end" if state is State.DEFERRED else _MISSED
    if state is State.EXPIRED:
        return ""
    name = connection.execute(sa.select(Contact.time_zone).where(Contact.id == contact_id)).scalar_one_or_none()
    spans = windows.read(connection, campaign.id, {name} if name else set())
    zone = spans.zone(name)
    opens = spans.opened(zone, sort_key) or sort_key
    own = zone or window.zone
    local = dt.datetime.fromtimestamp(opens, ZoneInfo(own))
    return f"waits for its send window, which opens {local:%Y-%m-%d %H:%M} in {own} ({local.astimezone(dt.UTC):%H:%M} UTC)"


def _manifest(connection: Connection, campaign: Campaign) -> Manifest | None:
    """The files of the campaign, as of now: what was not found in the database before is in them."""
    manifest: Manifest | None = connection.execute(sa.select(models.Campaign.archive).where(models.Campaign.id == campaign.id)).scalar_one()
    return manifest


def _events(connection: Connection, campaign: Campaign, contact_id: int, archive: LedgerArchive) -> list[Event]:
    """What was said of the message, from the database and the archive, in order."""
    columns = [getattr(DeliveryEvent, name) for name in Event._fields]
    query = sa.select(*columns).where(DeliveryEvent.campaign_id == campaign.id, DeliveryEvent.contact_id == contact_id)
    found = {event.id: event for event in (Event(*row) for row in connection.execute(query))}
    if (manifest := _manifest(connection, campaign)) is not None:
        found |= {event.id: event for event in archive.events(campaign.id, manifest, [contact_id])}
    return sorted(found.values(), key=lambda event: (event.occurred_at, event.id))


def _sentence(campaign: Campaign, row: _Row | None) -> str:
    if row is None:
        return "not in the audience" if campaign.audience_manifest is not None else _NOT_FROZEN
    state = row.state
    through = f", through {row.server}" if row.server and state in (State.DELIVERED, State.BOUNCED, State.DEFERRED, State.UNKNOWN, State.CLAIMED) else ""
    if row.window:
        return f"{state.name.lower()}: it {row.window}"
    return f"{state.name.lower()}{through}: it {_ENDED[state]}"


# --- in the audience ---


def _history(connection: Connection, campaign: Campaign, row: _Row, archive: LedgerArchive, kept_from: int) -> list[Moment]:
    size = (campaign.audience_counts or {}).get("audience", 0)
    segments = ", ".join(campaign.definition.include)
    began = Moment(campaign.started_at, f"frozen into the audience of {size:,} (segments {segments}), shard {row.shard}, provider {row.provider}")
    state = row.state
    # Of a row that waits for its turn, the key of its order is no time.
    reached = None if state is State.PENDING else dt.datetime.fromtimestamp(row.sort_key, dt.UTC)
    ended = Moment(reached, f"{'due again' if state is State.DEFERRED else state.name.lower()}{row.words}")
    happened = [*_claims(connection, campaign, row, archive), *_said(connection, campaign, row, archive), *_did(connection, campaign, row), ended]
    forgotten = _forgotten(connection, campaign, row, archive) if _month(campaign.started_at) < kept_from else []
    return [began, *forgotten, *sorted(happened, key=lambda moment: moment.at or _LAST)]


def _claims(connection: Connection, campaign: Campaign, row: _Row, archive: LedgerArchive) -> list[Moment]:
    """The last claim, if it is kept."""
    if row.claim_id is None:
        return []
    columns = [getattr(Claim, name) for name in ArchivedClaim._fields]
    found = connection.execute(sa.select(*columns).where(Claim.id == row.claim_id)).one_or_none()
    manifest = _manifest(connection, campaign)
    claim = ArchivedClaim(*found) if found else archive.claim(campaign.id, manifest, row.claim_id) if manifest else None
    return [] if claim is None else [Moment(claim.opened_at, f"claim {claim.id} on {_servers(connection)[claim.server_id]}, run {claim.run_id}")]


def _said(connection: Connection, campaign: Campaign, row: _Row, archive: LedgerArchive) -> list[Moment]:
    servers, found = _servers(connection), []
    for event in _events(connection, campaign, row.contact_id, archive):
        through = f" through {servers[event.server_id]}" if event.server_id in servers else ""
        words = _words(event.code, event.enhanced, event.reason, event.text)
        found.append(Moment(event.occurred_at, f"attempt {event.attempt}{through}: {event.kind}{words}"))
    return found


def _month(moment: dt.datetime | None) -> int:
    return 0 if moment is None else moment.year * 100 + moment.month


def _forgotten(connection: Connection, campaign: Campaign, row: _Row, archive: LedgerArchive) -> list[Moment]:
    """Attempts of which only the number is known: the answers were dropped with those of their month (`delivery.retention`)."""
    told = {event.attempt for event in _events(connection, campaign, row.contact_id, archive) if event.kind == DEFERRED}
    missing = len(set(range(row.attempt)) - told)
    if not missing:
        return []
    times = "once" if missing == 1 else f"{missing} times"
    return [Moment(None, f"put off {times} before: answers of so long ago are not kept")]


def _servers(connection: Connection) -> dict[int | None, str]:
    return dict(connection.execute(sa.select(Server.id, Server.key)).tuples().all())


def _did(connection: Connection, campaign: Campaign, row: _Row) -> list[Moment]:
    """What the recipient did, event by event; of what is long ago, when first and last and how often."""
    event, kept = EngagementEvent, EngagementSum
    events = sa.select(event.occurred_at.label("first_at"), event.occurred_at.label("last_at"), event.kind, event.machine, sa.literal(0).label("times"))
    sums = sa.select(kept.first_at, kept.last_at, kept.kind, kept.machine, kept.count.label("times"))
    # One statement: an event is not moved to the sums in between.
    query = sa.union_all(
        events.where(event.contact_id == row.contact_id, event.campaign_id == campaign.id),
        sums.where(kept.contact_id == row.contact_id, kept.campaign_id == campaign.id),
    )
    found = []
    for first_at, last_at, kind, machine, times in connection.execute(query).tuples():
        more = f", {times} times until {last_at:%Y-%m-%d %H:%M:%S} UTC, of which only this sum is kept" if times > 1 else ""
        found.append(Moment(first_at, f"{kind}{' by a machine' if machine else ''}{more}"))
    return found


def _words(*parts: object) -> str:
    said = " ".join(str(part) for part in parts if part)
    return f", {said}" if said else ""


# --- not in it ---


def _consent(connection: Connection, campaign: Campaign, person: _Person) -> list[Moment]:
    """What the database forbids of this campaign to this address."""
    scopes = campaign_scopes(campaign.brand_id, campaign.list_id)
    in_scope = sa.or_(*(_is(scope) for scope in scopes))
    mine = sa.or_(Suppression.address_hash == person.address.hash, Suppression.domain == person.address.domain)
    query = sa.select(Suppression.created_at, Suppression.reason, Suppression.domain, Suppression.scope_kind).where(mine, in_scope)
    found = [
        Moment(at, f"{f'the domain {domain}' if domain else 'the address'} is suppressed ({reason}) for {'everything' if kind == 'all' else f'this {kind}'}")
        for at, reason, domain, kind in connection.execute(query).tuples()
    ]
    if person.contact_id is None:
        return [*found, Moment(None, "there is no contact with this address: never imported, or erased")]
    if campaign.list_id is not None:
        ended = sa.select(Subscription.changed_at).where(
            Subscription.contact_id == person.contact_id, Subscription.list_id == campaign.list_id, Subscription.subscribed.is_(False)
        )
        found += [Moment(at, f"unsubscribed from the list {campaign.definition.list}") for at in connection.execute(ended).scalars()]
    return found


def _is(scope: Scope) -> sa.ColumnElement[bool]:
    return sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id)


def _late(campaign: Campaign, person: _Person) -> list[Moment]:
    if person.created_at is None or campaign.started_at is None or person.created_at <= campaign.started_at:
        return []
    return [Moment(person.created_at, f"the contact was added after the campaign began ({campaign.started_at:%Y-%m-%d %H:%M:%S} UTC)")]


def _segments(engine: Engine, settings: Settings, campaign: Campaign, contact_id: int, now: dt.datetime) -> list[Moment]:
    """What keeps a contact out of the segments as they are saved now, on the newest snapshots."""
    try:
        with open_snapshots(engine, settings.snapshot_folder) as snapshots:
            made = snapshots.contacts.made_at
            if not explaining.is_known(snapshots, contact_id, now):
                return [Moment(made, "the contact is not in the snapshot of this time, which segments are evaluated on")]
            return [Moment(made, what) for what in _kept_out(engine, campaign, snapshots, contact_id, now)]
    except SnapshotMissing as error:
        return [Moment(None, f"segments cannot be looked at: {error}")]


def _kept_out(engine: Engine, campaign: Campaign, snapshots: Snapshots, contact_id: int, now: dt.datetime) -> list[str]:
    def look(key: str) -> tuple[list[explaining.Unmet], str]:
        try:
            return explaining.unmet(saved.load(engine, key).criteria, snapshots, contact_id, now), ""
        except (SegmentError, CriteriaError) as error:
            return [], str(error)

    found: list[str] = []
    for key in campaign.definition.exclude:
        unmet, problem = look(key)
        if problem:
            found.append(f"segment {key}: {problem}")
        elif not unmet:
            found.append(f"in segment {key}, which the campaign excludes")
    included = {key: look(key) for key in campaign.definition.include}
    if all(unmet or problem for unmet, problem in included.values()):
        for key, (unmet, problem) in included.items():
            found += [f"segment {key}: {problem}"] if problem else [f"not in segment {key}: {one}" for one in unmet]
    return found
