"""A domain that has said nothing yet is met by one message; the dead ones share a few connections."""

from __future__ import annotations

from mail_pipelines.dispatch.claims import Row
from mail_pipelines.dispatch.meetings import Meetings, Turns


def row(number: int, domain: str, *, asks: bool = False) -> Row:
    return Row(number, 0, f"p{number}@{domain}", {}, asks)


def numbers(turns: Turns) -> list[int]:
    """All that may be offered now, in order."""
    found = []
    while turns.has_next and (following := turns.next()) is not None:
        found.append(following.contact_id)
    return found


ROWS = [row(1, "a.test"), row(2, "A.test"), row(3, "b.test"), row(4, "a.test"), row(5, "b.test")]


def test_one_message_meets_a_domain_and_its_answer_frees_the_others_in_their_order() -> None:
    meetings = Meetings(20)
    turns = Turns(ROWS, meetings)
    assert numbers(turns) == [1, 3]
    assert (turns.quick, turns.held, turns.is_empty) == (0, 3, False)
    assert meetings.end(ROWS[0], True)
    turns.settle("a.test", True)
    assert numbers(turns) == [2, 4]
    # Known now: nobody waits for these.
    assert not meetings.end(ROWS[1], True)
    assert numbers(Turns([row(6, "a.test"), row(7, "a.test")], meetings)) == [6, 7]


def test_silence_leaves_the_others_out_and_once_recorded_the_domain_may_be_met_again() -> None:
    meetings = Meetings(20)
    turns, other = Turns(ROWS, meetings), Turns([row(6, "a.test")], meetings)
    assert (numbers(turns), numbers(other)) == ([1, 3], [])
    assert not meetings.end(ROWS[0], False)
    # Until the ledger knows, a claim may still get rows of the domain.
    between = Turns([row(9, "a.test")], meetings)
    assert (numbers(between), between.held) == ([], 1)
    assert meetings.recorded("a.test")
    for claim in (turns, other, between):
        claim.settle("a.test", False)
    assert numbers(turns) == []
    assert (turns.held, other.is_empty, between.is_empty) == (1, True, True)
    assert numbers(Turns([row(7, "a.test"), row(8, "a.test")], meetings)) == [7]


def test_an_offer_that_was_not_made_leaves_the_meeting_to_the_next_row() -> None:
    meetings = Meetings(20)
    turns = Turns(ROWS, meetings)
    assert numbers(turns) == [1, 3]
    assert meetings.end(ROWS[0], None)
    turns.settle("a.test", None)
    assert numbers(turns) == [2]
    assert turns.held == 2


def test_a_domain_that_falls_silent_has_to_be_met_again() -> None:
    meetings = Meetings(20)
    assert numbers(Turns([row(1, "a.test")], meetings)) == [1]
    meetings.end(row(1, "a.test"), True)
    assert numbers(Turns([row(2, "a.test"), row(3, "a.test")], meetings)) == [2, 3]
    meetings.end(row(2, "a.test"), False)
    assert meetings.recorded("a.test")
    assert numbers(Turns([row(4, "a.test"), row(5, "a.test")], meetings)) == [4]


def test_dead_domains_share_a_twentieth_of_the_connections() -> None:
    for connections, at_once in ((1, 1), (16, 1), (32, 1), (60, 3)):
        meetings = Meetings(connections)
        asking = [row(number, f"d{number}.test", asks=True) for number in range(10)]
        turns = Turns([*asking, row(20, "a.test")], meetings)
        assert numbers(turns) == [*range(at_once), 20]
        assert not turns.is_empty
        meetings.end(asking[0], False)
        assert numbers(turns) == [at_once]
        turns.clear()
        assert turns.is_empty
