"""The rule of a warm-up: what a day means for the next one, whatever it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.capacity import warm_up_rules
from mail_pipelines.capacity.warm_up_rules import Counts, Verdict, WarmUpError, judge, rules
from mail_pipelines.delivery.classes import Action, classes_of
from mail_pipelines.delivery.domain_health import NO_CONNECTION

CAREFUL = rules().curves["careful"]
CURVES = st.sampled_from(sorted(rules().curves.values(), key=lambda curve: curve.name))


@st.composite
def counted(draw: st.DrawFn, most: int = 400_000) -> Counts:
    sent = draw(st.integers(0, most))
    delivered = draw(st.integers(0, sent))
    bounced = draw(st.integers(0, sent - delivered))
    # A message may be deferred again and again.
    return Counts(sent, delivered, bounced, draw(st.integers(0, 2 * sent)), draw(st.integers(0, delivered)))


@given(curve=CURVES, step=st.integers(0, 25), day=counted(), before=counted(), idle_days=st.integers(0, 60), volume=st.integers(0, 10**6))
def test_a_step_up_is_earned_and_a_step_back_has_a_reason(
    curve: warm_up_rules.Curve, step: int, day: Counts, before: Counts, idle_days: int, volume: int
) -> None:
    known, days = rules(), before + day
    step = min(step, curve.end)
    found = judge(curve, step, day, days, idle_days=idle_days, volume=volume, known=known)
    assert 0 <= found.step <= curve.end
    assert found.why
    if not curve.by_itself or (step == curve.end and day.sent):
        assert found.step == step
        return
    answers = day.delivered + day.bounced + day.deferred
    # The same thresholds, in whole numbers and without the code that is tested.
    bad = {"complaints": (days.complaints, days.delivered), "deferrals": (day.deferred, answers), "bounces": (day.bounced, answers)}
    worst = 3
    for signal in known.signals:
        count, total = bad[signal.of]
        if count >= signal.least:
            reached = [limit for limit in (signal.hold, signal.back, signal.far_back) if count >= limit * max(total, count) * (1 + 1e-9)]
            worst = min(worst, 3 - len(reached) if len(reached) < 3 else 0)
    if found.step == step + 1:
        assert found.verdict is Verdict.UP
        assert 10 * day.sent >= 7 * curve.caps[step]
        assert worst == 3
    elif found.step < step and found.verdict is Verdict.BACK:
        assert day.sent
        assert step - found.step <= 2
        assert worst < 3
    elif found.step < step:
        assert (found.verdict, day.sent) == (Verdict.REWARM, 0)
        assert idle_days >= 30
        assert found.step == 0 or curve.caps[found.step] <= volume / 2
    else:
        assert found.step == step
        held = any(bad[one.of][0] >= one.least and bad[one.of][0] >= one.hold * max(bad[one.of]) * (1 - 1e-9) for one in known.signals)
        assert not day.sent or 10 * day.sent < 7 * curve.caps[step] or held


@given(step=st.integers(0, 19), share=st.integers(0, 150))
def test_a_good_day_counts_from_seventy_percent_on(step: int, share: int) -> None:
    cap = CAREFUL.caps[step]
    sent = -(-cap * share // 100)
    found = judge(CAREFUL, step, Counts(sent, sent), Counts(sent, sent), idle_days=0, volume=0, known=rules())
    assert found.step == step + (sent >= 0.7 * cap)


@given(step=st.integers(0, 19), bad=st.integers(0, 5000), more=st.integers(0, 5000), signal=st.sampled_from(["complaints", "deferrals", "bounces"]))
def test_worse_signals_never_lead_further(step: int, bad: int, more: int, signal: str) -> None:
    field = {"complaints": "complaints", "deferrals": "deferred", "bounces": "bounced"}[signal]

    def after(count: int) -> int:
        day = Counts(CAREFUL.caps[step], 10_000) + Counts(**{field: count})
        return judge(CAREFUL, step, day, day, idle_days=0, volume=0, known=rules()).step

    assert after(bad + more) <= after(bad)


@pytest.mark.parametrize(
    ("day", "expected", "words"),
    [
        (Counts(7084, 7000), 9, "used 100% of 7,083 with good signals"),
        (Counts(4000, 4000), 8, "used 56% of 7,083, fewer than 70%"),
        (Counts(7084, 7000, complaints=1), 9, "good signals"),
        (Counts(7084, 7000, complaints=5), 8, "0.07% complaints, the limit is 0.05%"),
        (Counts(7084, 7000, complaints=8), 7, "0.11% complaints, the limit is 0.10%"),
        (Counts(7084, 7000, complaints=30), 6, "0.43% complaints, the limit is 0.30%"),
        (Counts(7084, 6000, deferred=800), 8, "11.76% deferrals, the limit is 10.00%"),
        (Counts(7084, 6000, deferred=1300), 7, "17.81% deferrals, the limit is 15.00%"),
        (Counts(7084, 2000, deferred=1000), 6, "33.33% deferrals, the limit is 30.00%"),
        (Counts(7084, 6900, bounced=184), 8, "2.60% bounces, the limit is 2.00%"),
        (Counts(7084, 6500, bounced=584), 7, "8.24% bounces, the limit is 5.00%"),
        (Counts(7084, 6000, bounced=1084), 6, "15.30% bounces, the limit is 10.00%"),
        (Counts(7084, 5000, bounced=1084, deferred=1000, complaints=6), 6, "15.30% bounces, the limit is 10.00%"),
    ],
)
def test_what_a_day_of_step_eight_leads_to(day: Counts, expected: int, words: str) -> None:
    found = judge(CAREFUL, 8, day, day, idle_days=0, volume=0, known=rules())
    assert found.step == expected
    assert words in found.why


def test_after_a_month_without_mail_it_begins_at_half_of_what_it_sent() -> None:
    def after(days: int, volume: int, step: int = CAREFUL.end) -> int:
        return judge(CAREFUL, step, Counts(), Counts(), idle_days=days, volume=volume, known=rules()).step

    assert after(29, 20_000) == CAREFUL.end
    # The highest step that allows no more than 10,000.
    assert CAREFUL.caps[after(30, 20_000)] == 9917
    assert after(31, 500) == 0
    # Never further than it was.
    assert after(45, 10**6, step=3) == 3


def test_the_curves_as_they_are_shipped() -> None:
    assert {name: curve.by_itself for name, curve in rules().curves.items()} == {"careful": True, "normal": True, "fast": True, "manual": False}
    for curve in rules().curves.values():
        growth = [after / before for before, after in zip(curve.caps, curve.caps[1:], strict=False)]
        assert all(1 < factor <= 2.5 for factor in growth)
    assert list(CAREFUL.caps) == [int(24 * 20 * 1.4**step) for step in range(20)]
    # What the far plan counts on (`docs/warm-up.md`): the sums of 8 and of 15 days.
    assert (sum(CAREFUL.caps[:8]), sum(CAREFUL.caps[:15])) == (16506, 185475)
    assert rules().ignored <= classes_of(*Action) | {NO_CONNECTION}
    with pytest.raises(WarmUpError, match="there is no warm-up curve 'carefull'; did you mean 'careful'"):
        rules().curve("carefull")
