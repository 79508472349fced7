"""Pictures of a campaign's results, as PNG bytes (transparent, under 60 kB), for Dagster's metadata.

What belongs here: drawing frames of `statistics`, `engagement`, plans and reputation. What does not: counting. The colours keep enough contrast on
white as on black, since the Dagster UI has both. Figures are objects of their own: no pyplot, so nothing is shared between threads.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mail_pipelines.delivery.statistics import OFFERED

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES, _DPI = 8.0, 120
_INK, _GRID = "#7d8796", "#7d879640"
_SERVER_COLOURS = ("#3f88c5", "#e0863d", "#3fa57c", "#b565b0", "#c7a52f", "#d65f6c", "#6b7fd7", "#55a5b3")
_STATE_COLOURS = {
    "delivered": "#3fa57c",
    "bounced": "#d65f6c",
    "deferred": "#e0a03d",
    "pending": "#8b95a5",
    "suppressed": "#9a74cf",
    "expired": "#b08a64",
    "cancelled": "#64748b",
    "unknown": "#cf6fae",
    "unresolved": "#94506f",
}
_OTHERS = "others"
# A bar or point stands for one of these many minutes: the least that gives no more than `_MOST_BARS`.
_STEPS_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120, 240, 360, 720, 1440, 10080)
_MOST_BARS = 90


def messages_per_minute(per_minute: pd.DataFrame) -> bytes:
    """Stacked bars of the offers per minute by server; `per_minute` is that of `Statistics`.

    Longer campaigns are drawn in steps of several minutes, as rates per minute. Beyond eight servers the smallest share a colour.
    """
    if per_minute.empty:
        return _nothing("Nothing sent yet")
    offers = per_minute.assign(offers=per_minute[[state.name.lower() for state in OFFERED]].sum(axis=1))
    table = _few_columns(offers.pivot_table(index="minute", columns="server", values="offers", aggfunc="sum", fill_value=0))
    return _stacked_rates(table, dict(zip(table.columns, _SERVER_COLOURS, strict=False)), "messages per minute")


def outcomes_per_minute(outcomes: Mapping[tuple[str, Any], int]) -> bytes:
    """Stacked bars of the outcomes per minute by kind; keys are (minute as `2026-11-24 12:15` in UTC, kind)."""
    if not outcomes:
        return _nothing("No outcome in the new lines")
    import pandas as pd

    frame = pd.DataFrame([(minute, str(kind), count) for (minute, kind), count in outcomes.items()], columns=["minute", "kind", "count"])
    frame["minute"] = pd.to_datetime(frame["minute"], format="%Y-%m-%d %H:%M", utc=True, errors="coerce")
    table = frame.pivot_table(index="minute", columns="kind", values="count", aggfunc="sum", fill_value=0)
    return _stacked_rates(table, {kind: _STATE_COLOURS.get(kind, _INK) for kind in table.columns}, "outcomes per minute")


def _stacked_rates(table: pd.DataFrame, colours: Mapping[str, str], words: str) -> bytes:
    """Stacked bars of counts by minute (index) and column, as rates per minute, in steps of several minutes where there are many."""
    step = _step_minutes(table.index)
    rates = table.resample(f"{step}min").sum() / step
    figure, axes = _canvas(3.0)
    bottom = rates.iloc[:, 0] * 0
    for column, colour in colours.items():
        axes.bar(rates.index, rates[column], width=step / 1440 * 0.92, bottom=bottom, color=colour, label=str(column), align="edge")
        bottom = bottom + rates[column]
    axes.set_ylabel(words if step == 1 else f"{words}\n(steps of {_duration(step)})")
    _time_axis(axes, rates.index, step)
    _legend(axes)
    return _png(figure)


def states(by_state: pd.DataFrame) -> bytes:
    """One bar of the audience, divided by what became of the recipients; `by_state` is that of `Statistics`."""
    present = by_state[by_state["recipients"] > 0]
    if present.empty:
        return _nothing("No audience yet")
    figure, axes = _canvas(1.5)
    left = 0
    for state, recipients, share in zip(present["state"], present["recipients"], present["share"], strict=True):
        axes.barh(0, recipients, left=left, height=0.6, color=_STATE_COLOURS[state], label=f"{state} {recipients:,} ({share:.1%})")
        left += recipients
    axes.set_xlim(0, left)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("recipients")
    _legend(axes, columns=4)
    return _png(figure)


def engagement(hourly: pd.DataFrame) -> bytes:
    """Opens and clicks of people over time, and machines' opens faintly; `hourly` is that of `Engagement`."""
    if hourly.empty:
        return _nothing("No reactions yet")
    counts = hourly.set_index("hour")
    step = max(60, _step_minutes(counts.index))
    table = counts.resample(f"{step}min").sum()
    figure, axes = _canvas(3.0)
    width = step / 1440
    axes.bar(table.index, table["opens"], width=width * 0.92, color=_SERVER_COLOURS[0], label="opens", align="edge")
    axes.bar(table.index, table["machine_opens"], width=width * 0.92, bottom=table["opens"], color=_INK, alpha=0.35, label="opens by machines", align="edge")
    axes.bar(table.index, table["clicks"], width=width * 0.46, color=_SERVER_COLOURS[1], label="clicks", align="edge")
    axes.set_ylabel(f"events in {_duration(step)}")
    _time_axis(axes, table.index, step)
    _legend(axes)
    return _png(figure)


def refusals(hourly: pd.DataFrame) -> bytes:
    """Unsubscribes and complaints added up over time; `hourly` is that of `Engagement`."""
    if hourly.empty:
        return _nothing("No reactions yet")
    sums = hourly.set_index("hour")[["unsubscribes", "complaints"]].cumsum()
    figure, axes = _canvas(2.2)
    for name, colour in (("unsubscribes", _SERVER_COLOURS[3]), ("complaints", _SERVER_COLOURS[5])):
        axes.step(sums.index, sums[name], where="post", color=colour, linewidth=1.8, marker=".", markersize=4, label=name)
    axes.set_ylabel("in total")
    axes.set_ylim(bottom=0)
    _time_axis(axes, sums.index, 60)
    _legend(axes)
    return _png(figure)


def plan_and_reality(hours: pd.DataFrame) -> bytes:
    """Messages by the hour: what was planned, and in front of it what was sent; `hours` is that of `capacity.reports`."""
    if hours.empty:
        return _nothing("Nothing to send")
    table = hours.set_index("hour")
    figure, axes = _canvas(2.6)
    width = 60 / 1440
    axes.bar(table.index, table["planned"], width=width * 0.92, color=_INK, alpha=0.35, label="planned", align="edge")
    axes.bar(table.index, table["sent"], width=width * 0.46, color=_SERVER_COLOURS[0], label="sent", align="edge")
    axes.set_ylabel("messages an hour")
    _time_axis(axes, table.index, 60)
    _legend(axes)
    return _png(figure)


def spam_rates(rates: pd.DataFrame) -> bytes:
    """Lines of the part of the mail that was reported as spam, day by day, of the subjects with the highest; `rates` is that of `reputation.report`."""
    if rates.empty:
        return _nothing("Nothing told yet")
    table = rates.pivot_table(index="day", columns="subject", values="spam_rate")
    worst = table.max().sort_values(ascending=False, kind="stable").index[: len(_SERVER_COLOURS)]
    figure, axes = _canvas(2.4)
    for subject, colour in zip(worst, _SERVER_COLOURS, strict=False):
        days = table[subject].dropna()
        axes.plot(days.index, days, color=colour, linewidth=1.8, marker=".", markersize=4, label=subject)
    axes.yaxis.set_major_formatter("{x:.2%}")
    axes.set_ylim(bottom=0)
    _time_axis(axes, table.index, 1440)
    _legend(axes, columns=4)
    return _png(figure)


def _few_columns(table: pd.DataFrame) -> pd.DataFrame:
    """No more columns than colours: the smallest are added up."""
    most = len(_SERVER_COLOURS)
    if table.shape[1] <= most:
        return table
    order = table.sum().sort_values(ascending=False, kind="stable").index
    kept = table[sorted(order[: most - 1])].copy()
    kept[_OTHERS] = table[order[most - 1 :]].sum(axis=1)
    return kept


def _step_minutes(times: pd.Index[Any]) -> int:
    minutes = (times.max() - times.min()).total_seconds() / 60 + 1
    return next((step for step in _STEPS_MINUTES if minutes / step <= _MOST_BARS), _STEPS_MINUTES[-1])


def _duration(minutes: int) -> str:
    for length, unit in ((10080, "week"), (1440, "day"), (60, "hour")):
        if minutes >= length:
            count = minutes // length
            return f"{count} {unit}s" if count > 1 else f"1 {unit}"
    return f"{minutes} minutes" if minutes > 1 else "1 minute"


def _canvas(height_inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
        text.set_fontsize(9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter("{x:,g}")
    return figure, axes


def _time_axis(axes: Axes, times: pd.Index[Any], step_minutes: int) -> None:
    """Times in UTC, with the day where it changes; at least ten steps wide, so that a short campaign is not one fat bar."""
    import datetime as dt

    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    step = dt.timedelta(minutes=step_minutes)
    begin, end = times.min().to_pydatetime(), times.max().to_pydatetime() + step
    missing = max(dt.timedelta(0), 10 * step - (end - begin)) / 2
    margin = (end - begin) * 0.01
    axes.set_xlim(begin - missing - margin, end + missing + margin)
    locator = AutoDateLocator(minticks=3, maxticks=8, tz=dt.UTC)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=dt.UTC))  # type: ignore[no-untyped-call]
    axes.xaxis.get_offset_text().set_color(_INK)
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.set_xlabel("UTC")


def _legend(axes: Axes, *, columns: int = 5) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=8, labelcolor=_INK, handlelength=0.9, handleheight=0.9)


def _nothing(words: str) -> bytes:
    figure, axes = _canvas(0.8)
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, color=_INK, fontsize=10, ha="center", va="center", transform=axes.transAxes)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
