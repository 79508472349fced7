"""The content of a campaign as numbered versions, which never change: what was written, and what servers fill in, known by its hash.

What belongs here: when a new version may be made, its links, its compiled form. What does not: templates and MIME (`messages`).
A draft may hold a content that cannot be compiled yet; its version has no compiled form, and `check` says why. From scheduled
on the campaign's version is compiled.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import store
from mail_pipelines.campaigns.campaign import Campaign, CampaignError
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.messages.content import Content, ContentError

_RUNNING = (CampaignState.SENDING, CampaignState.PAUSED)


@dataclass(frozen=True)
class Version:
    """One content version. `sha256` is the digest of the compiled form; both are empty while the content cannot be compiled."""

    id: int
    number: int
    content: Content
    sha256: str
    compiled: bytes


def current(connection: Connection, campaign: Campaign) -> Version | None:
    """The version that rows claimed from now on get; None for a campaign without content."""
    if campaign.version_id is None:
        return None
    row = connection.execute(sa.select(models.CampaignVersion.__table__).where(models.CampaignVersion.id == campaign.version_id)).one()
    return _version(row)


def _version(row: sa.Row[Any]) -> Version:
    return Version(row.id, row.number, Content.from_document(row.source), row.sha256, row.compiled)


def field_types(connection: Connection) -> dict[str, str]:
    """The fields a content may read: key → type."""
    return {row.key: row.type for row in connection.execute(sa.select(models.Field.key, models.Field.type))}


def set_content(engine: Engine, key: str, content: Content, now: dt.datetime, *, confirmed: bool = False) -> Version:
    """Give the campaign this content; the version that results, which is the present one if nothing changes.

    A draft takes any content. A sending or paused campaign takes a valid one if `confirmed`: it counts for rows not claimed yet, and
    mail already out keeps its own. The From domain stays, for it was checked at the start. Raises `StateError` otherwise, `ContentError`
    for a content that cannot be compiled.
    """
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        version = current(connection, campaign)
    if version is not None and version.content == content and (version.compiled or campaign.state is not CampaignState.DRAFT):
        return version
    _require_editable(campaign, confirmed)
    if campaign.state is not CampaignState.DRAFT and version is not None and content.from_domain != version.content.from_domain:
        raise StateError(
            f"campaign {key} is {campaign.state}: its From domain stays {version.content.from_domain}, which was checked at its start; "
            f"mail from {content.from_domain} needs a campaign of its own"
        )
    try:
        compiled = _compile(engine, campaign.id, content)
    except ContentError:
        if campaign.state is not CampaignState.DRAFT:
            raise
        compiled = b""
    return _append(engine, key, content, compiled, now, confirmed)


def compile_current(engine: Engine, key: str, now: dt.datetime) -> Version:
    """Compile the draft's content as the fields are now; a new version if that gives anything else. Raises `ContentError`, `CampaignError`."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        version = current(connection, campaign)
    if version is None:
        raise CampaignError(f"campaign {key} has no content")
    compiled = _compile(engine, campaign.id, version.content)
    return version if compiled == version.compiled else _append(engine, key, version.content, compiled, now, confirmed=False)


def _require_editable(campaign: Campaign, confirmed: bool) -> None:
    if campaign.state is CampaignState.DRAFT or (campaign.state in _RUNNING and confirmed):
        return
    remedy = {
        CampaignState.SCHEDULED: f"; `mail-pipelines campaign unschedule {campaign.key}` makes it a draft again",
        CampaignState.BUILDING: "; wait until it is sending, then confirm",
        CampaignState.SENDING: "; with your confirmation (--confirm) the new content goes to all recipients not claimed yet",
        CampaignState.PAUSED: "; with your confirmation (--confirm) the new content goes to all recipients not claimed yet",
    }.get(campaign.state, "")
    raise StateError(f"campaign {campaign.key} is {campaign.state}: its content is frozen{remedy}")


def _compile(engine: Engine, campaign_id: int, content: Content) -> bytes:
    from mail_pipelines.messages.compilation import compile_content

    with reading(engine) as connection:
        fields = field_types(connection)
    return compile_content(content, fields, lambda urls: transact(engine, lambda connection: link_ids(connection, campaign_id, urls))).to_bytes()


def link_ids(connection: Connection, campaign_id: int, urls: Sequence[str]) -> list[int]:
    """The ids of the campaign's links to these URLs, new ones appended. An id is never given to another URL, so old mail keeps its meaning."""
    connection.execute(sa.select(models.Campaign.id).where(models.Campaign.id == campaign_id).with_for_update())
    digests = [hashlib.sha256(url.encode()).hexdigest() for url in urls]
    present = sa.select(models.Link.url_sha256, models.Link.id).where(models.Link.campaign_id == campaign_id, models.Link.url_sha256.in_(digests))
    known = {row.url_sha256: row.id for row in connection.execute(present)}
    new = {digest: url for digest, url in zip(digests, urls, strict=True) if digest not in known}
    if new:
        rows = [{"campaign_id": campaign_id, "url": url, "url_sha256": digest} for digest, url in new.items()]
        connection.execute(sa.insert(models.Link), rows)
        known |= {row.url_sha256: row.id for row in connection.execute(present)}
    return [known[digest] for digest in digests]


def _append(engine: Engine, key: str, content: Content, compiled: bytes, now: dt.datetime, confirmed: bool) -> Version:
    def work(connection: Connection) -> Version:
        campaign = store.load(connection, key, for_update=True)
        _require_editable(campaign, confirmed)
        newest = sa.select(sa.func.coalesce(sa.func.max(models.CampaignVersion.number), 0)).where(models.CampaignVersion.campaign_id == campaign.id)
        number = connection.execute(newest).scalar_one() + 1
        digest = hashlib.sha256(compiled).hexdigest() if compiled else ""
        row = {"campaign_id": campaign.id, "number": number, "sha256": digest, "compiled": compiled, "created_at": now}
        connection.execute(sa.insert(models.CampaignVersion).values(source=content.to_document(), **row))
        made = sa.select(models.CampaignVersion.id).where(models.CampaignVersion.campaign_id == campaign.id, models.CampaignVersion.number == number)
        version_id = connection.execute(made).scalar_one()
        connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(version_id=version_id, updated_at=now))
        return Version(version_id, number, content, digest, compiled)

    return transact(engine, work)
