"""A small central database written by hand: contacts with their change feed, events, ledger rows. And the slow, obvious evaluator."""

from __future__ import annotations

import datetime as dt
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import (
    Brand,
    Campaign,
    CampaignCounter,
    Contact,
    ContactChange,
    ContactList,
    Delivery,
    EngagementEvent,
    Field,
    State,
    Subscription,
)
from mail_pipelines.segments import evaluation
from mail_pipelines.segments.criteria import parse
from mail_pipelines.segments.snapshots import Snapshots, open_snapshots, refresh_contacts, refresh_engagement

NOW = dt.datetime(2026, 3, 10, 12, tzinfo=dt.UTC)
FIELDS = {"city": "text", "age": "number", "vip": "boolean", "born": "date", "seen": "datetime"}
LISTS = ("news", "offers")
SHOP = 7


class World:
    """Writes to the database as other parts of the platform do, one transaction a call."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.lists: dict[str, int] = {}
        self.campaigns: dict[str, int] = {}

    def set_up(self) -> World:
        def work(connection: sa.Connection) -> None:
            connection.execute(sa.insert(Brand), [{"id": SHOP, "key": "shop", "name": "Shop", "created_at": NOW}])
            connection.execute(
                sa.insert(Field),
                [{"id": n, "key": key, "label": key, "type": type_, "created_at": NOW} for n, (key, type_) in enumerate(FIELDS.items(), 1)],
            )
            connection.execute(
                sa.insert(ContactList), [{"id": n, "key": key, "name": key, "brand_id": SHOP, "created_at": NOW} for n, key in enumerate(LISTS, 1)]
            )

        transact(self.engine, work)
        self.lists = {key: n for n, key in enumerate(LISTS, 1)}
        return self

    def field(self, key: str, type_: str) -> None:
        values = {"key": key, "label": key, "type": type_, "created_at": NOW}
        transact(self.engine, lambda connection: connection.execute(sa.insert(Field).values(**values)))

    def campaign(self, key: str, started_at: dt.datetime | None) -> int:
        values = {
            "key": key, "name": key, "state": "finished", "brand_id": SHOP, "segments": {}, "unsubscribe": "all", "on_unknown": "hold", "priority": 1,
            "created_at": NOW, "updated_at": NOW, "started_at": started_at,
        }  # fmt: skip
        result = transact(self.engine, lambda connection: connection.execute(sa.insert(Campaign).values(**values)).inserted_primary_key)
        self.campaigns[key] = result[0]
        return self.campaigns[key]

    def contacts(self, rows: Iterable[tuple[int, Mapping[str, Any], Iterable[str]]], *, at: dt.datetime = NOW, feed: bool = True) -> None:
        """Insert or replace contacts (id, attributes, lists)."""
        rows = list(rows)
        ids = [row[0] for row in rows]

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.delete(Contact).where(Contact.id.in_(ids)))
            connection.execute(sa.delete(Subscription).where(Subscription.contact_id.in_(ids)))
            connection.execute(sa.insert(Contact), [_contact(contact_id, attributes) for contact_id, attributes, _ in rows])
            subscribed = [
                {"contact_id": contact_id, "list_id": self.lists[key], "subscribed": key in keys, "source": "test", "changed_at": at}
                for contact_id, _, keys in rows
                for key in self.lists
            ]
            connection.execute(sa.insert(Subscription), subscribed)
            if feed:
                connection.execute(sa.insert(ContactChange), [{"contact_id": contact_id, "op": "upsert", "created_at": at} for contact_id in ids])

        transact(self.engine, work)

    def erase(self, *ids: int, at: dt.datetime = NOW) -> None:
        def work(connection: sa.Connection) -> None:
            connection.execute(sa.delete(Contact).where(Contact.id.in_(ids)))
            connection.execute(sa.delete(Subscription).where(Subscription.contact_id.in_(ids)))
            connection.execute(sa.insert(ContactChange), [{"contact_id": contact_id, "op": "delete", "created_at": at} for contact_id in ids])

        transact(self.engine, work)

    def events(self, rows: Iterable[Mapping[str, Any]], *, recorded_at: dt.datetime = NOW) -> None:
        """Rows need contact_id, campaign (key), kind, occurred_at; may have machine, link_id, recorded_at, id."""
        values = []
        for row in rows:
            event = {"recorded_at": recorded_at, "machine": False, "link_id": None, **row}
            event["campaign_id"] = self.campaigns[event.pop("campaign")]
            event["month"] = event["occurred_at"].year * 100 + event["occurred_at"].month
            event.setdefault("id", int.from_bytes(hashlib.sha256(repr(sorted(event.items())).encode()).digest()[:7], "big"))
            values.append(event)
        transact(self.engine, lambda connection: connection.execute(sa.insert(EngagementEvent), values))

    def delivered(self, campaign: str, receivers: Mapping[int, dt.datetime]) -> None:
        """Ledger rows that reached delivered, and the counter's delta."""
        campaign_id = self.campaigns[campaign]
        rows = [
            {
                "campaign_id": campaign_id, "contact_id": contact_id, "address_hash": contact_id.to_bytes(16, "big"), "shard": 0, "provider": "other",
                "state": State.DELIVERED, "sort_key": int(time.timestamp()), "attempt": 0, "variant": 0,
            }
            for contact_id, time in receivers.items()
        ]  # fmt: skip

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.insert(Delivery), rows)
            counter = {"campaign_id": campaign_id, "shard": 0, "provider": "other", "server_id": 1, "state": State.DELIVERED}
            where = sa.and_(CampaignCounter.campaign_id == campaign_id, CampaignCounter.state == State.DELIVERED)
            if connection.execute(sa.update(CampaignCounter).where(where).values(count=CampaignCounter.count + len(rows))).rowcount == 0:
                connection.execute(sa.insert(CampaignCounter).values(**counter, count=len(rows)))

        transact(self.engine, work)

    def refresh(self, now: dt.datetime = NOW) -> None:
        refresh_contacts(self.engine, self.folder, now=now, min_free_mb=0)
        refresh_engagement(self.engine, self.folder, now=now, min_free_mb=0)

    def members(self, tree: Any, now: dt.datetime = NOW) -> set[int]:
        """Ids of those who match by the newest snapshots."""
        with open_snapshots(self.engine, self.folder) as snapshots:
            return members(snapshots, tree, now)


def members(snapshots: Snapshots, tree: Any, now: dt.datetime = NOW) -> set[int]:
    """Ids of those who match; each must come once."""
    ids = evaluation.members(parse(tree, snapshots.catalogue), snapshots, now=now)["contact_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return set(ids)


def _contact(contact_id: int, attributes: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in attributes.items() if not key.startswith("@")}
    return {
        "id": contact_id,
        "email": f"c{contact_id}@example.test",
        "address": f"c{contact_id}@example.test",
        "address_hash": contact_id.to_bytes(16, "big"),
        "domain": attributes.get("@domain", "example.test"),
        "provider": attributes.get("@provider", "other"),
        "time_zone": attributes.get("@time_zone"),
        "attributes": plain,
        "created_at": attributes.get("@created_at", NOW),
        "updated_at": NOW,
    }


# --- the slow, obvious evaluator --------------------------------------------------------------------------------


def truth(tree: Mapping[str, Any], person: Mapping[str, Any], now: dt.datetime, last: list[str]) -> bool:
    """Whether criteria hold for a person: {"id", "attributes", "lists", "received", "opened", "clicked": [(campaign, time, machine)]}.

    `last` are the keys of started campaigns, newest first.
    """
    if "all" in tree:
        return all(truth(child, person, now, last) for child in tree["all"])
    if "any" in tree:
        return any(truth(child, person, now, last) for child in tree["any"])
    if "not" in tree:
        return not truth(tree["not"], person, now, last)
    if "in_list" in tree:
        return tree["in_list"] in person["lists"]
    if "not_in_list" in tree:
        return tree["not_in_list"] not in person["lists"]
    if "did_not" in tree:
        return not truth({"did" if key == "did_not" else key: value for key, value in tree.items()}, person, now, last)
    if "did" in tree:
        return any(
            not machine
            and ("campaign" not in tree or campaign == tree["campaign"])
            and ("last" not in tree or campaign in last[: tree["last"]])
            and ("within_days" not in tree or time >= now - dt.timedelta(days=tree["within_days"]))
            for campaign, time, machine in person[tree["did"]]
        )
    if "sample" in tree:
        return _hash(person["id"], str(tree["sample"]["seed"])) < round(tree["sample"]["percent"] / 100 * 2**32)
    return _compare(tree, person["attributes"], now)


def _hash(contact_id: int, seed: str) -> int:
    x = (contact_id ^ (contact_id >> 32) ^ int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")) % 2**32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
    x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
    return x ^ (x >> 15)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


def _instant(value: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def _compare(tree: Mapping[str, Any], attributes: Mapping[str, Any], now: dt.datetime) -> bool:
    kinds = {**FIELDS, "domain": "text", "provider": "text", "time_zone": "text", "created_at": "datetime"}
    read = {"text": _fold, "number": float, "boolean": bool, "date": dt.date.fromisoformat, "datetime": _instant}[kinds[tree["field"]]]
    given = attributes.get(tree["field"])
    if tree["op"] == "empty":
        return given is None or given == ""
    if given is None:
        return False
    value: Any = read(given)
    if tree["op"] == "within_days":
        here: Any = now.date() if kinds[tree["field"]] == "date" else now
        days = dt.timedelta(days=tree["value"])
        return here <= value <= here + days if tree.get("direction") == "next" else here - days <= value <= here
    if tree["op"] in ("in", "between"):
        wanted: Any = [read(item) for item in tree["value"]]
    else:
        wanted = read(tree["value"])
    match tree["op"]:
        case "=":
            return bool(value == wanted)
        case "!=":
            return bool(value != wanted)
        case "<" | "before":
            return bool(value < wanted)
        case "<=":
            return bool(value <= wanted)
        case ">" | "after":
            return bool(value > wanted)
        case ">=":
            return bool(value >= wanted)
        case "contains":
            return wanted in value
        case "starts_with":
            return bool(value.startswith(wanted))
        case "ends_with":
            return bool(value.endswith(wanted))
        case "in":
            return value in wanted
        case "between":
            return bool(wanted[0] <= value <= wanted[1])
    raise AssertionError(tree)


def rank_of(days: int) -> int:
    """The rank of somebody who was last engaged so many whole days ago."""
    width = 1 if days < 14 else 7 if days < 91 else 28
    return days - days % width
