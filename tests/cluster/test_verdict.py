"""The verdict finds a single message that is missing, repeated, or counted where it was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.cluster import destinations
from mail_pipelines.cluster.destinations import Arrived
from mail_pipelines.cluster.verdict import Verdict, judge
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import State
from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.catcher.play import ACCEPTED, reply
from mail_pipelines.dispatch.catcher.store import Store
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import JournalWriter, Kind
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.delivery.results import SERVERS, Outcome, make_results, some_outcomes

RECIPIENTS = 300
KEY = b"0123456789abcdef"
KINDS = {State.BOUNCED: Kind.BOUNCED, State.DEFERRED: Kind.DEFERRED}


def arrived_of(outcomes: list[Outcome], campaign_id: int) -> dict[str, dict[int, Arrived]]:
    """What the destinations behind each server must have counted."""
    found = {server: {campaign_id: Arrived(seconds={1, 2, 3})} for server in SERVERS.values()}
    for outcome in outcomes:
        behind = found[SERVERS[outcome.server_id]][campaign_id] if outcome.server_id else None
        if behind is not None and outcome.state is State.DELIVERED:
            behind.copies[outcome.contact_id] += 1
        elif behind is not None and outcome.state in KINDS:
            behind.refusals[KINDS[outcome.state]] += 1
    return found


def nothing(_: Arrived) -> None:
    pass


def one_is_missing(arrived: Arrived) -> None:
    del arrived.copies[next(iter(arrived.copies))]


def one_came_twice(arrived: Arrived) -> None:
    arrived.copies[next(iter(arrived.copies))] += 1


def one_more_was_put_off(arrived: Arrived) -> None:
    arrived.refusals[Kind.DEFERRED] += 1


@pytest.mark.parametrize(
    ("change", "lost", "duplicates", "agrees"),
    [(nothing, 0, 0, True), (one_is_missing, 1, 0, False), (one_came_twice, 0, 1, False), (one_more_was_put_off, 0, 0, False)],
)
def test_a_single_message_is_found(engine: sa.Engine, change: Callable[[Arrived], None], lost: int, duplicates: int, agrees: bool) -> None:
    outcomes = some_outcomes(RECIPIENTS)
    campaign = make_results(engine, RECIPIENTS, outcomes)
    arrived = arrived_of(outcomes, campaign.id)
    change(arrived["alpha"][campaign.id])
    found = judged(engine, campaign.key, arrived)
    assert {row.server: row.agrees for row in found.rows} == {"alpha": agrees, "beta": True}
    assert (found.lost, found.duplicates, found.unknown) == (lost, duplicates, 0)
    assert (found.disagreements == ()) == agrees
    assert (found.seconds, found.together) == (3, 3)


def test_servers_that_never_sent_at_the_same_time_are_found(engine: sa.Engine) -> None:
    outcomes = some_outcomes(RECIPIENTS)
    campaign = make_results(engine, RECIPIENTS, outcomes)
    arrived = arrived_of(outcomes, campaign.id)
    arrived["alpha"][campaign.id].seconds.clear()
    assert judged(engine, campaign.key, arrived).disagreements == ("there is no second in which all servers sent",)


def judged(engine: sa.Engine, key: str, arrived: dict[str, dict[int, Arrived]]) -> Verdict:
    with reading(engine) as connection:
        return judge(connection, (key,), arrived)


def test_destinations_count_by_token(tmp_path: Path) -> None:
    folders = ServerFolders(tmp_path / "run", tmp_path / "log", tmp_path / "mail")
    folders.make()
    store, journal = Store(folders.mail), JournalWriter(folders.journal)
    bounced, deferred = reply("550 5.1.1 User unknown"), reply("451 4.7.1 Greylisted")
    for campaign, contact, outcomes in ((1, 1, [ACCEPTED]), (1, 2, [ACCEPTED, ACCEPTED]), (1, 3, [deferred, bounced]), (2, 1, [deferred, ACCEPTED])):
        for outcome in outcomes:
            token = sign_delivery(DeliveryToken(campaign, contact, 0), KEY)
            if outcome is ACCEPTED:
                store.keep(token=token, permit="-", sender="s@shop.test", recipient="r@post.test", data=b"Subject: hello\r\n\r\n")
            journal.write(log.done(token, outcome))
    store.close()
    journal.close()
    counted = {campaign: (arrived.outcomes(), dict(arrived.copies)) for campaign, arrived in destinations.count(folders, KEY).items()}
    assert counted == {
        1: ({"delivered": 3, "bounced": 1, "deferred": 1}, {1: 1, 2: 2}),
        2: ({"delivered": 1, "bounced": 0, "deferred": 1}, {1: 1}),
    }
