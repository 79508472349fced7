"""The claim on MySQL/MariaDB: one call of the stored procedure `claim_rows` (`database/procedures/claim_rows.sql`), which says what it does.

Its definer reads contacts, suppressions and limits; the account of a dispatch server needs none of these rights.
"""

from __future__ import annotations

import datetime as dt
import json

from sqlalchemy.engine import Connection

from mail_pipelines.database.procedures.calling import call
from mail_pipelines.dispatch.claiming.refusals import Refusal, Verdict
from mail_pipelines.dispatch.claiming.terms import Request, Row, Taken

NAME = "claim_rows"


def take(connection: Connection, request: Request) -> Taken | Refusal:
    """Take rows and write the claim, or say why not."""
    sender, memory = request.sender, request.memory
    arguments = (
        request.claim_id,
        request.campaign_id,
        request.shard,
        request.provider,
        request.limit,
        sender.server_id,
        sender.incarnation,
        sender.boot_id,
        sender.run_id,
        memory.generation,
        memory.newest_claim,
        memory.last_beat and memory.last_beat.replace(tzinfo=None),
        request.position.inode,
        request.position.offset,
        round(request.lease_seconds * 1_000_000),
    )
    [[verdict], *found] = call(connection, NAME, arguments)
    refusal, now, detail, cap, window_seconds, version_id = verdict
    now = now.replace(tzinfo=dt.UTC)
    if refusal is not None:
        return Refusal(Verdict(refusal), now, detail or "", cap or 0, window_seconds or 0)
    [rows] = found
    return Taken(
        now,
        version_id,
        tuple(Row(contact_id, attempt, email, json.loads(attributes), bool(asks)) for contact_id, attempt, email, attributes, asks in rows),
    )
