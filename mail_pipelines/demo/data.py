"""What the demo begins with, the same on every machine: two contact files, and two earlier campaigns with what became of them.

What belongs here: made-up data. What does not: who the people are (`people`), the demo's own segments and campaign (`campaign`), running it (`__main__`).
"""

from __future__ import annotations

import csv
import datetime as dt
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.shards import shard_of, shards_for
from mail_pipelines.contacts import consent, lists
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Contact, ContactList, Delivery, EngagementEvent, Link, State, Subscription
from mail_pipelines.database.types import enhanced_number
from mail_pipelines.delivery import counters
from mail_pipelines.demo.people import COLUMNS, OTHER_DOMAINS, PLACES, SEED, make_person

if TYPE_CHECKING:
    import pyarrow as pa

_LEDGER = Delivery.metadata.tables[Delivery.__tablename__]
_EVENTS = EngagementEvent.metadata.tables[EngagementEvent.__tablename__]
FIRST_LIST, SECOND_LIST = "news", "shop"
FIRST_SHARE = 0.6
REPEATED_SHARE = 0.02
BAD_ROWS = 25
OPENERS = 0.3
SENT_WITHIN = dt.timedelta(minutes=20)
REFUSAL = (550, "5.1.1", "invalid_recipient")
EARLIER = (("autumn-letter", "Autumn letter", 40), ("harvest-offers", "Harvest offers", 12))


@dataclass(frozen=True)
class DemoFiles:
    """What `write` wrote: `imports` has each file with its list; `rows` of all files, `contacts` of different address, `bad` rows and `repeated` ones."""

    imports: tuple[tuple[Path, str], ...]
    rows: int
    contacts: int
    bad: int
    repeated: int


@dataclass(frozen=True)
class Past:
    """What `engagement` wrote, in rows."""

    deliveries: int
    openers: int
    events: int
    suppressed: int
    unsubscribed: int


# --- contact files ----------------------------------------------------------------------------------------------


def write(folder: Path, contacts: int = 100_000, seed: int = SEED) -> DemoFiles:
    """Write a CSV file of about 60 % and a Parquet file of about 40 % of `contacts` different people, some in both, some rows unusable."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    people = [make_person(draw, number) for number in range(contacts)]
    first = people[: int(contacts * FIRST_SHARE)]
    repeated = int(len(first) * REPEATED_SHARE)
    second = people[len(first) :] + [_moved(draw, person) for person in draw.sample(first, repeated)]
    draw.shuffle(second)
    paths = folder / "news.csv", folder / "shop.parquet"
    _write_csv(paths[0], first, draw)
    _write_parquet(paths[1], second)
    return DemoFiles(((paths[0], FIRST_LIST), (paths[1], SECOND_LIST)), contacts + repeated + BAD_ROWS, contacts, BAD_ROWS, repeated)


def _moved(draw: random.Random, person: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same address as another shop system knows it: capitals in the address, another city, one order more."""
    email, first, last, country, _, birthday, orders, vip, signup = person
    return email.title(), first, last, country, draw.choice(PLACES[country]), birthday, orders + 1, vip, signup


def _write_csv(path: Path, people: Sequence[tuple[Any, ...]], draw: random.Random) -> None:
    bad = [
        ("not an address", "Quillana", "Quillfeather", "DE", "Köln", "", 1, "false", "2024-01-01"),
        ("two@signs@post1.test", "Zorvald", "Hjarnsvik", "SE", "Umeå", "", 1, "false", "2024-01-01"),
        ("few.columns@post1.test", "Gwynnora", "Pennyquicke"),
        ("bad.orders@post1.test", "Ysmaree", "Grafvenitz", "DE", "Berlin", "", "several", "false", "2024-01-01"),
        ("bad.date@post1.test", "Fionnghal", "Ó Vaelcháin", "GB", "York", "31.02.1980", 1, "false", "2024-01-01"),
    ]
    places = {place: bad[number % len(bad)] for number, place in enumerate(draw.sample(range(len(people)), BAD_ROWS))}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, (*words, birthday, orders, vip, signup) in enumerate(people):
            writer.writerow([*words, birthday or "", orders, "true" if vip else "false", signup])
            if number in places:
                writer.writerow(places[number])


def _write_parquet(path: Path, people: Sequence[tuple[Any, ...]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [pa.string()] * 5 + [pa.date32(), pa.int32(), pa.bool_(), pa.date32()]
    columns = [pa.array(values, type_) for values, type_ in zip(zip(*people, strict=True), types, strict=True)]
    pq.write_table(pa.table(columns, names=list(COLUMNS)), path)


# --- the past ---------------------------------------------------------------------------------------------------


def engagement(engine: Engine, now: dt.datetime, seed: int = SEED) -> Past:
    """Two finished campaigns to a part of the contacts, their opens and clicks, and people who left since. For a database just imported into."""
    draw = random.Random(seed + 1)
    with reading(engine) as connection:
        # Not those whom an external source has brought meanwhile: nobody knew them.
        imported = sa.select(Subscription.contact_id).join(ContactList, ContactList.id == Subscription.list_id)
        imported = imported.where(ContactList.key.in_((FIRST_LIST, SECOND_LIST)))
        query = sa.select(Contact.id, Contact.address_hash, Contact.provider).where(Contact.id.in_(imported))
        people = connection.execute(query.order_by(Contact.address)).all()
    deliveries = openers = reactions = 0
    bounced: list[bytes] = []
    for key, name, days in EARLIER:
        receivers = draw.sample(people, len(people) // 4)
        start = now - dt.timedelta(days=days)
        refused = set(draw.sample(range(len(receivers)), len(receivers) // 100))
        campaign_id, link_id = _campaign(engine, key, name, start, len(receivers))
        _write_ledger(engine, campaign_id, receivers, refused, start)
        bounced += [receivers[number].address_hash for number in refused]
        delivered = [receiver.id for number, receiver in enumerate(receivers) if number not in refused]
        opened = draw.sample(delivered, int(len(delivered) * OPENERS))
        events = list(_events(draw, campaign_id, link_id, opened, start, now))
        _write_events(engine, events)
        deliveries, openers, reactions = deliveries + len(receivers), openers + len(opened), reactions + len(events)
    leaving = draw.sample(people, len(people) // 40)
    left_list, left_all = leaving[: len(leaving) // 2], leaving[len(leaving) // 2 :]
    complained = draw.sample(people, len(people) // 100)

    def leave(connection: Connection) -> int:
        news = lists.get(connection, FIRST_LIST).id
        consent.unsubscribe(connection, [person.id for person in left_list], scope="list", scope_id=news, now=now)
        consent.unsubscribe(connection, [person.id for person in left_all], scope="all", now=now)
        added = consent.suppress(connection, bounced, reason="bounce", now=now)
        added += consent.suppress(connection, [person.address_hash for person in complained], reason="complaint", now=now)
        consent.suppress_domain(connection, OTHER_DOMAINS[0], reason="manual", now=now)
        return added

    suppressed = transact(engine, leave)
    return Past(deliveries, openers, reactions, suppressed, len(leaving))


def opens_and_clicks(engine: Engine, campaign_id: int, now: dt.datetime, seed: int = SEED) -> int:
    """Let people open what a campaign has just brought them, and click; returns how many opened."""
    draw = random.Random(seed + 3)
    with reading(engine) as connection:
        start = connection.execute(sa.select(Campaign.started_at).where(Campaign.id == campaign_id)).scalar_one()
        links = connection.execute(sa.select(Link.id).where(Link.campaign_id == campaign_id).order_by(Link.id)).scalars().all()
        delivered = sa.and_(Delivery.campaign_id == campaign_id, Delivery.state == int(State.DELIVERED))
        people = connection.execute(sa.select(Contact.id).join(Delivery, Delivery.contact_id == Contact.id).where(delivered).order_by(Contact.address))
        receivers = people.scalars().all()
    assert start is not None
    opened = draw.sample(receivers, int(len(receivers) * OPENERS))
    _write_events(engine, list(_events(draw, campaign_id, links[0], opened, start, now)))
    return len(opened)


def _campaign(engine: Engine, key: str, name: str, start: dt.datetime, size: int) -> tuple[int, int]:
    """A finished campaign and its one link; returns their ids."""
    url = f"https://garden-shop.test/{key}"
    times = {"created_at": start, "start_at": start, "started_at": start, "updated_at": start + SENT_WITHIN, "finished_at": start + SENT_WITHIN}
    campaign = times | {
        "key": key,
        "name": name,
        "state": "finished",
        "brand_id": 1,
        "segments": {"include": [], "exclude": []},
        "unsubscribe": "all",
        "on_unknown": "hold",
        "priority": 1,
        "expire_at": start + dt.timedelta(days=2),
        "shards": shards_for(size),
        "audience_counts": {"matched": size, "audience": size, "excluded": {}},
    }

    def work(connection: Connection) -> tuple[int, int]:
        connection.execute(sa.insert(Campaign), campaign)
        campaign_id = connection.execute(sa.select(Campaign.id).where(Campaign.key == key)).scalar_one()
        connection.execute(sa.insert(Link), {"campaign_id": campaign_id, "url": url, "url_sha256": hashlib.sha256(url.encode()).hexdigest()})
        return campaign_id, connection.execute(sa.select(Link.id).where(Link.campaign_id == campaign_id)).scalar_one()

    return transact(engine, work)


def _write_ledger(engine: Engine, campaign_id: int, receivers: Sequence[Any], refused: set[int], start: dt.datetime) -> None:
    """One row a receiver, sent evenly over `SENT_WITHIN` in their order, with the campaign's counters in the same transactions."""
    shards = shards_for(len(receivers))
    pace = SENT_WITHIN / len(receivers)
    rows = [
        (number, receiver.id, receiver.address_hash, shard_of(receiver.id, shards), receiver.provider, start + number * pace)
        for number, receiver in enumerate(receivers)
    ]
    for begin in range(0, len(rows), bulk.CHUNK_ROWS):
        chunk = rows[begin : begin + bulk.CHUNK_ROWS]
        table = _ledger_table(campaign_id, chunk, refused)
        by_minute: dict[dt.datetime, Counter[counters.Place]] = {}
        for number, _, _, shard, provider, at in chunk:
            place = (shard, provider, State.BOUNCED, REFUSAL[2]) if number in refused else (shard, provider, State.DELIVERED, "")
            by_minute.setdefault(at.replace(second=0, microsecond=0), Counter())[place] += 1

        def work(connection: Connection, table: pa.Table = table, by_minute: dict[dt.datetime, Counter[counters.Place]] = by_minute) -> None:
            bulk.load(connection, _LEDGER, table, ignore_duplicates=True)
            for minute, moves in by_minute.items():
                counters.add(connection, campaign_id, counters.CENTRE, moves, minute)

        transact(engine, work)


def _ledger_table(campaign_id: int, rows: Sequence[tuple[int, int, bytes, int, str, dt.datetime]], refused: set[int]) -> pa.Table:
    import pyarrow as pa

    numbers, contact_ids, hashes, shards, providers, times = zip(*rows, strict=True)
    bad = [number in refused for number in numbers]
    return pa.table(
        {
            "campaign_id": pa.repeat(pa.scalar(campaign_id, pa.int32()), len(rows)),
            "contact_id": pa.array(contact_ids, pa.int64()),
            "address_hash": pa.array(hashes, pa.binary(16)),
            "shard": pa.array(shards, pa.int32()),
            "provider": pa.array(providers, pa.string()),
            "state": pa.array([int(State.BOUNCED if refusal else State.DELIVERED) for refusal in bad], pa.int32()),
            "sort_key": pa.array([int(at.timestamp()) for at in times], pa.int32()),
            "attempt": pa.array([int(refusal) for refusal in bad], pa.int32()),
            "variant": pa.repeat(pa.scalar(0, pa.int32()), len(rows)),
            "code": pa.array([REFUSAL[0] if refusal else 250 for refusal in bad], pa.int32()),
            "enhanced": pa.array([enhanced_number(REFUSAL[1] if refusal else "2.0.0") for refusal in bad], pa.int32()),
            "reason": pa.array([REFUSAL[2] if refusal else None for refusal in bad], pa.string()),
        }
    )


def _events(
    draw: random.Random, campaign_id: int, link_id: int, openers: Iterable[int], start: dt.datetime, now: dt.datetime
) -> Iterator[tuple[int, int, dt.datetime, dt.datetime, int, int, str, int | None, bool]]:
    """Each opener opens within days, a quarter of them click as well; one open in twenty is a machine's beside the person's own."""
    for contact_id in openers:
        at = start + dt.timedelta(hours=draw.expovariate(1 / 20))
        kinds: list[tuple[str, int | None, bool, dt.datetime]] = [("open", None, False, at)]
        if draw.random() < 0.25:
            kinds.append(("click", link_id, False, at + dt.timedelta(seconds=draw.randrange(5, 600))))
        if draw.random() < 0.05:
            kinds.append(("open", None, True, start + dt.timedelta(seconds=1)))
        for kind, link, machine, moment in kinds:
            occurred = min(moment, now)
            digest = hashlib.blake2b(f"{campaign_id} {contact_id} {kind} {machine}".encode(), digest_size=8).digest()
            event_id = int.from_bytes(digest, "big") >> 1
            yield occurred.year * 100 + occurred.month, event_id, occurred, now, campaign_id, contact_id, kind, link, machine


def _write_events(engine: Engine, events: Sequence[tuple[int, int, dt.datetime, dt.datetime, int, int, str, int | None, bool]]) -> None:
    import pyarrow as pa

    time = pa.timestamp("us", "UTC")
    types = {"month": pa.int32(), "id": pa.int64(), "occurred_at": time, "recorded_at": time, "campaign_id": pa.int32(), "contact_id": pa.int64()}
    types |= {"kind": pa.string(), "link_id": pa.int64(), "machine": pa.bool_()}
    for begin in range(0, len(events), bulk.CHUNK_ROWS):
        columns = zip(zip(*events[begin : begin + bulk.CHUNK_ROWS], strict=True), types.values(), strict=True)
        table = pa.table([pa.array(values, type_) for values, type_ in columns], names=list(types))
        transact(engine, functools.partial(bulk.load, table=_EVENTS, rows=table, ignore_duplicates=True))
