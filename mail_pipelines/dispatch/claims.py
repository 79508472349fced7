"""Claims: leasing a few seconds' worth of ledger rows of one provider to one sender, in one short transaction.

The transaction checks everything that could make a message wrong at this moment: the campaign is sending, the server is
the one it says, the database has not gone back in time, limits and grant leave room, and the recipient still exists,
is not suppressed and has the address that was frozen. `dispatch.claiming` has its steps.
"""

from __future__ import annotations

import datetime as dt
import secrets
import time

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import is_mysql, transact
from mail_pipelines.delivery.recording import ClaimRef
from mail_pipelines.dispatch.claiming import embedded, procedure, refusals
from mail_pipelines.dispatch.claiming.refusals import Refusal
from mail_pipelines.dispatch.claiming.terms import Memory, NothingClaimed, OpenClaim, Request, Row, Sender, WrongServer
from mail_pipelines.dispatch.journal import Position

__all__ = ["Memory", "NothingClaimed", "OpenClaim", "Row", "Sender", "WrongServer", "new_id", "open_claim"]


def new_id() -> int:
    """A random 63-bit claim id: unlike a counter it is never given twice, even after a restore."""
    return secrets.randbits(63)


def open_claim(
    engine: Engine,
    sender: Sender,
    memory: Memory,
    *,
    claim_id: int,
    campaign_id: int,
    shard: int,
    provider: str,
    limit: int,
    position: Position,
    lease_seconds: float,
) -> OpenClaim | NothingClaimed:
    """Lease up to `limit` rows of a shard and provider.

    Raises `WrongServer` if this process must not send at all.
    """
    request = Request(sender, memory, claim_id, campaign_id, shard, provider, limit, position, lease_seconds)
    take = procedure.take if is_mysql(engine) else embedded.take

    def work(connection: Connection) -> OpenClaim | NothingClaimed:
        asked = time.monotonic()
        taken = take(connection, request)
        if isinstance(taken, Refusal):
            return refusals.answer(taken, request)
        ref = ClaimRef(claim_id, campaign_id, shard, provider, sender.server_id, taken.now)
        return OpenClaim(ref, taken.rows, taken.version_id, taken.now + dt.timedelta(seconds=lease_seconds), position, asked)

    return transact(engine, work)
