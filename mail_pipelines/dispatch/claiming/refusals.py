"""Why a claim is refused, in one table for both databases, and what the sender is told."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass

from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch.claiming.terms import NothingClaimed, Request, WrongServer

# So often the claims of a provider that is held ask again, while their session has other work.
_HELD_AGAIN_SECONDS = 5


class Verdict(enum.StrEnum):
    """Why no row may be claimed, in the order in which it is asked. The values are those of the stored procedure."""

    UNREGISTERED = "unregistered"
    OTHER_INCARNATION = "other_incarnation"
    INACTIVE = "inactive"
    WENT_BACK = "went_back"
    OTHER_DATABASE = "other_database"
    NO_CAMPAIGN = "no_campaign"
    NOT_SENDING = "not_sending"
    HELD = "held"
    PROVIDER_HELD = "provider_held"
    WRONG_POOL = "wrong_pool"
    EXPIRED = "expired"
    NO_GRANT = "no_grant"
    NO_LIMITS = "no_limits"
    USED_UP = "used_up"
    NOTHING_DUE = "nothing_due"


@dataclass(frozen=True)
class Refusal:
    """A verdict given at `now`.

    `detail` is the state of server or campaign, or what is held and why; `cap` and `window_seconds` are the limit that is used up.
    """

    verdict: Verdict
    now: dt.datetime
    detail: str = ""
    cap: int = 0
    window_seconds: int = 0


def answer(refusal: Refusal, request: Request) -> NothingClaimed:
    """What the sender is told. Raises `WrongServer` if its process must not send at all."""
    server, provider, second = request.sender.server_key, request.provider, refusal.now.timestamp()
    match refusal.verdict:
        case Verdict.UNREGISTERED:
            raise WrongServer(f"server {server} is not registered: run `mail-pipelines server list`")
        case Verdict.OTHER_INCARNATION:
            raise WrongServer(f"server {server} is known under another incarnation: a clone, or its log folder was replaced")
        case Verdict.INACTIVE:
            return NothingClaimed(f"server {server} is {refusal.detail}", ends_session=True)
        case Verdict.WENT_BACK:
            raise WrongServer(
                f"the database went back in time: server {server} remembers a later state of it, so rows it has mailed may look unsent. "
                "It sends nothing until `mail-pipelines recover` has been run"
            )
        case Verdict.OTHER_DATABASE:
            raise WrongServer(
                f"the database that answers (server_id {refusal.detail}) is not the one the ledger was on, as after a failover: it may lack the last seconds, "
                "so rows that have been mailed may look unsent. Nothing is sent until `mail-pipelines recover` has been run"
            )
        case Verdict.NO_CAMPAIGN:
            return NothingClaimed("the campaign does not exist", ends_session=True)
        case Verdict.NOT_SENDING:
            return NothingClaimed(f"the campaign is {refusal.detail}", ends_session=True)
        case Verdict.HELD:
            return NothingClaimed(refusal.detail, ends_session=True)
        case Verdict.PROVIDER_HELD:
            return NothingClaimed(refusal.detail, retry_seconds=_HELD_AGAIN_SECONDS)
        case Verdict.WRONG_POOL:
            return NothingClaimed(f"server {server} is in none of the campaign's pools", ends_session=True)
        case Verdict.EXPIRED:
            return NothingClaimed("the campaign has expired", ends_session=True)
        case Verdict.NO_GRANT:
            next_slot = slot_at(refusal.now) + SLOT_SECONDS
            when = dt.datetime.fromtimestamp(next_slot, dt.UTC).strftime("%H:%M UTC")
            return NothingClaimed(f"no grant before {when}", retry_seconds=next_slot - second)
        case Verdict.NO_LIMITS:
            return NothingClaimed(f"no limits are set for {provider}: run `mail-pipelines server limits`")
        case Verdict.USED_UP:
            length = refusal.window_seconds
            return NothingClaimed(f"the limit of {refusal.cap} in {length} s is used up", retry_seconds=length - second % length)
        case Verdict.NOTHING_DUE:
            return NothingClaimed("nothing is due", only_here=True)
