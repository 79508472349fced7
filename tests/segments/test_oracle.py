"""For any criteria and any contacts, the engine finds exactly those whom the slow, obvious evaluator finds."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mail_pipelines.database.engine import create_engine
from mail_pipelines.segments import evaluation, explaining
from mail_pipelines.segments.criteria import parse
from mail_pipelines.segments.snapshots import Snapshots, open_snapshots
from tests.segments.world import FIELDS, NOW, World, rank_of, truth

CAMPAIGNS = {"spring": 40, "summer": 9, "autumn": 3}
LAST = ["autumn", "summer", "spring"]

# Few letters, so that values meet; folding, composition, quotes, wild cards, NUL, and what lies beyond the basic plane.
texts = st.text(alphabet=["a", "A", "b", "ß", "s", "S", "é", "e", "\u0301", "İ", "Σ", "ς", "'", '"', "%", "_", "\\", "\0", "😀", " "], max_size=4)
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([0.1, -0.0, 1e300, 2**53 + 1, 10**30]))
dates = st.dates(dt.date(2026, 3, 5), dt.date(2026, 3, 15)).map(dt.date.isoformat) | st.sampled_from(["0001-01-01", "9999-12-31"])
times = st.builds(
    lambda hours, zone: (NOW + dt.timedelta(hours=hours)).replace(tzinfo=None).isoformat() + zone, st.integers(-72, 72), st.sampled_from(["", "Z", "+05:30"])
)
VALUES: dict[str, st.SearchStrategy[Any]] = {"text": texts, "number": numbers, "boolean": st.booleans(), "date": dates, "datetime": times}

attributes = st.fixed_dictionaries({}, optional={key: st.none() | VALUES[type_] for key, type_ in FIELDS.items()})
built_in = st.fixed_dictionaries(
    {
        "@domain": st.sampled_from(["a.test", "b.test"]),
        "@provider": st.sampled_from(["google", "other"]),
        "@created_at": st.just(NOW) | st.just(NOW - dt.timedelta(3)),
    },
    optional={"@time_zone": st.sampled_from(["Europe/Berlin", "UTC"])},
)
contact = st.tuples(attributes, built_in, st.sets(st.sampled_from(["news", "offers"])))
acts = st.lists(
    st.fixed_dictionaries(
        {
            "contact_id": st.integers(1, 25),
            "campaign": st.sampled_from(LAST),
            "kind": st.sampled_from(["open", "click"]),
            "occurred_at": st.integers(0, 100).map(lambda days: NOW - dt.timedelta(days=days, seconds=days % 2)),
            "machine": st.booleans(),
        }
    ),
    max_size=12,
)


def _comparison(key: str, type_: str, domain: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    ordered = type_ in ("number", "date", "datetime")
    plain = {"text": ["=", "!=", "contains", "starts_with", "ends_with"], "boolean": ["=", "!="]}.get(type_, ["=", "!=", "<", "<=", ">", ">="])
    if type_ in ("date", "datetime"):
        plain = [*plain, "before", "after"]
    options = [st.builds(lambda op, value: {"field": key, "op": op, "value": value}, st.sampled_from(plain), domain), st.just({"field": key, "op": "empty"})]
    if type_ == "text":
        options.append(st.lists(domain, min_size=1, max_size=4).map(lambda values: {"field": key, "op": "in", "value": values}))
    if ordered:
        in_order = {"number": float, "date": str, "datetime": lambda text: parse_instant(text)}[type_]
        options.append(st.lists(domain, min_size=2, max_size=2).map(lambda pair: {"field": key, "op": "between", "value": sorted(pair, key=in_order)}))
    if type_ in ("date", "datetime"):
        options.append(
            st.builds(
                lambda days, way: {"field": key, "op": "within_days", "value": days, **way}, st.integers(1, 4), st.sampled_from([{}, {"direction": "next"}])
            )
        )
    return st.one_of(options)


def parse_instant(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


leaves = st.one_of(
    *(_comparison(key, type_, VALUES[type_]) for key, type_ in FIELDS.items()),
    _comparison("domain", "text", st.sampled_from(["A.test", ".TEST", "b"])),
    _comparison("provider", "text", st.sampled_from(["Google", "other", "o"])),
    _comparison("time_zone", "text", st.sampled_from(["europe/berlin", "UTC", "E"])),
    _comparison("created_at", "datetime", times),
    st.builds(lambda form, key: {form: key}, st.sampled_from(["in_list", "not_in_list"]), st.sampled_from(["news", "offers"])),
    st.builds(
        lambda form, kind, which, within: {form: kind, **which, **within},
        st.sampled_from(["did", "did_not"]),
        st.sampled_from(["received", "opened", "clicked"]),
        st.sampled_from([{}, {"campaign": "spring"}, {"campaign": "autumn"}, {"campaign": "draft"}, {"last": 1}, {"last": 2}, {"last": 9}]),
        st.sampled_from([{}, {"within_days": 4}, {"within_days": 30}]),
    ),
    st.builds(lambda percent, seed: {"sample": {"percent": percent, "seed": seed}}, st.sampled_from([0.5, 30, 50, 100]), st.sampled_from([1, "b", "ü"])),
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3).map(lambda found: {"all": found}),
        st.lists(children, max_size=3).map(lambda found: {"any": found}),
        children.map(lambda found: {"not": found}),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def template(request: pytest.FixtureRequest) -> Path:
    """An empty SQLite database at the current schema, to copy for each example."""
    path: Path = request.getfixturevalue("_sqlite_template")
    return path


def _person(contact_id: int, found: tuple[dict[str, Any], dict[str, Any], set[str]]) -> dict[str, Any]:
    attributes, fixed, lists = found
    shown = {key.removeprefix("@"): value for key, value in fixed.items()} | attributes
    shown["created_at"] = fixed["@created_at"].isoformat()
    return {"id": contact_id, "attributes": shown, "lists": lists, "received": [], "opened": [], "clicked": []}


def _stages(data: st.DataObject, world: World) -> Iterator[tuple[dt.datetime, dict[int, dict[str, Any]]]]:
    """A first build and two refreshes with changed, new and erased contacts; yields who there is after each."""
    people: dict[int, dict[str, Any]] = {}
    for key, days in CAMPAIGNS.items():
        world.campaign(key, NOW - dt.timedelta(days=days))
    world.campaign("draft", None)
    heard: list[tuple[int, str, str, dt.datetime, bool]] = []
    for stage in range(3):
        now = NOW + dt.timedelta(minutes=stage)
        changed = data.draw(st.dictionaries(st.integers(1, 25), contact, min_size=0 if stage else 1, max_size=8), label="contacts")
        if changed:
            world.contacts(((contact_id, {**found[0], **found[1]}, found[2]) for contact_id, found in changed.items()), at=now)
        people.update((contact_id, _person(contact_id, found)) for contact_id, found in changed.items())
        if stage and (erased := data.draw(st.sets(st.sampled_from(sorted(people)), max_size=3) if people else st.just(set()), label="erased")):
            world.erase(*erased, at=now)
            for contact_id in erased:
                del people[contact_id]
        events = [{**act, "id": stage * 100 + number} for number, act in enumerate(data.draw(acts, label="events"))]
        if events:
            world.events(events, recorded_at=now)
        heard += [(act["contact_id"], f"{act['kind']}ed", act["campaign"], act["occurred_at"], act["machine"]) for act in events]
        received = data.draw(st.sets(st.integers(1 + stage * 8, 8 + stage * 8), max_size=5), label="received")
        if received:
            world.delivered(LAST[stage], dict.fromkeys(received, NOW - dt.timedelta(days=stage * 5)))
        heard += [(contact_id, "received", LAST[stage], NOW - dt.timedelta(days=stage * 5), False) for contact_id in received]
        world.refresh(now)
        shown = {contact_id: {**person, "received": [], "opened": [], "clicked": []} for contact_id, person in people.items()}
        for contact_id, kind, campaign, time, machine in heard:
            if contact_id in shown:
                shown[contact_id][kind].append((campaign, time, machine))
        yield now, shown


def _check(snapshots: Snapshots, tree: dict[str, Any], people: dict[int, dict[str, Any]], now: dt.datetime) -> None:
    table = evaluation.members(parse(tree, snapshots.catalogue), snapshots, now=now)
    found = {row["contact_id"]: row for row in table.to_pylist()}
    expected = {contact_id for contact_id, person in people.items() if truth(tree, person, now, LAST)}
    assert sorted(table["contact_id"].to_pylist()) == sorted(expected)
    for contact_id, row in found.items():
        person = people[contact_id]
        engaged = [time for _, time, machine in (*person["opened"], *person["clicked"]) if not machine]
        assert row["provider"] == person["attributes"]["provider"]
        assert row["engagement_rank"] == (rank_of((now - max(engaged)).days) if engaged else 9999)
    # One of each kind: every question is a scan of its own.
    for contact_id in [*sorted(expected)[:1], *sorted(people.keys() - expected)[:1]]:
        assert bool(explaining.unmet(tree, snapshots, contact_id, now)) is (contact_id not in expected)


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_the_engine_finds_whom_the_oracle_finds(data: st.DataObject, template: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path(tmp_path_factory.mktemp("world"))
    shutil.copy(template, folder / "central.sqlite3")
    engine = create_engine(f"sqlite:///{folder / 'central.sqlite3'}")
    world = World(engine, folder / "snapshots").set_up()
    criteria = data.draw(st.lists(trees, min_size=8, max_size=8), label="criteria")
    for now, people in _stages(data, world):
        with open_snapshots(engine, world.folder) as snapshots:
            for tree in criteria:
                _check(snapshots, tree, people, now)
    engine.dispose()
