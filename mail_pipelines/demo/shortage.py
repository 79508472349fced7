"""A deadline that two servers cannot keep, and a third one that is made while they send: the story of `script/demo --shortage`.

What belongs here: bringing the deadline into danger, telling what the platform does about it, and judging that at the end. What does not: doing it. The plan
is the asset `capacity_plan`; the sensor `capacity_shortage` orders, the job `provision_server` makes, `open_shards` lets it send, `retire_server` removes.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from rich.console import Console
from sqlalchemy.engine import Connection, Engine

from mail_pipelines import up
from mail_pipelines.campaigns import store as campaigns
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.capacity import in_force
from mail_pipelines.capacity.in_force import Kept
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, CampaignCounter, CampaignMinute, Server, State
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.demo.campaign import KEY
from mail_pipelines.demo.summary import Summary
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.jobs import plan_capacity
from mail_pipelines.provisioning import states, store
from mail_pipelines.provisioning.store import Provision
from mail_pipelines.supervision import Processes

T = TypeVar("T")
CONTACTS = 20_000
# What is otherwise a matter of hours is to be watched: servers are ordered without being asked, and go when the campaign is out; what waits is looked at soon.
SETTINGS = {
    "MAIL_PIPELINES_PROVISIONING__MODE": "auto",
    "MAIL_PIPELINES_PROVISIONING__PREFIX": "catcher-",
    "MAIL_PIPELINES_PROVISIONING__MOST": "1",
    "MAIL_PIPELINES_PROVISIONING__MINIMUM_HOURS": "0",
    "MAIL_PIPELINES_PROVISIONING__RETRY_SECONDS": "2",
    "MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS": "3",
    "MAIL_PIPELINES_SERVER__PLAY": str(Path(__file__).with_name("destinations.toml")),
}
HOSTS = """
[[source]]
name = "this-machine"
kind = "catcher"
"""
SLOW = "google"
# What is to go to the slow provider takes two servers so many seconds, but at least so many times as long as the audience took: sensors and runs, on which it
# depends when the third one sends, are as slow as this machine is.
SLOW_SECONDS, SLOW_STARTS = 90.0, 7.0
# Two servers need the time until the deadline, divided by this. From the third one the provider takes so many times as much as from each of them, so that it is
# in time although it begins late.
IN_TIME, FRESH = 0.92, 3
_SERVERS = 2
_WAIT_SECONDS = 1200.0


@dataclass
class Shortage:
    """The story as far as it has gone. Times are those of the database; `expected_` ones are the plan's, None where it had nothing to send any more."""

    engine: Engine
    settings: Settings
    processes: Processes
    console: Console
    address: str
    begun: float = field(default_factory=time.monotonic)
    why: str = ""
    server: str = ""
    finish_by: dt.datetime = field(init=False)
    expected_without: dt.datetime | None = None
    expected_with: dt.datetime | None = None

    def tell(self) -> None:
        """From the frozen audience to the first messages of the third server. Raises `MailPipelinesError` if the platform does not do its part."""
        self._wait(lambda: self._state() is CampaignState.SENDING, "the audience")
        per_second = self._slow_down()
        first = self._wait(lambda: sent if len(sent := self._sent()) >= _SERVERS else None, "the first messages")
        self._say(f"{' and '.join(sorted(first))} send the campaign")
        # Only then do they keep the pace by which they are planned.
        left = self._wait(lambda: self._waiting() if not self._waiting(others=True) else None, "the end of what goes elsewhere")
        self._set_deadline(left / (per_second * _SERVERS))
        self._say(f"all is out but {left:,} messages to {SLOW}; from now on the campaign is to be out by {self.finish_by:%H:%M:%S} (UTC)")
        plan = self._plan()
        order = next((order for order in plan.document["orders"] if order["campaign"] == KEY), None)
        if order is None:
            raise MailPipelinesError(f"the capacity plan sees no deadline that more servers would save: {plan.document}")
        self.expected_without, self.why = _finish(plan), order["why"]
        servers_wanted = f"{order['servers']} more warm server{'s' if order['servers'] > 1 else ''}"
        self._say(f"asset capacity_plan: it will be out {_at(self.expected_without)}; {servers_wanted} would save the deadline ({self.why})")
        asked = self._wait(self._provision, "an order of the sensor capacity_shortage")
        self.server = asked.key
        self._say(f"sensor capacity_shortage: {asked.key} is ordered; job provision_server makes it")
        self._follow(asked)
        self.expected_with = _finish(self._plan())
        self._say(f"asset capacity_plan: with {self.server} it will be out {_at(self.expected_with)}")
        self._wait(lambda: self.server in self._sent() or self._state() is CampaignState.FINISHED, f"messages of {self.server}")
        self._say(f"{self.server} {'takes part in the running campaign' if self.server in self._sent() else 'comes too late: all is out'}")

    def retire(self) -> None:
        """Give the third server back, as `mail-pipelines server remove` does, and wait until it is gone."""
        going = transact(self.engine, lambda connection: store.give_back(connection, self.server, "the demo is over"))
        self._say(f"{self.server} is not wanted any more; job retire_server removes it")
        self._follow(going)

    def judge(self, summary: Summary) -> Mapping[str, Any]:
        """What came of it, as plain values; the end is the last message at the catchers. Raises `MailPipelinesError` if it was not as promised."""
        messages = summary.servers.get(self.server, 0)
        finished = dt.datetime.fromtimestamp(max(message.at for message in kept(Path(self.settings.server.mail_folder))), dt.UTC)
        in_time = finished <= self.finish_by
        with reading(self.engine) as connection:
            left = _unspent(connection, self.server)
            state = servers.find(connection, self.server).state
        if not summary.is_right:
            raise MailPipelinesError(f"by the mail folders {summary.lost} messages were lost, and {summary.duplicates} came twice")
        if not messages:
            raise MailPipelinesError(f"{self.server} has sent nothing, and the last message went out at {finished:%H:%M:%S}")
        if left or state != "retired":
            raise MailPipelinesError(f"{self.server} is {state}, with {left} grants")
        times = {"finish_by": self.finish_by, "expected_without": self.expected_without, "expected_with": self.expected_with, "finished": finished}
        self._say(
            f"the last message went out at {finished:%H:%M:%S}, {'in time' if in_time else 'too late'}; {self.server} delivered {messages:,} of "
            f"{summary.delivered:,}; it was to be out {_at(self.expected_without)} without it, {_at(self.expected_with)} with it"
        )
        texts = {name: None if moment is None else moment.isoformat(timespec="seconds") for name, moment in times.items()}
        return {"server": self.server, "why": self.why, "messages": messages, **texts, "in_time": in_time}

    # --- steps ------------------------------------------------------------------------------------------------------

    def _slow_down(self) -> float:
        """Let one provider take little from each server that is there, and return how much a second: by the limits that an operator sets by `server limits`.

        Now, that it is known how much is to be sent; and before sessions begin, which keep the limits that they began with.
        """
        rows = self._waiting()
        if rows < 100:
            raise MailPipelinesError(f"there is no story in {rows} messages to {SLOW}: more --contacts make one")
        seconds = max(SLOW_SECONDS, SLOW_STARTS * (time.monotonic() - self.begun))
        per_second = round(rows / (seconds * _SERVERS), 2)
        for name, rate in ((None, per_second * FRESH), *((name, per_second) for name in self.settings.server.catchers)):
            servers.set_limits(self.engine, name, SLOW, {"connections": 5, "messages_per_connection": 50, "per_second": rate})
        self._say(f"{SLOW} takes only {per_second:g} messages a second from each server (of a new one {FRESH} times as many), and {rows:,} are to go there")
        return per_second

    def _set_deadline(self, seconds: float) -> None:
        """Want the campaign out before two servers can be done, which takes them so many seconds: as `campaign deadline` does."""

        def move(connection: Connection) -> dt.datetime:
            now = database_now(connection)
            finish_by = (now + dt.timedelta(seconds=seconds * IN_TIME)).replace(microsecond=0)
            campaigns.move_deadline(connection, KEY, finish_by, now)
            return finish_by

        self.finish_by = transact(self.engine, move)

    def _plan(self) -> Kept:
        """Materialise `capacity_plan`, as an operator does who does not wait for the schedule, and return the plan that is in force then."""
        with reading(self.engine) as connection:
            asked = database_now(connection)
        up.launch(self.address, plan_capacity.name)

        def made() -> Kept | None:
            with reading(self.engine) as connection:
                plan = in_force.read(connection)
            return plan if plan is not None and plan.made_at >= asked else None

        return self._wait(made, "the capacity plan")

    def _follow(self, provision: Provision) -> None:
        """Tell where a server is until it serves or is gone. Raises `MailPipelinesError` if it cannot be made."""
        said = ""

        def done() -> bool:
            nonlocal said
            with reading(self.engine) as connection:
                now = store.find(connection, provision.key)
            if now.standing != said:
                said = now.standing
                self._say(f"  {now.key}: {said}")
            if now.state is states.State.FAILED:
                raise MailPipelinesError(f"server {now.key} could not be made: {now.reason}")
            return now.step is states.Step.NONE

        self._wait(done, f"server {provision.key}")

    def _wait(self, ready: Callable[[], T | None], what: str) -> T:
        found = self.processes.wait_until_ready(ready, seconds=_WAIT_SECONDS, what=what)
        assert found is not None
        return found

    def _say(self, line: str) -> None:
        self.console.print(f"{time.monotonic() - self.begun:4.0f} s  {line}", markup=False, highlight=False, soft_wrap=True)

    # --- looks ------------------------------------------------------------------------------------------------------

    def _sent(self) -> Mapping[str, int]:
        """Delivered messages of the campaign by server."""
        minutes = CampaignMinute
        with reading(self.engine) as connection:
            mine = (minutes.campaign_id == campaigns.load(connection, KEY).id, minutes.state == int(State.DELIVERED))
            query = sa.select(Server.key, sa.func.sum(minutes.count)).join(Server, Server.id == minutes.server_id).where(*mine).group_by(Server.key)
            return {key: int(count) for key, count in connection.execute(query) if count > 0}

    def _waiting(self, *, others: bool = False) -> int:
        """Messages that wait to be sent to the slow provider, or to all others."""
        counters = CampaignCounter
        with reading(self.engine) as connection:
            mine = (counters.campaign_id == campaigns.load(connection, KEY).id, counters.state == int(State.PENDING))
            provider = counters.provider != SLOW if others else counters.provider == SLOW
            return int(connection.execute(sa.select(sa.func.coalesce(sa.func.sum(counters.count), 0)).where(*mine, provider)).scalar_one())

    def _state(self) -> CampaignState:
        with reading(self.engine) as connection:
            return campaigns.load(connection, KEY).state

    def _provision(self) -> Provision | None:
        with reading(self.engine) as connection:
            return next(iter(store.all_provisions(connection)), None)


def _finish(plan: Kept) -> dt.datetime | None:
    """When the campaign will be out; None if not within the horizon, or if it has nothing to send any more."""
    found = next((found for found in plan.document["campaigns"] if found["campaign"] == KEY), None)
    return None if found is None or found["finish_at"] is None else dt.datetime.fromisoformat(found["finish_at"])


def _at(moment: dt.datetime | None) -> str:
    return "at no time within 48 hours" if moment is None else f"at {moment:%H:%M:%S}"


def _unspent(connection: Connection, key: str) -> int:
    """Grants of a server, from the current slot on, that it has not used up."""
    mine = (Allotment.server_id == servers.find(connection, key).id, Allotment.slot_start >= slot_at(database_now(connection)))
    return connection.execute(sa.select(sa.func.count()).where(*mine, Allotment.granted > Allotment.used)).scalar_one()
