"""A claim means the same on SQLite, step by step in Python, and on MySQL/MariaDB, in a stored procedure: the same answer, ledger and numbers."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import (
    SENDING_STATES,
    Allotment,
    Campaign,
    CampaignCounter,
    CampaignMinute,
    Claim,
    Contact,
    ContactList,
    Delivery,
    DeliveryEvent,
    DomainHealth,
    Hold,
    LedgerGeneration,
    Pool,
    ProviderLimit,
    ProviderUsage,
    Server,
    State,
    Subscription,
    Suppression,
    WarmUp,
    WindowRows,
    WindowSpan,
)
from mail_pipelines.database.procedures import installation
from mail_pipelines.delivery import domain_health
from mail_pipelines.delivery.events import RESENT
from mail_pipelines.delivery.recording import SLOT_SECONDS, USAGE_WINDOWS, slot_at, windows_at
from mail_pipelines.dispatch import claims, greylisting, windows
from mail_pipelines.dispatch.claiming import best_ranks, hindrances, procedure
from mail_pipelines.dispatch.claiming.refusals import Verdict
from mail_pipelines.dispatch.claims import Memory, NothingClaimed, Sender, WrongServer
from mail_pipelines.dispatch.journal import Position

PROVIDERS = ("google", "yahoo")
SCOPES = (("all", 0), ("brand", 1), ("brand", 2), ("list", 1), ("list", 2))
KNOWN_CLAIM = 77
BEAT = dt.datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=dt.UTC)
# Numbers of the servers that greylisted rows wait for; all but the last are registered.
SERVERS = {"ours": 1, "active": 2, "retired": 3, "paused": 4, "removed": 5}
FILLED = (
    Allotment,
    CampaignCounter,
    CampaignMinute,
    Claim,
    Delivery,
    DeliveryEvent,
    DomainHealth,
    Hold,
    Contact,
    ProviderLimit,
    ProviderUsage,
    Subscription,
    Suppression,
    WarmUp,
    WindowRows,
    WindowSpan,
    Campaign,
    ContactList,
    Server,
    Pool,
)


# When the window of a campaign is open in a time zone, in seconds from now. Claims are for two minutes.
ZONES = {"open": ((-600, 7200),), "closed": ((-5000, -100), (3600, 7200)), "closing": ((-600, 60), (90_000, 95_000)), "over": ((-5000, -100),), "never": ()}


# --- situations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipient:
    """One row of the ledger and its contact. `due`: tens of seconds from now, of a deferred row; `not_before`: seconds, of a pending one."""

    provider: str
    state: State
    attempt: int
    due: int
    not_before: int | None
    resent: bool
    # Of the list that the campaign's unsubscribe link ends: None was never on it.
    subscribed: bool | None
    suppressed: tuple[str, int] | None
    suppressed_domain: tuple[str, int] | None
    # stays, erased, moved (to a provider), taken (moved to an address that has a row of its own)
    fate: str
    new_provider: str
    # Of a domain that does not answer: due (to be tried again) or dead
    silent: str | None
    # Of a deferred row: the server that was greylisted
    greylisted: str | None
    # Its time zone, one of `ZONES` or one that nobody knows; and of a deferred row, that it waited for its window
    zone: str | None = None
    put_off: bool = False


@dataclass(frozen=True)
class Situation:
    """Everything a claim looks at. `limits`: (server, provider) to (per hour, per day); `used`: messages in every window of a provider."""

    recipients: tuple[Recipient, ...]
    campaign: dict[str, Any] | None
    grants: dict[str, tuple[int, int]]
    limits: dict[tuple[int, str], tuple[int | None, int | None]]
    used: dict[str, int]
    # (provider, limit) of one claim after the other
    asked: tuple[tuple[str, int], ...]
    server_state: str | None = "active"
    incarnation: str | None = "i"
    generation_known: bool = True
    newest_claim: int | None = None
    # Of the server: in the database, and as it remembers it.
    heartbeat: dt.datetime | None = BEAT
    last_beat: dt.datetime | None = None
    # Messages a day that the warm-up allows: (server, provider) to a cap. Servers 1 and 6; the latter is warming.
    warm_ups: dict[tuple[int, str], int | None] = field(default_factory=dict)
    # Of server 6: what is granted, to google; how long ago it spoke (s); and what it has used in every window.
    other_grant: tuple[int, int] | None = None
    spoke: float = 5.0
    other_used: int = 0
    same_place: bool = False
    # The campaign has a send window, and this is its own zone.
    windowed: str | None = None
    holds: tuple[tuple[str, int, str, str], ...] = ()
    released: tuple[tuple[str, int, str, str], ...] = ()


def rarely(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The usual value nine times out of ten. (A plain choice would hinder most rows, in several ways at once.)"""
    return st.integers(0, 99).flatmap(lambda number: st.sampled_from(others) if number % 10 == 7 else st.just(usual))


RECIPIENTS = st.builds(
    Recipient,
    provider=rarely("google", "yahoo"),
    state=st.sampled_from([State.PENDING, State.DEFERRED, State.PENDING, State.DEFERRED, State.PENDING, State.CLAIMED, State.DELIVERED]),
    attempt=st.integers(0, 2),
    # Shortly before and after the four hours for which a greylisted row waits for its server.
    due=st.sampled_from([-3600, -1500, -1400, -1, 3600]),
    not_before=rarely(None, -60, 3600),
    resent=st.booleans(),
    subscribed=rarely(None, False, True),
    suppressed=rarely(None, *SCOPES),
    suppressed_domain=rarely(None, *SCOPES),
    fate=st.sampled_from(["stays"] * 6 + ["erased", "moved", "taken"]),
    new_provider=st.sampled_from(PROVIDERS),
    silent=st.sampled_from([None] * 6 + ["due", "due", "dead"]),
    greylisted=st.sampled_from([None, None, None, None, *SERVERS]),
    zone=st.sampled_from([None, "unknown", *ZONES]),
    put_off=st.booleans(),
)
GRANTS = st.sampled_from([(1000, 0), (2, 0), (5, 4), (5, 5), (3, 9)])
CAPS = st.tuples(st.sampled_from([None, 4, 1, 0]), st.sampled_from([None, 50, 3, 0]))
# The server is in pool 2.
SENDING = {"state": "sending", "pool_id": 1, "overflow_pool_id": 2, "expire_at": None, "unsubscribe": "all", "version_id": 1}
WINDOWED = SENDING | {"expire_at": dt.timedelta(days=2), "send_window": {"from": "09:00", "until": "18:00", "zone": "UTC"}}


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Campaign and server are in order, so that everything depends on rows, grants and limits."""
    wide = draw(st.booleans())
    other_limits = st.dictionaries(st.sampled_from([(0, "google"), (1, "*"), (1, "google")]), CAPS)
    windowed = draw(st.sampled_from([None, "open", "closed", "never"]))
    return Situation(
        recipients=tuple(draw(st.lists(RECIPIENTS, min_size=3, max_size=9))),
        windowed=windowed,
        campaign=(WINDOWED if windowed else SENDING)
        | {"unsubscribe": draw(st.sampled_from(["all", "brand", "list"])), "version_id": draw(st.sampled_from([1, 7]))},
        grants={provider: (1000, 0) if wide else draw(GRANTS) for provider in PROVIDERS},
        limits={(0, "*"): (None, None)} if wide else {(0, "*"): draw(CAPS)} | draw(other_limits),
        used=draw(st.dictionaries(st.sampled_from(PROVIDERS), st.integers(1, 2))),
        warm_ups=draw(st.dictionaries(st.sampled_from([(1, "google"), (1, "*"), (6, "*"), (6, "google")]), st.sampled_from([None, 1, 3, 5, 50]), max_size=3)),
        other_grant=draw(st.sampled_from([None, (2, 0), (4, 1), (1000, 1), (3, 3)])),
        other_used=draw(st.sampled_from([0, 1])),
        asked=tuple(draw(st.lists(st.tuples(rarely("google", "yahoo"), st.sampled_from([100, 1, 3])), min_size=1, max_size=3))),
    )


def recipient(**values: Any) -> Recipient:
    usual = {"provider": "google", "state": State.PENDING, "attempt": 0, "due": 0, "not_before": None, "resent": False, "subscribed": None}
    return Recipient(
        **usual
        | {
            "suppressed": None,
            "suppressed_domain": None,
            "fate": "stays",
            "new_provider": "google",
            "silent": None,
            "greylisted": None,
            "zone": None,
            "put_off": False,
        }
        | values
    )


# Scope and reason of a hold: over what is asked for, and over something else of the same kind.
HOLDS = (
    ("everything", 0, "", "zu viele Rückläufer"),
    *(("campaign", number, "", "too many bounces") for number in (1, 2)),
    *(("brand", number, "", "audit") for number in (1, 2)),
    *(("pool", number, "", "moving") for number in (1, 2, 3)),
    *(("server", number, "", "new disk") for number in (1, 2)),
    *(("provider", 0, provider, "blocked") for provider in ("google", "microsoft")),
    ("brand", 1, "", "ü" * 500),
)
# Server 6 is warming, and its cap lets it send the best three of twenty.
OTHERS: dict[str, dict[str, Any]] = {
    "granted": {},
    "granted less": {"other_grant": (7, 5)},
    "granted nothing more": {"other_grant": (7, 7)},
    "granted nothing": {"other_grant": None},
    "granted more than half": {"warm_ups": {(6, "*"): 1000}},
    "its cap is the provider's": {"warm_ups": {(6, "*"): 1000, (6, "google"): 2}},
    "its cap is spent": {"other_used": 3},
    "it is warm to the provider": {"warm_ups": {(6, "*"): 3, (6, "google"): None}},
    "it has no warm-up": {"warm_ups": {}},
    "it is silent": {"spoke": 125.0},
    "it speaks": {"spoke": 90.0},
    "both are warming": {"warm_ups": {(6, "*"): 3, (1, "*"): 30}},
    "all at one place": {"same_place": True},
}
# One of each kind.
PLAIN = Situation(
    recipients=(
        recipient(),
        recipient(state=State.DEFERRED, attempt=1, due=-60),
        recipient(fate="erased"),
        recipient(fate="erased", resent=True),
        recipient(fate="moved", new_provider="yahoo"),
        recipient(fate="taken", state=State.DEFERRED, attempt=2, due=-30),
        recipient(subscribed=False),
        recipient(subscribed=True),
        recipient(suppressed=("brand", 1)),
        recipient(suppressed_domain=("all", 0), resent=True),
        recipient(not_before=-60),
        recipient(not_before=3600),
        recipient(not_before=3600, state=State.DEFERRED, attempt=1, due=-20),
        recipient(state=State.DEFERRED, attempt=1, due=3600),
        recipient(silent="due"),
        recipient(silent="due", state=State.DEFERRED, attempt=1, due=-10),
        recipient(silent="due"),
        recipient(silent="due", suppressed=("brand", 1), state=State.DEFERRED, attempt=1, due=-3600),
        recipient(silent="due", subscribed=False),
        recipient(silent="dead"),
        recipient(silent="dead", state=State.DEFERRED, attempt=2, due=-40),
        recipient(silent="dead", fate="moved", new_provider="yahoo"),
        recipient(),
        *(recipient(state=State.DEFERRED, attempt=1, due=due, greylisted=name) for name in SERVERS for due in (-1500, -1400, -50, 3600)),
        recipient(state=State.DEFERRED, attempt=1, due=-70, greylisted="ours", fate="moved", new_provider="yahoo"),
        recipient(state=State.DEFERRED, attempt=1, due=-70, greylisted="active", suppressed=("brand", 1)),
    ),
    campaign=SENDING,
    grants=dict.fromkeys(PROVIDERS, (1000, 0)),
    limits={(0, "*"): (None, None)},
    used={},
    asked=(("google", 7), ("google", 100), ("yahoo", 100), ("google", 1)),
)
LEFT = replace(
    PLAIN,
    recipients=(*(recipient() for _ in range(20)), recipient(state=State.DEFERRED, attempt=1, due=-60)),
    warm_ups={(6, "*"): 3},
    other_grant=(1000, 0),
    asked=(("google", 4), ("google", 100)),
)
WINDOWS = replace(
    PLAIN,
    windowed="open",
    campaign=WINDOWED,
    recipients=(
        *(recipient(zone=zone, **values) for zone in (None, "unknown", *ZONES) for values in (
            {}, {"state": State.DEFERRED, "due": -60, "put_off": True}, {"state": State.DEFERRED, "attempt": 1, "due": -50},
            {"fate": "moved", "new_provider": "yahoo"}, {"suppressed": ("brand", 1)}, {"silent": "due"}, {"silent": "dead"}, {"resent": True},
        )),
        recipient(zone="closed", fate="erased"),
        recipient(zone="closed", state=State.DEFERRED, attempt=1, due=-50, greylisted="ours"),
    ),
    asked=(("google", 20), ("google", 100), ("google", 100), ("yahoo", 100)),
)  # fmt: skip
ODD = {
    "nothing odd": PLAIN,
    "with a send window": WINDOWS,
    **{f"with a send window whose own zone is {zone}": replace(WINDOWS, windowed=zone) for zone in ("closed", "closing", "never")},
    "with a send window, of a list": replace(WINDOWS, campaign=WINDOWED | {"unsubscribe": "list"}),
    "list unsubscribed": replace(PLAIN, campaign=SENDING | {"unsubscribe": "list"}),
    "of another brand": replace(PLAIN, campaign=SENDING | {"unsubscribe": "brand", "version_id": 9}),
    **{f"campaign {state}": replace(PLAIN, campaign=SENDING | {"state": state}) for state in ("paused", "cancelled", "draft", "finished")},
    **{f"held {words[0]} {words[1:-1]}": replace(PLAIN, holds=(words,)) for words in HOLDS},
    "held and released": replace(PLAIN, released=(("everything", 0, "", "look"), ("campaign", 1, "", "look"))),
    "held twice": replace(PLAIN, holds=(("provider", 0, "google", "blocked"), ("server", 1, "", "new disk"), ("brand", 1, "", "audit"))),
    "held in a state that sends nothing": replace(PLAIN, campaign=SENDING | {"state": "paused"}, holds=(("everything", 0, "", "look"),)),
    "held and expired": replace(PLAIN, campaign=SENDING | {"expire_at": dt.timedelta(hours=-1)}, holds=(("everything", 0, "", "look"),)),
    **{f"expires in {hours} h": replace(PLAIN, campaign=SENDING | {"expire_at": dt.timedelta(hours=hours)}) for hours in (-1, 1)},
    "its own pool": replace(PLAIN, campaign=SENDING | {"pool_id": 2, "overflow_pool_id": None}),
    "its own pool, with another for overflow": replace(PLAIN, campaign=SENDING | {"pool_id": 2, "overflow_pool_id": 3}),
    "another pool": replace(PLAIN, campaign=SENDING | {"pool_id": 3, "overflow_pool_id": None}),
    "two other pools": replace(PLAIN, campaign=SENDING | {"pool_id": 1, "overflow_pool_id": 3}),
    "another pool, held": replace(PLAIN, campaign=SENDING | {"pool_id": 3, "overflow_pool_id": None}, holds=(("pool", 3, "", "look"),)),
    "another pool, expired": replace(PLAIN, campaign=SENDING | {"pool_id": 3, "overflow_pool_id": None, "expire_at": dt.timedelta(hours=-1)}),
    "no campaign": replace(PLAIN, campaign=None),
    "no server": replace(PLAIN, server_state=None),
    **{f"server {state}": replace(PLAIN, server_state=state) for state in ("paused", "lost")},
    "a clone": replace(PLAIN, incarnation="other"),
    "never seen": replace(PLAIN, incarnation=None),
    "another generation": replace(PLAIN, generation_known=False),
    "a claim the database knows": replace(PLAIN, newest_claim=KNOWN_CLAIM),
    "a claim the database forgot": replace(PLAIN, newest_claim=KNOWN_CLAIM + 1),
    "the heartbeat the database knows": replace(PLAIN, last_beat=BEAT),
    "a heartbeat the database forgot": replace(PLAIN, last_beat=BEAT + dt.timedelta(microseconds=1)),
    "a heartbeat, and the database knows none": replace(PLAIN, heartbeat=None, last_beat=BEAT),
    "no grant": replace(PLAIN, grants={}),
    "a grant spent": replace(PLAIN, grants={"google": (5, 5)}),
    "a grant lowered": replace(PLAIN, grants={"google": (5, 6)}),
    "no limits": replace(PLAIN, limits={}),
    "limits of another provider": replace(PLAIN, limits={(0, "yahoo"): (None, None)}),
    "an hour used up": replace(PLAIN, limits={(0, "*"): (3, 100)}, used={"google": 2}),
    "a day used up": replace(PLAIN, limits={(0, "*"): (None, 2)}),
    "server warming": replace(PLAIN, server_state="warming", warm_ups={(1, "*"): 480}),
    "a warm-up's day used up": replace(PLAIN, warm_ups={(1, "*"): 2, (1, "google"): 9}),
    "a warm-up's day used up before": replace(PLAIN, warm_ups={(1, "*"): 2}, used={"google": 2}),
    "warm to one provider": replace(PLAIN, warm_ups={(1, "*"): 2, (1, "google"): None}),
    "a limit below the warm-up's": replace(PLAIN, warm_ups={(1, "*"): 4}, limits={(0, "*"): (None, 3)}),
    "a limit above the warm-up's": replace(PLAIN, warm_ups={(1, "*"): 4}, limits={(0, "*"): (None, 5)}),
    "an hour below the warm-up's": replace(PLAIN, warm_ups={(1, "*"): 4}, limits={(0, "*"): (3, 5)}),
    **{f"the best are for another: {name}": replace(LEFT, **values) for name, values in OTHERS.items()},
}


def fill(engine: sa.Engine, situation: Situation, now: dt.datetime) -> None:
    """Make the situation, with nothing of the one before."""
    second, slot = int(now.timestamp()), slot_at(now)
    rows: defaultdict[type, list[dict[str, Any]]] = defaultdict(list)
    rows[ContactList] = [{"id": number, "key": f"l{number}", "name": "List", "brand_id": 1, "created_at": now} for number in (1, 2)]
    if campaign := situation.campaign:
        rows[Campaign] = [
            campaign
            | {
                "id": 1,
                "key": "spring",
                "name": "Spring",
                "brand_id": 1,
                "segments": {},
                "unsubscribe_list_id": 1 if campaign["unsubscribe"] == "list" else None,
                "expire_at": None if campaign["expire_at"] is None else now + campaign["expire_at"],
                "on_unknown": "hold",
                "priority": 1,
                "created_at": now,
                "updated_at": now,
            }
        ]
    if situation.server_state:
        rows[Server] = [
            {
                "id": 1,
                "key": "s1",
                "kind": "catcher",
                "state": situation.server_state,
                "pool_id": 2,
                "host": "h",
                "port": 1,
                "incarnation": situation.incarnation,
                "heartbeat_at": situation.heartbeat,
                "created_at": now,
            }
        ]
    others = {"kind": "catcher", "pool_id": 1, "host": "h", "port": 1, "incarnation": None, "heartbeat_at": None, "created_at": now}
    rows[Server] += [others | {"id": SERVERS[state], "key": state, "state": state} for state in ("active", "retired", "paused")]
    rows[Server].append(others | {"id": 6, "key": "warming", "state": "warming", "heartbeat_at": now - dt.timedelta(seconds=situation.spoke)})
    rows[WarmUp] = [
        {"server_id": server, "provider": provider, "curve": "careful", "step": 0, "per_day": cap, "judged": 0, "last_used": None, "reason": ""}
        for (server, provider), cap in situation.warm_ups.items()
    ]
    rows[Pool] = [{"id": number, "key": f"p{number}"} for number in (2, 3)]
    rows[Hold] = [
        {"scope_kind": kind, "scope_id": number, "provider": provider, "reason": reason, "by_whom": "t", "created_at": now, "released_at": end}
        for end, scopes in ((None, situation.holds), (now, situation.released))
        for kind, number, provider, reason in scopes
    ]
    rows[Allotment] = [
        {"campaign_id": 1, "server_id": 1, "provider": provider, "slot_start": slot, "granted": granted, "used": used}
        for provider, (granted, used) in situation.grants.items()
    ]
    if situation.other_grant:
        granted, used = situation.other_grant
        rows[Allotment].append({"campaign_id": 1, "server_id": 6, "provider": "google", "slot_start": slot, "granted": granted, "used": used})
    rows[ProviderLimit] = [
        {
            "server_id": server,
            "provider": provider,
            "mode": "cutthrough",
            "connections": 1,
            "per_second": 1.0,
            "per_hour": per_hour,
            "per_day": per_day,
            "messages_per_connection": 1,
        }
        for (server, provider), (per_hour, per_day) in situation.limits.items()
    ]
    rows[ProviderUsage] = [
        {"server_id": 1, "provider": provider, "window_seconds": length, "window_start": start, "used": used}
        for provider, used in situation.used.items()
        for length, start in windows_at(now)
    ]
    if situation.other_used:
        other = {"server_id": 6, "provider": "google", "used": situation.other_used}
        rows[ProviderUsage] += [other | {"window_seconds": length, "window_start": start} for length, start in windows_at(now)]
    rows[Claim] = [
        {
            "id": KNOWN_CLAIM,
            "campaign_id": 1,
            "shard": 0,
            "provider": "google",
            "server_id": 1,
            "run_id": "r",
            "size": 1,
            "state": "closed",
            "incarnation": "i",
            "boot_id": "b",
            "journal_inode": 1,
            "journal_offset": 0,
            "opened_at": now,
            "lease_until": now,
        }
    ]
    health = {"due": now - dt.timedelta(seconds=5), "dead": now + dt.timedelta(hours=1)}
    rows[DomainHealth] = [{"domain": f"{name}.test", "failures": 2, "dead_until": until, "changed_at": now} for name, until in health.items()]
    for number, recipient in enumerate(situation.recipients, 1):
        _add_recipient(rows, number, recipient, now, second)
    if situation.windowed and (campaign := situation.campaign):
        end = int((now + campaign["expire_at"]).timestamp()) + 1
        spans = [(name, second + opens, second + closes) for name in ZONES for opens, closes in ZONES[name]] + [(name, end, end) for name in ZONES]
        spans += [("", opens, closes) for name, opens, closes in spans if name == situation.windowed]
        rows[WindowSpan] = [{"campaign_id": 1, "time_zone": name, "opens_at": opens, "closes_at": closes} for name, opens, closes in spans]
    for row in rows[Delivery] if situation.same_place else ():
        row["sort_key"] = 7
    counts = Counter((row["provider"], row["state"]) for row in rows[Delivery])
    rows[CampaignCounter] = [
        {"campaign_id": 1, "shard": 0, "provider": provider, "server_id": 0, "state": state, "count": count} for (provider, state), count in counts.items()
    ]

    def work(connection: sa.Connection) -> None:
        for model in FILLED:
            connection.execute(sa.delete(model).where(model.id != 1) if model is Pool else sa.delete(model))
        for model in reversed(FILLED):
            if rows[model]:
                connection.execute(sa.insert(model), rows[model])

    transact(engine, work)


def _add_recipient(rows: dict[type, list[dict[str, Any]]], number: int, recipient: Recipient, now: dt.datetime, second: int) -> None:
    frozen = parse(f"person{number}@{recipient.provider}.test")
    # Each contact has a domain of its own, so that suppressing it concerns nobody else; those whose domain is silent share it.
    new = frozen if recipient.fate == "stays" else parse(f"new{number}@{recipient.new_provider}.test")
    domain = f"{recipient.silent}.test" if recipient.silent and not recipient.suppressed_domain else f"d{number}.test"
    ledger = {
        "campaign_id": 1,
        "contact_id": number,
        "address_hash": frozen.hash,
        "shard": 0,
        "provider": recipient.provider,
        "state": int(recipient.state),
        "sort_key": second + recipient.due * 10 + number if recipient.state is State.DEFERRED else 100 - number,
        "attempt": recipient.attempt,
        "not_before": None if recipient.not_before is None else second + recipient.not_before,
        "claim_id": 5 if recipient.state is State.CLAIMED else None,
        "server_id": 3 if recipient.attempt else None,
        "version_id": 4 if recipient.attempt else None,
        "variant": 0,
        "code": None,
        "reason": None,
    }
    if recipient.greylisted and recipient.state is State.DEFERRED:
        ledger |= {"server_id": SERVERS[recipient.greylisted], "code": 451, "reason": greylisting.REASON}
    elif recipient.put_off and recipient.state is State.DEFERRED:
        ledger |= {"reason": windows.WAITS}
    if recipient.zone and recipient.state is State.PENDING:
        # Of all ranks, some of them beyond those that are told apart.
        ledger["sort_key"] += number * 17 % 120 * 65_536
    rows[Delivery].append(ledger)
    if recipient.fate == "taken":
        # Somebody else was frozen under the address that is now this contact's.
        rows[Delivery].append(ledger | {"contact_id": 100 + number, "address_hash": new.hash, "state": int(State.DELIVERED), "claim_id": None})
    if recipient.fate != "erased":
        rows[Contact].append(
            {
                "id": number,
                "email": new.email,
                "address": new.address,
                "address_hash": new.hash,
                "domain": domain,
                "provider": recipient.provider if recipient.fate == "stays" else recipient.new_provider,
                "time_zone": recipient.zone,
                "attributes": {"first_name": f"Jörg {number}", "orders": number, "vip": True, "since": None},
                "tracking_allowed": True,
                "created_at": now,
                "updated_at": now,
            }
        )
    if recipient.subscribed is not None:
        rows[Subscription].append({"contact_id": number, "list_id": 1, "subscribed": recipient.subscribed, "source": "unsubscribe", "changed_at": now})
    for scope, target in (
        (recipient.suppressed, {"address_hash": new.hash, "domain": None}),
        (recipient.suppressed_domain, {"address_hash": None, "domain": domain}),
    ):
        if scope is not None:
            rows[Suppression].append(target | {"scope_kind": scope[0], "scope_id": scope[1], "reason": "manual", "created_at": now})
    if recipient.resent:
        rows[DeliveryEvent].append(
            {
                "month": now.year * 100 + now.month,
                "id": number,
                "occurred_at": now,
                "campaign_id": 1,
                "contact_id": number,
                "attempt": recipient.attempt,
                "kind": RESENT,
            }
        )


# --- outcomes -----------------------------------------------------------------------------------------------------


def ask(engine: sa.Engine, situation: Situation) -> list[Any]:
    """What each claim of the situation answers, without times."""
    with reading(engine) as connection:
        generation = connection.execute(sa.select(LedgerGeneration.generation)).scalar_one() if situation.generation_known else "another"
    answers: list[Any] = []
    for number, (provider, limit) in enumerate(situation.asked):
        # A new connection begins at the first row, as SQLite always does.
        engine.dispose()
        try:
            answer = claims.open_claim(
                engine,
                Sender(1, "s1", "i", "boot", "run"),
                Memory(generation, situation.newest_claim, situation.last_beat),
                claim_id=1000 + number,
                campaign_id=1,
                shard=0,
                provider=provider,
                limit=limit,
                position=Position(5, 6),
                lease_seconds=120.5,
            )
        except WrongServer as error:
            answers.append(str(error))
            continue
        if isinstance(answer, NothingClaimed):
            answers.append((re.sub(r"\d\d:\d\d", "TIME", answer.reason), answer.retry_seconds is not None, answer.ends_session))
        else:
            assert answer.lease_until - answer.ref.opened_at == dt.timedelta(seconds=120.5)
            answers.append((answer.rows, answer.version_id, answer.position))
    return answers


def tables(engine: sa.Engine, now: dt.datetime) -> dict[str, Any]:
    """All that claims have written. Times are left out, and numbers that are nothing."""
    started = int(now.timestamp())

    def sums(model: type, *keys: str, number: str) -> dict[tuple[Any, ...], int]:
        columns = [getattr(model, key) for key in keys]
        query = sa.select(*columns, sa.func.sum(getattr(model, number))).group_by(*columns)
        return {tuple(key): int(total) for *key, total in connection.execute(query) if total}

    with reading(engine) as connection:
        deliveries = []
        for row in connection.execute(sa.select(*Delivery.__table__.columns).order_by(Delivery.contact_id)).mappings():
            values = dict(row)
            if State(values["state"]) in (State.SUPPRESSED, State.UNRESOLVED):
                assert 0 <= values.pop("sort_key") - started < 60
            if values["reason"] == domain_health.NO_CONNECTION and values["sort_key"] < started + 600:
                # It waits for the answer to another row.
                assert 60 <= values.pop("sort_key") - started < 60 + 60 + hindrances.SPREAD_SECONDS
            deliveries.append(values)
        opened = connection.execute(
            sa.select(Claim.id, Claim.provider, Claim.size, Claim.state, Claim.server_id, Claim.run_id, Claim.incarnation, Claim.boot_id, Claim.journal_inode,
                      Claim.journal_offset, Claim.closed_at == Claim.opened_at).order_by(Claim.id)
        ).all()  # fmt: skip
        return {
            "deliveries": deliveries,
            "claims": [tuple(row) for row in opened],
            "counters": sums(CampaignCounter, "provider", "server_id", "state", number="count"),
            "minutes": sums(CampaignMinute, "provider", "server_id", "state", "reason", number="count"),
            "usage": sums(ProviderUsage, "server_id", "provider", "window_seconds", number="used"),
            "asked": [tuple(row) for row in connection.execute(sa.select(DomainHealth.domain, DomainHealth.dead_until > now).order_by(DomainHealth.domain))],
            "allotments": sums(Allotment, "server_id", "provider", number="used"),
            "waiting": sums(WindowRows, "provider", "time_zone", "opens_at", number="count"),
        }


def compare(both_engines: tuple[sa.Engine, sa.Engine], situation: Situation) -> None:
    """Run the situation's claims on both databases."""
    outcomes: list[Any] = []
    while not outcomes:
        now = dt.datetime.now(dt.UTC)
        for engine in both_engines:
            fill(engine, situation, now)
            outcomes.append((ask(engine, situation), tables(engine, now)))
        if slot_at(dt.datetime.now(dt.UTC)) != slot_at(now):
            # A new slot began meanwhile, in which nothing is granted.
            outcomes.clear()
    (answers, written), (other_answers, other_written) = outcomes
    assert other_answers == answers
    assert other_written == written
    # Neither invents nor loses a row.
    states = Counter((row["provider"], row["state"]) for row in written["deliveries"])
    counted: Counter[tuple[str, int]] = Counter()
    for (provider, _, state), count in written["counters"].items():
        counted[provider, state] += count
    assert {key: count for key, count in counted.items() if count} == dict(states)


@pytest.mark.server
@pytest.mark.parametrize("name", ODD)
def test_both_databases_agree_on_every_refusal_and_hindrance(both_engines: tuple[sa.Engine, sa.Engine], name: str) -> None:
    compare(both_engines, ODD[name])


@pytest.mark.server
@given(situation=situations())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_both_databases_claim_the_same_rows(both_engines: tuple[sa.Engine, sa.Engine], situation: Situation) -> None:
    compare(both_engines, situation)


# --- the words of the procedure -----------------------------------------------------------------------------------


def test_the_procedure_uses_the_numbers_and_words_of_the_program() -> None:
    text = installation.text(procedure.NAME)
    numbers = {name: int(value) for name, value in re.findall(r"DECLARE c_(\w+) \w+ DEFAULT (\d+)", text)}
    states = {name: value for name, value in numbers.items() if name.upper() in State.__members__}
    assert states == {state.name.lower(): state for state in (State.PENDING, State.CLAIMED, State.DEFERRED, State.SUPPRESSED, State.UNRESOLVED)}
    assert numbers["slot"] == SLOT_SECONDS
    assert (numbers["slot"], numbers["hour"], numbers["day"]) == USAGE_WINDOWS
    assert numbers["answer_wait"] == domain_health.rules().first_wait.total_seconds()
    assert re.findall(r"v_refusal = '(\w+)'", text) == list(Verdict)
    assert numbers["greylist_wait"] == greylisting.WAIT_SECONDS
    assert numbers["spread"] == hindrances.SPREAD_SECONDS
    assert re.findall(r"e\.kind = '(\w+)'", text) == [RESENT]
    assert (numbers["places_a_rank"], numbers["window_spread"]) == (windows._PLACES_A_RANK, windows.SPREAD_SECONDS)
    assert {f"'{reason}'" in text for reason in (windows.WAITS, windows.NEVER, hindrances.CLOSED)} == {True}
    assert {f"'{reason}'" in text for reason in (hindrances.MOVED, hindrances.DEAD, domain_health.NO_CONNECTION, "duplicate_address")} == {True}
    assert re.findall(r"reason <> '(\w+)'", text) == [greylisting.REASON] * 2
    assert (numbers["speaks"], numbers["most_left"]) == (best_ranks.SPEAKS_SECONDS, best_ranks.MOST_LEFT)
    assert set(re.findall(r"IN \('active', 'warming'\)", text)) == {f"IN {SENDING_STATES}"}
    assert set(re.findall(r"reason (?:=|<=>) '(\w+)'", installation.text("release_rows"))) == {greylisting.REASON}
    # States are never written as bare numbers.
    assert re.findall(r"state\s*(?:=|<>|IN)\s*\(?\d", text) == []
