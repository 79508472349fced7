"""When a server is taken out of service by itself: each row of the table, the edges of each threshold, and that nothing flaps."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace

import pytest

from mail_pipelines.capacity.health_rules import Heard, Outcome, Record, Seen, Standing, decide, rules

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
RULE = rules()
CONFIRM, MINUTE = RULE.confirm, dt.timedelta(minutes=1)
PROVIDERS = ("google", "microsoft", "yahoo", "other")


def server(key: str, share: float = 0.02, *, answers: int = 1_000, bad_at: int = 4, pool: int = 1, **values: object) -> Seen:
    """A server of which `share` of the answers of `bad_at` providers is bad, and 2 % of the others."""
    heard = {name: Heard(answers, round(answers * (share if number < bad_at else 0.02))) for number, name in enumerate(PROVIDERS)}
    return replace(Seen(key, pool, sends=True, heard=heard), **values)  # type: ignore[arg-type]


def fleet(*special: Seen, healthy: int = 4) -> list[Seen]:
    return [*special, *(server(f"h{number}") for number in range(healthy))]


def again(seen: list[Seen], known: Mapping[str, Record], minutes: float = 15) -> Outcome:
    return decide(seen, known, NOW + dt.timedelta(minutes=minutes))


SICK = Record(Standing.SUSPECT, NOW, "google 500 of 1,000 answers")


def test_a_server_that_is_far_worse_than_its_peers_is_suspect_and_after_a_while_drained() -> None:
    seen = fleet(server("bad", 0.5))
    first = decide(seen, {}, NOW)
    assert (first.drain, first.trouble, first.records["bad"].standing, set(first.records)) == ([], "", Standing.SUSPECT, {"bad"})
    assert "google 500 of 1,000 answers; microsoft 500 of 1,000" in first.records["bad"].why
    before = decide(seen, first.records, NOW + CONFIRM - MINUTE)
    assert before.drain == []
    after = decide(seen, before.records, NOW + CONFIRM)
    assert after.drain == ["bad"]
    assert after.records["bad"] == replace(first.records["bad"], standing=Standing.DRAINED, at=NOW + CONFIRM)


@pytest.mark.parametrize(
    ("bad", "sick"),
    [
        (server("bad", RULE.share), True),
        (server("bad", RULE.share - 0.001), False),
        # One provider is its breaker's matter; two of four are half of them.
        (server("bad", 0.9, bad_at=1), False),
        (server("bad", 0.9, bad_at=2), True),
        (server("bad", 0.9, answers=RULE.least), True),
        (server("bad", 0.9, answers=RULE.least - 1), False),
        (server("bad", heard={name: Heard(7, 6, stopped=True) for name in PROVIDERS[:2]}), True),
        (server("bad", heard={PROVIDERS[0]: Heard(7, 6, stopped=True)}), False),
        (server("bad", sends=False), False),
        (server("bad", listed="192.0.2.1 is listed by zen.spamhaus.org"), True),
    ],
)
def test_what_makes_a_server_sick(bad: Seen, sick: bool) -> None:
    assert ("bad" in decide(fleet(bad), {}, NOW).records) is sick


def test_one_that_fares_as_its_peers_do_is_not_to_blame() -> None:
    """A third of all answers is bad everywhere, and it has three quarters: less than three times as much."""
    seen = [server("bad", 0.75), *(server(f"h{number}", 0.29) for number in range(4))]
    assert decide(seen, {}, NOW).records == {}


def test_when_all_are_refused_at_once_it_is_what_they_send_and_none_is_drained() -> None:
    seen = [server(f"b{number}", 0.5) for number in range(3)] + [server("h1"), server("h2")]
    known = {f"b{number}": SICK for number in range(3)}
    found = again(seen, known)
    assert found.drain == []
    assert found.trouble.startswith("3 of 5 servers are refused at once, by google, microsoft, yahoo")
    # Half of them is no majority.
    assert decide([server("b0", 0.5), server("h1")], {}, NOW).trouble == ""
    assert decide([server("only", 0.5)], {}, NOW).trouble.startswith("1 of 1 servers")
    # And when most are listed it is their network.
    many = [server(f"l{number}", listed="a list") for number in range(3)] + [server("h1")]
    assert again(many, {"l0": SICK}).trouble == "3 of 4 servers are listed at once, and none is drained: a list"


def test_while_the_whole_fleet_is_in_trouble_nothing_is_forgotten_nor_decided() -> None:
    seen = [server(f"b{number}", 0.5) for number in range(3)]
    assert again(seen, {"b0": SICK}, minutes=60).records == {"b0": SICK}


def test_one_goes_at_a_look_and_no_more_than_a_fifth_of_a_pool() -> None:
    seen = fleet(server("b1", 0.5), server("b2", 0.5), healthy=8)
    known = {"b1": SICK, "b2": replace(SICK, at=NOW - MINUTE)}
    first = again(seen, known)
    assert first.drain == ["b2"]
    second = again([replace(one, sends=one.key != "b2") for one in seen], first.records, minutes=20)
    assert second.drain == ["b1"]
    small = fleet(server("b1", 0.5), server("b2", 0.5), healthy=5)
    alone = again(small, known)
    assert again([replace(one, sends=one.key != "b2") for one in small], alone.records, minutes=20).drain == []


def test_the_last_server_of_a_pool_is_never_drained() -> None:
    seen = fleet(server("only", 0.5, pool=2))
    found = again(seen, {"only": SICK}, minutes=600)
    assert (found.drain, found.records["only"].standing) == ([], Standing.SUSPECT)


def test_a_suspect_that_is_in_between_stays_one_and_a_healthy_one_is_forgotten() -> None:
    between = fleet(server("bad", 0.2))
    assert decide(between, {}, NOW).records == {}
    assert again(between, {"bad": SICK}, minutes=600).records == {"bad": SICK}
    assert again(between, {"bad": SICK}, minutes=600).drain == []
    assert again(fleet(server("bad", 0.1)), {"bad": SICK}, minutes=1).records == {}
    # Somebody has paused it.
    assert again(fleet(server("bad", 0.5, sends=False)), {"bad": SICK}).records == {}


def test_one_that_is_taken_back_is_judged_by_what_came_since_and_forgotten_after_a_day() -> None:
    drained = {"bad": Record(Standing.DRAINED, NOW, "why")}
    assert again(fleet(server("bad", sends=False)), drained, minutes=6_000).records == drained
    back = again(fleet(server("bad", heard={})), drained).records
    taken = NOW + dt.timedelta(minutes=15)
    assert back == {"bad": Record(Standing.BACK, taken, "why", since=taken)}
    assert decide(fleet(server("bad")), back, taken + RULE.forget - MINUTE).records == back
    assert decide(fleet(server("bad")), back, taken + RULE.forget).records == {}
    worse = decide(fleet(server("bad", 0.5)), back, taken + MINUTE).records["bad"]
    assert (worse.standing, worse.at, worse.since) == (Standing.SUSPECT, taken + MINUTE, taken)
    well = decide(fleet(server("bad")), {"bad": worse}, taken + 2 * MINUTE).records["bad"]
    assert (well.standing, well.since) == (Standing.BACK, taken)


def test_a_lost_server_is_decided_of_once_and_a_retired_one_forgotten() -> None:
    lost = server("gone", sends=False, lost=True)
    found = decide(fleet(lost), {}, NOW)
    assert (found.drain, found.records) == ([], {"gone": Record(Standing.DRAINED, NOW, "it was declared lost")})
    assert again(fleet(lost), found.records, minutes=300).records == found.records
    assert again(fleet(server("gone", sends=False, retired=True)), found.records).records == {}


def test_what_is_refused_now_and_then_never_flaps() -> None:
    """Ten minutes bad, ten good, for a day: it is suspect for a while each time, and never drained."""
    records: Mapping[str, Record] = {}
    for minute in range(0, 24 * 60, 5):
        found = decide(fleet(server("bad", 0.5 if minute % 20 < 10 else 0.05)), records, NOW + dt.timedelta(minutes=minute))
        assert found.drain == []
        records = found.records
