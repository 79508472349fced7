"""The states of a campaign and the moves between them, as one table.

What belongs here: which move exists, who may make it, and the guarded statement that makes it; the hold, which stops a
campaign in any state without being one (`dispatch.holds`). What does not: the work a move entails (`audience`, `lifecycle`, `store`).

```
draft ⇄ scheduled → building → sending ⇄ paused → finished → archived
  └─────────┴──────────┴──────────┴────────┴────→ cancelled ────↑
```
"""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Campaign
from mail_pipelines.dispatch import holds
from mail_pipelines.dispatch.holds import Kind, Scope
from mail_pipelines.errors import MailPipelinesError

# A campaign that becomes ready this long after its start is held: mail for the morning may be wrong in the evening.
LATE_AFTER = dt.timedelta(hours=6)


class CampaignState(enum.StrEnum):
    DRAFT = "draft"
    SCHEDULED = "scheduled"
    BUILDING = "building"
    SENDING = "sending"
    PAUSED = "paused"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    # Over, and its ledger changes no more: it is in the archive, or on its way there (`archiving`).
    ARCHIVED = "archived"

    @property
    def is_terminal(self) -> bool:
        """Whether it is over: nothing is sent any more, and nobody can do anything."""
        return self in (CampaignState.FINISHED, CampaignState.CANCELLED, CampaignState.ARCHIVED)


class Actor(enum.StrEnum):
    """Who makes a move: a person (command, panel, API), or the centre's own runs."""

    OPERATOR = "operator"
    CENTRE = "centre"


@dataclass(frozen=True)
class Move:
    """`source` becomes `target` when `actor` says `verb`."""

    source: CampaignState
    target: CampaignState
    actor: Actor
    verb: str


MOVES = (
    Move(CampaignState.DRAFT, CampaignState.SCHEDULED, Actor.OPERATOR, "schedule"),
    Move(CampaignState.SCHEDULED, CampaignState.DRAFT, Actor.OPERATOR, "unschedule"),
    Move(CampaignState.SCHEDULED, CampaignState.BUILDING, Actor.CENTRE, "build"),
    Move(CampaignState.BUILDING, CampaignState.SENDING, Actor.CENTRE, "send"),
    Move(CampaignState.SENDING, CampaignState.PAUSED, Actor.OPERATOR, "pause"),
    Move(CampaignState.PAUSED, CampaignState.SENDING, Actor.OPERATOR, "resume"),
    Move(CampaignState.SENDING, CampaignState.FINISHED, Actor.CENTRE, "finish"),
    Move(CampaignState.PAUSED, CampaignState.FINISHED, Actor.CENTRE, "finish"),
    Move(CampaignState.DRAFT, CampaignState.CANCELLED, Actor.OPERATOR, "cancel"),
    Move(CampaignState.SCHEDULED, CampaignState.CANCELLED, Actor.OPERATOR, "cancel"),
    Move(CampaignState.BUILDING, CampaignState.CANCELLED, Actor.OPERATOR, "cancel"),
    Move(CampaignState.SENDING, CampaignState.CANCELLED, Actor.OPERATOR, "cancel"),
    Move(CampaignState.PAUSED, CampaignState.CANCELLED, Actor.OPERATOR, "cancel"),
    Move(CampaignState.FINISHED, CampaignState.ARCHIVED, Actor.CENTRE, "archive"),
    Move(CampaignState.CANCELLED, CampaignState.ARCHIVED, Actor.CENTRE, "archive"),
)


class StateError(MailPipelinesError):
    """The campaign is not in a state from which this can be done."""


def moves_from(state: CampaignState) -> tuple[Move, ...]:
    return tuple(move for move in MOVES if move.source is state)


def move(connection: Connection, campaign_id: int, source: CampaignState, target: CampaignState, *, actor: Actor, now: dt.datetime, **values: Any) -> None:
    """Move the campaign from `source` to `target` if it is in `source` now, and set further columns with it.

    Raises `StateError`, which names what is possible, if the table has no such move for `actor` or the campaign is in another state.
    """
    if not any(known.source is source and known.target is target and known.actor is actor for known in MOVES):
        raise StateError(f"a campaign cannot be moved from {source} to {target} by the {actor}; from {source} {_possible(source)}")
    if target is CampaignState.SENDING and source is CampaignState.BUILDING:
        values["started_at"] = now
    if target.is_terminal and not source.is_terminal:
        values["finished_at"] = now
    swap = sa.update(Campaign).where(Campaign.id == campaign_id, Campaign.state == source).values(state=target.value, updated_at=now, **values)
    if connection.execute(swap).rowcount != 1:
        key, found = _current(connection, campaign_id)
        raise StateError(f"campaign {key} is {found}, not {source}, so it cannot become {target}; from {found} {_possible(found)}")
    if target.is_terminal:
        # What is over is held no more.
        holds.release(connection, Scope(Kind.CAMPAIGN, campaign_id), holds.CENTRE, now)


def hold(connection: Connection, campaign_id: int, reason: str, now: dt.datetime, by_whom: str = holds.CENTRE) -> bool:
    """Stop the campaign, whatever its state, until it is released; false if it is held already (the first reason stays) or over."""
    open_states = [state.value for state in CampaignState if not state.is_terminal]
    state = connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id).with_for_update()).scalar_one_or_none()
    if state not in open_states or not holds.place(connection, Scope(Kind.CAMPAIGN, campaign_id), reason, by_whom, now):
        return False
    connection.execute(sa.update(Campaign).where(Campaign.id == campaign_id).values(updated_at=now))
    return True


def release(connection: Connection, campaign_id: int, by_whom: str, now: dt.datetime) -> bool:
    """End the campaign's own hold; false if there was none. What went wrong before now counts no more."""
    if not holds.release(connection, Scope(Kind.CAMPAIGN, campaign_id), by_whom, now):
        return False
    connection.execute(sa.update(Campaign).where(Campaign.id == campaign_id).values(updated_at=now))
    return True


def _current(connection: Connection, campaign_id: int) -> tuple[str, CampaignState]:
    row = connection.execute(sa.select(Campaign.key, Campaign.state).where(Campaign.id == campaign_id)).one_or_none()
    if row is None:
        raise StateError(f"there is no campaign with id {campaign_id}")
    return row.key, CampaignState(row.state)


def _possible(state: CampaignState) -> str:
    if state.is_terminal:
        return "nothing is possible: it is over"
    return "possible: " + ", ".join(f"{move.verb} → {move.target} (by the {move.actor})" for move in moves_from(state))
