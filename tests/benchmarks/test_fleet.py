"""The instruments of `bench fleet` do what their figures are read as; and one small fleet sends, whatever the machine's pace."""

from __future__ import annotations

import pytest

from mail_pipelines.benchmarks import fleet, short_slots
from mail_pipelines.benchmarks.fleet import Look
from mail_pipelines.database.procedures import installation
from mail_pipelines.delivery.recording import SLOT_SECONDS

A, B = ("s1", "large"), ("s2", "large")


def test_only_time_with_grant_and_due_rows_in_which_nothing_arrives_counts_as_idle() -> None:
    both, one = frozenset({A, B}), frozenset({B})
    looks = [Look(10.0, 9, both), Look(11.0, 5, both), Look(12.5, 3, one), Look(13.5, 0, frozenset())]
    wanted, idle = fleet._times(looks, {A: [10.2, 10.9], B: [11.5, 12.5]})
    assert wanted == {A: 2.5, B: 3.5}
    # A has none from 11 to 12.5, and may send none after; B has none from 10 to 11, nor from 12.5 on.
    assert idle == {A: 1.5, B: 2.0}


@pytest.mark.server
@pytest.mark.timeout(300)
def test_two_servers_send_all_of_it_once_and_no_sooner_than_the_plan_allows() -> None:
    finish, idle, slots, lost = fleet.measure((2,), 6)
    assert finish.reference == pytest.approx(6, abs=0.5)
    assert finish.ratio >= 0.95
    assert 0 < idle.reference <= finish.value + 2
    assert idle.value <= idle.reference
    assert 1 <= slots.value <= 2
    assert lost.met


@pytest.mark.server
@pytest.mark.timeout(300)
def test_where_slots_are_short_processes_and_procedures_count_in_them_alike() -> None:
    """A claim of a slot that only one of them knows would get nothing."""
    finish, _, slots, lost = short_slots.run(10, (1,), 30)
    assert finish.reference == pytest.approx(30, abs=0.5)
    # Where the first slot begins as the campaign does, the last claim, of two seconds, is of the third.
    assert 3 <= slots.value <= 4 + (finish.value - 30) // 10 + 1
    assert lost.met
    # Here nothing has changed, and each procedure that counts in slots is one that is changed there.
    assert SLOT_SECONDS == short_slots._REAL
    counting = [name for name in installation.names() if "c_slot" in installation.text(name)]
    assert counting
    assert all(short_slots._IN_PROCEDURES.format(SLOT_SECONDS) in installation.text(name) for name in counting)
