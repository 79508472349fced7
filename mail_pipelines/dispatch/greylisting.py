"""Greylisted rows are offered again by the server that was greylisted: to the destination another one is a stranger, and the wait starts over.

Such a row waits for the server of its last claim, as long as that server is active or warming, until `WAIT_SECONDS` after it fell due. From then on any
server may offer it. The stored procedure `claim_rows` states the same rule, and `release_rows` that who is given back unoffered waits on.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from mail_pipelines.database.models import Delivery
from mail_pipelines.database.views import active_servers
from mail_pipelines.delivery.classes import GREYLISTED

REASON = GREYLISTED
WAIT_SECONDS = 4 * 3600
# Of no server: every row that waits for one waits for another.
NO_SERVER = 0


def waits_for_another(server_id: int | sa.ColumnElement[int], rows: Any = Delivery) -> sa.ColumnElement[bool]:
    """Whether a deferred row waits for another server than this one, if `WAIT_SECONDS` have not passed since it fell due.

    `rows` are the ledger's, or a view of them with `reason` and `server_id`.
    """
    active = sa.select(active_servers.c.id)
    return sa.and_(rows.reason.is_not(None), rows.reason == REASON, rows.server_id != server_id, rows.server_id.in_(active))
