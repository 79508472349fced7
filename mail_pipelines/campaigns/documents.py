"""A campaign as one document, put into the database and taken out of it. The document's form is `yaml_form`."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import store, versions
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.yaml_form import Document
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact


def put(engine: Engine, document: Document, now: dt.datetime, *, confirmed: bool = False) -> Campaign:
    """Create the draft with the document's key, or write the document over it; without content the present one stays.

    Raises as `store.create`, `store.update` and `versions.set_content` do: what is scheduled is frozen, and only a `confirmed`
    change of content reaches a campaign that is sending.
    """
    definition = document.definition

    def work(connection: Connection) -> None:
        exists = connection.execute(sa.select(models.Campaign.id).where(models.Campaign.key == definition.key)).one_or_none() is not None
        (store.update if exists else store.create)(connection, definition, now)

    transact(engine, work)
    if document.content is not None:
        versions.set_content(engine, definition.key, document.content, now, confirmed=confirmed)
    with reading(engine) as connection:
        return store.load(connection, definition.key)


def get(engine: Engine, key: str) -> Document:
    """The campaign as it is now; what is put again changes nothing. Raises `CampaignError`."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        version = versions.current(connection, campaign)
    return Document(campaign.definition, None if version is None else version.content)
