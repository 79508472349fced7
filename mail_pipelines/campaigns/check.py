"""What would keep a campaign from working, found before it is scheduled: all of it at once, each with its place.

What belongs here: checks on one campaign against the database, the settings, the snapshots and, by `domains.checking`, the DNS.
Nothing is written but the DNS's verdict on the From domain.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import members, store, versions
from mail_pipelines.campaigns.campaign import EXPIRES_AFTER, Campaign, CampaignError, Definition
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import ConfigError, Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.messages.content import Content, ContentError
from mail_pipelines.segments import saved
from mail_pipelines.segments.catalogue import read_catalogue
from mail_pipelines.segments.criteria import CriteriaError, parse
from mail_pipelines.segments.store import SnapshotError

# Its spans in all time zones are kept in the database, about 600 for each day.
LONGEST_WITH_WINDOW = dt.timedelta(days=31)


@dataclass(frozen=True)
class Problem:
    """One thing that cannot work. `part` is the place in the campaign's YAML form (or `settings`); `line` counts from 1 within a template."""

    part: str
    message: str
    line: int | None = None
    variable: str | None = None

    def __str__(self) -> str:
        return self.message if self.message.startswith(self.part) else f"{self.part}: {self.message}"


class CheckFailed(CampaignError):
    """The campaign cannot be scheduled; `problems` says why, as does the message, one in a line."""

    def __init__(self, key: str, problems: list[Problem]) -> None:
        super().__init__(f"campaign {key} cannot be scheduled:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


def check(
    engine: Engine, settings: Settings, key: str, now: dt.datetime, *, start_at: dt.datetime | None = None, allow_unverified: bool = False
) -> list[Problem]:
    """Everything that would keep the campaign from working; an empty list means it can be scheduled.

    `start_at` is checked instead of the campaign's own start. The DNS is asked about the From domain, which may take
    `dns.timeout_seconds`, unless the caller or the settings `allow_unverified`. Raises `CampaignError` if there is no such campaign.
    """
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        version = versions.current(connection, campaign)
        problems = [*_times(campaign, now, start_at, settings.sending.lease_seconds), *_content(connection, version)]
    named = [*_segments(engine, campaign.definition)]
    problems += [*_sender(settings, campaign, now), *named]
    if version is not None and settings.sending.token_key:
        problems += _signing(engine, settings, campaign, version.content)
    if not named:
        problems += _audience(engine, settings, campaign.definition, now)
    if version is not None and not (allow_unverified or settings.sending.allow_unverified):
        problems += _from_domain(engine, settings, version.content, now)
    return problems


def _times(campaign: Campaign, now: dt.datetime, start_at: dt.datetime | None, lease_seconds: float) -> Iterator[Problem]:
    definition = campaign.definition if start_at is None else replace(campaign.definition, start_at=start_at)
    # Once scheduled, a start that has passed is late, not wrong.
    if definition.start_at is not None and definition.start_at < now and campaign.state is CampaignState.DRAFT:
        yield Problem("start_at", f"{definition.start_at.isoformat()} is in the past")
    begin = definition.start_at or now
    if definition.finish_by is not None and definition.finish_by <= begin:
        yield Problem("finish_by", f"{definition.finish_by.isoformat()} is not after the start, {begin.isoformat()}")
    if definition.expire_at is not None and definition.expire_at <= begin:
        yield Problem("expire_at", f"{definition.expire_at.isoformat()} is not after the start, {begin.isoformat()}")
    yield from _window(definition, begin, lease_seconds)


def _window(definition: Definition, begin: dt.datetime, lease_seconds: float) -> Iterator[Problem]:
    """Whether the campaign's own time zone has an opening; of contacts in others it depends on who is in the audience."""
    if (window := definition.window) is None:
        return
    end = definition.expire_at or begin + EXPIRES_AFTER
    if end - begin > LONGEST_WITH_WINDOW:
        yield Problem("expire_at", f"a campaign with a send window may last {LONGEST_WITH_WINDOW.days} days, not until {end.isoformat()}")
        return
    first, last = int(begin.timestamp()), int(end.timestamp())
    # Nothing is claimed that would have to be out after the window's end.
    spans = [(opens, closes) for opens, closes in (window.spans(window.zone, first, last) if first < last else ()) if closes - opens > lease_seconds]
    expires = "expire_at" if definition.expire_at else "48 hours after the start"
    if not spans:
        yield Problem(
            "window",
            f"it never opens in {window.zone} between {begin.isoformat()} and {end.isoformat()} ({expires}): start at another time, "
            f"expire later, or widen it: it has to be open for more than {lease_seconds:g} s (sending.lease_seconds)",
        )
    elif definition.finish_by is not None and begin < definition.finish_by and spans[0][0] >= int(definition.finish_by.timestamp()):
        opens = dt.datetime.fromtimestamp(spans[0][0], dt.UTC).isoformat()
        yield Problem("finish_by", f"the send window opens in {window.zone} only at {opens}, not before {definition.finish_by.isoformat()}")


def _content(connection: Connection, version: versions.Version | None) -> Iterator[Problem]:
    from mail_pipelines.messages.compilation import compile_content

    try:
        if version is None:
            yield Problem("content", "there is none: add subject, from_address and body")
            return
        # Numbers that stand for link ids: a check leaves no trace.
        compile_content(version.content, versions.field_types(connection), lambda urls: range(1, len(urls) + 1))
    except ContentError as error:
        yield Problem(f"content.{error.part}", f"content.{error}", error.line, error.variable)


def _from_domain(engine: Engine, settings: Settings, content: Content, now: dt.datetime) -> Iterator[Problem]:
    """Mail from a domain without DKIM key, DMARC record and alignment is refused by the large providers, and spoils the domain's name."""
    from mail_pipelines.domains import checking
    from mail_pipelines.domains.domain import DomainError

    part = "content.from_address"
    try:
        for finding in checking.check(engine, settings, content.from_domain, now).hindrances:
            yield Problem(part, str(finding))
    except DomainError as error:
        yield Problem(part, str(error))


def _signing(engine: Engine, settings: Settings, campaign: Campaign, content: Content) -> Iterator[Problem]:
    """A server with a token key of its own cannot open the DKIM key of all servers: without one of its own its share of the campaign would wait."""
    from mail_pipelines.dispatch import pools, token_keys
    from mail_pipelines.domains import store as domains

    with reading(engine) as connection:
        allowed = pools.of_campaign(connection, campaign.id)
        servers = [server for server in token_keys.with_own(token_keys.remote(connection), settings.token_key()) if server.pool_id in allowed]
        lacking = domains.without_key(connection, [server.id for server in servers])
    for server in servers:
        if content.from_domain in lacking.get(server.id, ()):
            advice = f"`mail-pipelines server dkim {server.key}` makes it"
            yield Problem("content.from_address", f"server {server.key} has no DKIM key of its own for {content.from_domain}: {advice}")


def _sender(settings: Settings, campaign: Campaign, now: dt.datetime) -> Iterator[Problem]:
    from mail_pipelines.messages.composing import SenderError, SenderIdentity

    sending = settings.sending
    try:
        SenderIdentity(settings.token_key(), sending.return_path_domain, sending.public_url, now, campaign.key, campaign.definition.brand, "server")
    except (ConfigError, SenderError) as error:
        yield Problem("settings", str(error))


def _segments(engine: Engine, definition: Definition) -> Iterator[Problem]:
    if not definition.include:
        yield Problem("segments.include", "is empty: name at least one segment")
    with reading(engine) as connection:
        catalogue = read_catalogue(connection)
    for part, keys in (("include", definition.include), ("exclude", definition.exclude)):
        for number, key in enumerate(keys):
            place = f"segments.{part}[{number}]"
            try:
                parse(saved.load(engine, key).criteria, catalogue)
            except saved.SegmentError as error:
                yield Problem(place, str(error))
            except CriteriaError as error:
                yield Problem(place, f"segment {key}: {error}")


def _audience(engine: Engine, settings: Settings, definition: Definition, now: dt.datetime) -> Iterator[Problem]:
    try:
        found, _ = members.matched(engine, settings, definition, now)
        if found.num_rows == 0:
            yield Problem("segments", "nobody matches: the audience would be empty")
    except (SnapshotError, CampaignError) as error:
        yield Problem("segments", str(error))
