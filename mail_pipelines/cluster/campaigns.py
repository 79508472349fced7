"""What the cluster sends: contacts from files, two segments that are each other's complement, two campaigns."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.engine import Engine

from mail_pipelines.campaigns import scheduling, store, versions, yaml_form
from mail_pipelines.config import Settings
from mail_pipelines.contacts import importing
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.demo import data, people
from mail_pipelines.dispatch import servers
from mail_pipelines.domains import rotation
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import KeyState, Names
from mail_pipelines.segments import saved, snapshots

FROM_DOMAIN = "garden-shop.test"
SEGMENTS = (
    """
key: everybody
name: On either list
criteria: {any: [{in_list: news}, {in_list: shop}]}
""",
    """
key: customers
name: Bought something
criteria: {field: orders, op: ">=", value: 1}
""",
)
_CAMPAIGN = """
name: {name}
key: {key}
segments: {segments}
unsubscribe: all
priority: {priority}
content:
  from_name: The Garden Shop
  from_address: news@garden-shop.test
  subject: "{{{{ first_name | default('Hello') }}}}, {subject}"
  body: |
    <p>Dear {{{{ first_name | default('friend') }}}} {{{{ last_name | default('') }}}},</p>
    <p>{offer}</p>
    <p>The Garden Shop, 1 Orchard Lane, Gardenville. <a href="{{{{ unsubscribe_url }}}}">Unsubscribe</a></p>
"""
_WINTER = {
    "subject": "the garden in winter",
    "offer": 'what now sleeps wants to be covered{% if city %}, in {{ city }} too{% endif %}: <a href="https://garden-shop.test/winter">how it is done</a>.',
}
_TODAY = {"subject": "today only", "offer": 'everything is cheaper until midnight: <a href="https://garden-shop.test/today">see the offers</a>.'}
# About 70 % and 30 % of all recipients, nobody in both.
KEYS = ("winter-letter", "today-only")
CAMPAIGNS = (
    _CAMPAIGN.format(key=KEYS[0], name="Winter letter", segments="{include: [everybody], exclude: [customers]}", priority="normal", **_WINTER),
    _CAMPAIGN.format(key=KEYS[1], name="Today only", segments="{include: [customers]}", priority="high", **_TODAY),
)
TO_ALL_KEY = "to-everybody"
TO_ALL = _CAMPAIGN.format(key=TO_ALL_KEY, name="To everybody", segments="{include: [everybody]}", priority="normal", **_WINTER)
# A small audience is sent so slowly that it takes about as long as this, or it would be over before the last server has begun.
_LEAST_SECONDS = 40
_MOST_PER_SECOND = 100.0


def prepare(engine: Engine, settings: Settings, folder: Path, recipients: int, check: Callable[[], None]) -> None:
    """Import so many people, save the segments, take the snapshots. `check` is called between the steps and may raise."""
    now = dt.datetime.now(dt.UTC)
    files = data.write(folder, contacts=recipients)
    check()
    for path, list_name in files.imports:
        importing.import_file(engine, path, list_name=list_name, now=now, progress=lambda *_: check())
    segment(engine, settings)
    check()


def segment(engine: Engine, settings: Settings) -> None:
    """The domain that campaigns come from with the keys of all servers, the segments, and the snapshots that they are counted in."""
    now = dt.datetime.now(dt.UTC)
    domains.add(engine, Names.of(FROM_DOMAIN), settings.token_key(), now)
    _sign(engine, settings, now)
    for text in SEGMENTS:
        saved.save(engine, saved.from_yaml(text), now=now)
    snapshots.refresh_contacts(engine, settings.snapshot_folder, now=now)
    snapshots.refresh_engagement(engine, settings.snapshot_folder, now=now)


def limit(engine: Engine, fleet: list[str], recipients: int) -> None:
    """What each server may send to each provider."""
    largest = recipients * max(people.DOMAINS.values())
    per_second = min(_MOST_PER_SECOND, largest / len(fleet) / _LEAST_SECONDS)
    for name in fleet:
        servers.set_limits(engine, name, "*", {"connections": 24, "per_second": per_second, "messages_per_connection": 500})


def _sign(engine: Engine, settings: Settings, now: dt.datetime) -> None:
    """Give each server DKIM keys of its own, as `mail-pipelines server dkim` does: with its own token key it cannot open the key of all."""
    with reading(engine) as connection:
        fleet = servers.all_servers(connection)
    for server in fleet:
        for _ in (KeyState.WAITING, KeyState.ACTIVE):
            rotation.equip(engine, settings, server.id, now, allow_unverified=True)


def start(engine: Engine, settings: Settings, text: str) -> None:
    """Put a campaign in as a marketer does, to start now. From here on Dagster's sensors do everything."""
    now = dt.datetime.now(dt.UTC)
    document = yaml_form.parse(text)
    campaign = transact(engine, lambda connection: store.create(connection, document.definition, now))
    assert document.content is not None
    versions.set_content(engine, campaign.key, document.content, now)
    # A domain of a reserved name has no DNS; its mail is signed all the same.
    scheduling.start(engine, settings, campaign.key, now, allow_unverified=True)
