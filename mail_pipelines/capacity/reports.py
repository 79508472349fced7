"""A plan as frames, numbers and words, for whoever shows it. Every send run loads this: no solver, and no pandas unless it is asked for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from mail_pipelines.capacity.planning import Made

PRIORITIES = ("low", "normal", "high", "urgent")


@dataclass(frozen=True)
class Report:
    """`campaigns`: campaign, priority, messages, finishes, finish_by, late, not_within_48_h, held_up_by.

    `orders`: campaign, warm_servers, why: those that would save a deadline now. `far`: pool, servers, order_by, due, first_day, days_too_late_without,
    days_too_late_with (added up over all messages), why: those of the next eight weeks.
    """

    numbers: Mapping[str, int | float]
    campaigns: pd.DataFrame
    orders: pd.DataFrame
    far: pd.DataFrame


def of(made: Made) -> Report:
    import pandas as pd

    plan = made.document
    campaigns = [
        (
            found["campaign"],
            PRIORITIES[found["priority"]],
            found["messages"],
            ending(found),
            minute(found["finish_by"]),
            found["late"],
            found["unmet"],
            found["bottleneck"],
        )
        for found in plan["campaigns"]
    ]
    columns = ["campaign", "priority", "messages", "finishes", "finish_by", "late", "not_within_48_h", "held_up_by"]
    orders = [(order["campaign"], order["servers"], order["why"]) for order in plan["orders"]]
    names = ["pool", "servers", "order_by", "due", "first_day", "days_too_late_without", "days_too_late_with", "why"]
    far = [tuple(order[key] for key in ("pool", "servers", "order_by", "due", "first_day", "short", "left", "why")) for order in plan["far"]]
    return Report(
        numbers={
            "planned_messages": sum(found["messages"] - found["unmet"] for found in plan["campaigns"]),
            "late_messages": sum(found["late"] for found in plan["campaigns"]),
            "unmet_messages": sum(found["unmet"] for found in plan["campaigns"]),
            "planning_seconds": plan["seconds"],
            "providers_by_rule": plan["by_rule"],
        },
        campaigns=pd.DataFrame(campaigns, columns=columns),
        orders=pd.DataFrame(orders, columns=["campaign", "warm_servers", "why"]),
        far=pd.DataFrame(far, columns=names).astype({"due": "object"}),
    )


def hours(sent: Sequence[tuple[int, int]], made: Made) -> pd.DataFrame:
    """Messages by the hour: hour (UTC), sent, planned. Of hours that have begun it is what was planned before they did."""
    import pandas as pd

    planned = {**dict(made.document["hourly"]), **dict(made.document["planned_before"])}
    frames = [
        pd.DataFrame(list(found), columns=["hour", name]).astype({"hour": "int64", name: "int64"}).set_index("hour")
        for name, found in (("sent", sent), ("planned", planned.items()))
    ]
    table = pd.concat(frames, axis=1).sort_index().fillna(0).astype("int64").reset_index()
    table["hour"] = pd.to_datetime(table["hour"], unit="s", utc=True)
    return table


def ending(found: Mapping[str, Any]) -> str:
    """When a campaign ends, in words: of a forecast as a plan's document has it. "" where its size is not known."""
    if found["unmet"]:
        return f"after {minute(found['earliest'])}" if found["earliest"] else "never, as things are"
    return minute(found["finish_at"])


def minute(moment: str | None) -> str:
    """A moment in ISO 8601 as people read it; "" for none."""
    return "" if moment is None else f"{dt.datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"
