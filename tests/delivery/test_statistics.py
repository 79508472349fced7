"""Statistics equal a slow count of what happened."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import State
from mail_pipelines.delivery import engagement, plots, statistics
from mail_pipelines.delivery.statistics import Statistics
from tests.campaigns.parts import make_campaign
from tests.delivery.results import SERVERS, START, Outcome, add_claims, add_reactions, make_results, some_outcomes

RECIPIENTS = 400


def read(engine: sa.Engine, campaign: Campaign) -> Statistics:
    with reading(engine) as connection:
        return statistics.read(connection, campaign)


def offers(outcomes: list[Outcome], state: State | None = None) -> list[Outcome]:
    answers = (State.DELIVERED, State.BOUNCED, State.DEFERRED)
    return [outcome for outcome in outcomes if outcome.state in answers and state in (None, outcome.state)]


def test_totals_and_rates_equal_a_count(engine: sa.Engine) -> None:
    outcomes = some_outcomes(RECIPIENTS)
    found = read(engine, make_results(engine, RECIPIENTS, outcomes, excluded={"unsubscribe": 7, "missing": 2}))
    ends = Counter({outcome.contact_id: outcome for outcome in outcomes}[number].state for number in {outcome.contact_id for outcome in outcomes})
    assert found.totals.check().parts() == {
        "delivered": ends[State.DELIVERED],
        "bounced": ends[State.BOUNCED],
        "deferred": ends[State.DEFERRED],
        "pending": RECIPIENTS - ends.total(),
        "suppressed": ends[State.SUPPRESSED],
        "expired": ends[State.EXPIRED],
        "cancelled": 0,
        "unknown": 0,
        "unresolved": 0,
    }
    hard = sum(outcome.reason == "invalid_recipient" for outcome in offers(outcomes, State.BOUNCED))
    answers = ends[State.DELIVERED] + ends[State.BOUNCED]
    assert 0 < hard < ends[State.BOUNCED]
    assert found.rates.delivered == ends[State.DELIVERED] / RECIPIENTS
    assert found.rates.bounced == ends[State.BOUNCED] / answers
    assert found.rates.hard_bounced == hard / answers
    assert found.rates.deferred == len(offers(outcomes, State.DEFERRED)) / len(offers(outcomes))
    numbers = found.numbers()
    assert (numbers["matched"], numbers["excluded"], numbers["audience"]) == (RECIPIENTS + 9, 9, RECIPIENTS)
    assert dict(zip(found.by_state["state"], found.by_state["recipients"], strict=True)) == found.totals.parts()
    assert found.by_state["share"].sum() == pytest.approx(1)


def test_tables_by_provider_server_and_reason_equal_a_count(engine: sa.Engine) -> None:
    outcomes = some_outcomes(RECIPIENTS)
    found = read(engine, make_results(engine, RECIPIENTS, outcomes))

    delivered = Counter(outcome.provider for outcome in offers(outcomes, State.DELIVERED))
    assert dict(zip(found.by_provider["provider"], found.by_provider["delivered"], strict=True)) == delivered
    assert found.by_provider["audience"].sum() == RECIPIENTS
    assert found.by_provider["audience"].is_monotonic_decreasing

    for row in found.by_server.to_dict("records"):
        mine = [outcome for outcome in offers(outcomes) if SERVERS[outcome.server_id] == row["server"]]
        states = Counter(outcome.state for outcome in mine)
        assert (row["delivered"], row["bounced"], row["deferred"]) == (states[State.DELIVERED], states[State.BOUNCED], states[State.DEFERRED])
        assert row["offers"] == len(mine)
        assert row["first_minute"] == min(outcome.at for outcome in mine).replace(second=0, microsecond=0)
        assert row["last_minute"] == max(outcome.at for outcome in mine).replace(second=0, microsecond=0)
    # The centre, which expires rows, sends nothing.
    assert list(found.by_server["server"]) == ["alpha", "beta"]

    reasons = Counter((outcome.state.name.lower(), outcome.reason) for outcome in outcomes if outcome.reason)
    assert {(row["outcome"], row["reason"]): row["count"] for row in found.by_reason.to_dict("records")} == reasons
    assert found.by_reason[found.by_reason["outcome"] == "bounced"]["share"].sum() == pytest.approx(1)


def test_minutes_equal_a_count(engine: sa.Engine) -> None:
    outcomes = some_outcomes(RECIPIENTS)
    found = read(engine, make_results(engine, RECIPIENTS, outcomes))
    minutes = Counter((outcome.at.replace(second=0, microsecond=0), SERVERS[outcome.server_id], outcome.state) for outcome in offers(outcomes))
    rows = found.per_minute.to_dict("records")
    assert {
        (row["minute"], row["server"], state): row[state.name.lower()] for row in rows for state in statistics.OFFERED if row[state.name.lower()]
    } == minutes
    per_minute = Counter(outcome.at.replace(second=0, microsecond=0) for outcome in offers(outcomes))
    assert found.peak_per_minute == max(per_minute.values())
    assert (found.first_minute, found.last_minute) == (min(per_minute), max(per_minute))
    assert found.offers == len(offers(outcomes))


def test_reading_never_touches_the_ledger(engine: sa.Engine) -> None:
    campaign = make_results(engine, 50, some_outcomes(50))
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    read(engine, campaign)
    assert statements
    assert not [statement for statement in statements if "deliveries" in statement]


def test_a_campaign_never_frozen_has_zeros_and_plots_that_say_so(engine: sa.Engine) -> None:
    campaign = make_campaign(engine)
    found = read(engine, campaign)
    assert found.totals.audience == found.offers == found.peak_per_minute == 0
    assert found.first_minute is found.activity is found.per_second is None
    assert found.numbers()["delivered_rate"] == 0.0
    assert found.by_provider.empty
    assert found.by_server.empty
    assert found.by_reason.empty
    with reading(engine) as connection:
        reactions = engagement.read(connection, campaign)
    assert set(reactions.numbers().values()) == {0}
    for png in (
        plots.states(found.by_state),
        plots.messages_per_minute(found.per_minute),
        plots.engagement(reactions.hourly),
        plots.refusals(reactions.hourly),
    ):
        assert png.startswith(b"\x89PNG")


# --- activity ---


def test_overlap_is_the_share_of_sending_seconds_in_which_two_servers_sent(engine: sa.Engine) -> None:
    campaign = make_results(engine, 100, some_outcomes(100))
    # alpha sends 0–9 and 20–29 (ten seconds each), beta 5–24; a claim that is still open does not count yet.
    add_claims(engine, campaign.id, [(1, 0.2, 4.1), (1, 4.2, 9.5), (1, 20.0, 29.9), (2, 5.5, 14.0), (2, 15.0, 24.0)])
    activity = read(engine, campaign).activity
    assert activity is not None
    assert activity.sending_seconds == 30
    assert activity.overlap == 10 / 30
    assert (activity.first_at, activity.last_at) == (START, START + dt.timedelta(seconds=30))
    assert read(engine, campaign).per_second == read(engine, campaign).offers / 30


def test_a_claim_settled_late_counts_until_its_lease_ended(engine: sa.Engine) -> None:
    campaign = make_results(engine, 10, some_outcomes(10))
    add_claims(engine, campaign.id, [(1, 0, 3600)], lease_seconds=9)
    activity = read(engine, campaign).activity
    assert activity is not None
    assert (activity.sending_seconds, activity.overlap) == (10, 0.0)


def test_an_open_claim_is_no_sending_yet(engine: sa.Engine) -> None:
    campaign = make_results(engine, 10, some_outcomes(10))
    add_claims(engine, campaign.id, [(1, 0, 5)], state="open")
    assert read(engine, campaign).activity is None


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=30))
def test_covered_seconds_equal_a_count_second_by_second(claims: list[tuple[int, int, int]]) -> None:
    sending = [sum(any(mine == server and begin <= second < begin + length for mine, begin, length in claims) for server in (1, 2, 3)) for second in range(100)]
    spans = statistics._merged((server, begin, begin + length) for server, begin, length in sorted(claims))
    assert statistics._covered(spans) == (sum(count >= 1 for count in sending), sum(count >= 2 for count in sending))


# --- engagement ---


def test_engagement_equals_a_count(engine: sa.Engine) -> None:
    campaign = make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS))
    reactions = add_reactions(engine, campaign.id, RECIPIENTS)
    with reading(engine) as connection:
        found = engagement.read(connection, campaign)

    def events(kind: str, machine: bool) -> list[int]:
        return [reaction.contact_id for reaction in reactions if (reaction.kind, reaction.machine) == (kind, machine)]

    assert (found.opens, found.openers, found.machine_opens) == (len(events("open", False)), len(set(events("open", False))), len(events("open", True)))
    assert (found.clicks, found.clickers, found.machine_clicks) == (len(events("click", False)), len(set(events("click", False))), len(events("click", True)))
    assert (found.unsubscribers, found.complainers) == (len(set(events("unsubscribe", False))), len(set(events("complaint", False))))
    assert found.numbers()["open_rate"] == round(found.openers / found.delivered, 5)

    names = {("open", False): "opens", ("open", True): "machine_opens", ("click", False): "clicks", ("click", True): "machine_clicks"}
    names |= {("unsubscribe", False): "unsubscribes", ("complaint", False): "complaints"}
    hours = Counter((reaction.at.replace(minute=0, second=0, microsecond=0), names[reaction.kind, reaction.machine]) for reaction in reactions)
    assert {(row["hour"], name): row[name] for row in found.hourly.to_dict("records") for name in engagement.HOURLY if row[name]} == hours
    assert found.hourly["hour"].is_monotonic_increasing

    for row in found.links.to_dict("records"):
        mine = [reaction for reaction in reactions if row["url"] == f"https://shop.test/{reaction.link_id}"]
        people = [reaction.contact_id for reaction in mine if not reaction.machine]
        assert (row["clicks"], row["clickers"], row["machine_clicks"]) == (len(people), len(set(people)), len(mine) - len(people))
    assert len(found.links) == 3
    assert found.links["clicks"].is_monotonic_decreasing


def test_plots_are_small_pictures(engine: sa.Engine) -> None:
    campaign = make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS))
    add_reactions(engine, campaign.id, RECIPIENTS)
    found = read(engine, campaign)
    with reading(engine) as connection:
        hourly = engagement.read(connection, campaign).hourly
    for png in (plots.states(found.by_state), plots.messages_per_minute(found.per_minute), plots.engagement(hourly), plots.refusals(hourly)):
        assert png.startswith(b"\x89PNG")
        assert len(png) < 60_000
