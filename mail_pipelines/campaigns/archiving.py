"""Archiving campaigns that have been over for long: their ledgers move from the database to files, and stay answerable (`why`).

What belongs here: which campaigns are due, and the steps in their order. What does not: the files (`delivery.ledger_archive`).

1. The campaign becomes archived, and from then on its ledger changes no more: later evidence is kept beside it (`delivery.evidence`).
2. All of it is written to files, and each is held against the ledger. The files are recorded with the campaign: from then on they are the truth.
3. What is in the files is deleted, in small transactions, and `archived_at` is set.

A call that was killed is repeated from the step that is not recorded as done. Two never run at once.
"""

from __future__ import annotations

import datetime as dt
import logging
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import progress, states, store
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.open_rows import any_open
from mail_pipelines.campaigns.progress import SumsDiffer
from mail_pipelines.campaigns.states import Actor, CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.database import models, partitions
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, Delivery
from mail_pipelines.delivery import ledger_archive
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError, Manifest
from mail_pipelines.dispatch.files import only_one

# A night archives no more: what is left is older the next.
CAMPAIGNS_A_NIGHT = 50
_OVER = (CampaignState.FINISHED, CampaignState.CANCELLED)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a night has done: keys of campaigns, `failed` with the reason."""

    archived: dict[str, int]
    failed: dict[str, str]


def archive_old(engine: Engine, settings: Settings, now: dt.datetime) -> Report:
    """Archive campaigns that have been over for `campaigns.archive_after_days`, and go on with those that were interrupted.

    One that cannot be archived stays as it is, and holds up no other. Raises `AlreadyRunning` if another process archives.
    """
    report = Report({}, {})
    if not settings.campaigns.archive:
        return report
    archive = LedgerArchive(settings.campaigns.archive)
    with only_one(Path(settings.server.run_folder) / "archiving.lock", "archiving campaigns"):
        with reading(engine) as connection:
            campaigns = due(connection, now - dt.timedelta(days=settings.campaigns.archive_after_days))
        for campaign in campaigns:
            try:
                report.archived[campaign.key] = archive_one(engine, archive, campaign, now)
            except (LedgerArchiveError, SumsDiffer, states.StateError) as error:
                report.failed[campaign.key] = str(error)
        if campaigns:
            partitions.drop_archived(engine, now.date())
    return report


def due(connection: Connection, before: dt.datetime) -> list[Campaign]:
    """Campaigns to archive, those begun first, then those over for longest. Of those without an audience there is nothing to archive."""
    row = models.Campaign
    over = sa.and_(row.state.in_([state.value for state in _OVER]), row.finished_at <= before, row.audience_counts.is_not(None))
    begun = sa.and_(row.state == CampaignState.ARCHIVED.value, row.archived_at.is_(None))
    order = (sa.case((begun, 0), else_=1), row.finished_at, row.id)
    return store.select(connection, sa.or_(over, begun), order_by=order, limit=CAMPAIGNS_A_NIGHT)


def archived_before(connection: Connection, before: dt.datetime) -> set[str]:
    """The keys of campaigns of whose ledgers nothing was left in the database by then."""
    return set(connection.execute(sa.select(models.Campaign.key).where(models.Campaign.archived_at < before)).scalars())


def archive_one(engine: Engine, archive: LedgerArchive, campaign: Campaign, now: dt.datetime) -> int:
    """Archive the campaign, from the step at which it stands; returns how many rows were deleted from the database.

    Raises `StateError` if it has open rows or claims (of a cancelled one the last ends days later), `SumsDiffer` or `LedgerArchiveError` if what would be
    archived is not what it should be.
    """
    archive.check()
    if campaign.state is not CampaignState.ARCHIVED:
        transact(engine, lambda connection: _close(connection, campaign, now))
    if campaign.archive is None:
        manifest = _write(engine, archive, campaign)
    else:
        manifest = campaign.archive
        archive.verify(campaign.id, manifest)
    archive.remove_others(campaign.id, manifest)
    deleted = archive.delete_archived(engine, campaign.id, manifest)
    transact(engine, lambda connection: _end(connection, campaign, now))
    return deleted


def _close(connection: Connection, campaign: Campaign, now: dt.datetime) -> None:
    # Whoever changes the ledger holds this row FOR SHARE.
    connection.execute(sa.select(models.Campaign.id).where(models.Campaign.id == campaign.id).with_for_update())
    progress.totals(connection, campaign).check()
    unsettled = sa.exists().where(Claim.campaign_id == campaign.id, Claim.state != "closed").select()
    if any_open(connection, campaign.id) or connection.execute(unsettled).scalar_one():
        raise states.StateError(f"campaign {campaign.key} has recipients whose outcome is open: it is archived when the last has ended")
    states.move(connection, campaign.id, campaign.state, CampaignState.ARCHIVED, actor=Actor.CENTRE, now=now)


def _write(engine: Engine, archive: LedgerArchive, campaign: Campaign) -> Manifest:
    manifest = archive.write(engine, campaign.id)
    found, audience = ledger_archive.rows_in(manifest), (campaign.audience_counts or {}).get("audience", 0)
    if found != audience:
        raise SumsDiffer(f"the ledger of campaign {campaign.key} has {found:,} rows for an audience of {audience:,}: nothing is deleted")

    def work(connection: Connection) -> None:
        row = models.Campaign
        mine = (row.id == campaign.id, row.state == CampaignState.ARCHIVED.value, row.archive.is_(None))
        if connection.execute(sa.update(row).where(*mine).values(archive=manifest)).rowcount != 1:
            raise states.StateError(f"campaign {campaign.key} was changed while it was archived: nothing is deleted")

    transact(engine, work)
    return manifest


def _end(connection: Connection, campaign: Campaign, now: dt.datetime) -> None:
    left = sa.exists().where(Delivery.campaign_id == campaign.id).select()
    if connection.execute(left).scalar_one():
        raise LedgerArchiveError(f"campaign {campaign.key} has ledger rows that are not in its archive: they are kept, look at them")
    connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(archived_at=now))
