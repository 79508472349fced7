"""As whom a server sends the mail of a From domain: return path, tracking and the key that signs. On the send path, once a session."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database import models
from mail_pipelines.domains import keys
from mail_pipelines.domains.domain import ALL_SERVERS, KeyState
from mail_pipelines.messages.dkim import Signer


@dataclass(frozen=True)
class SendingAs:
    """What mail of one From domain carries."""

    return_path_domain: str
    public_url: str
    signer: Signer


def sending_as(connection: Connection, from_domain: str, server_id: int, secret: bytes) -> SendingAs | None:
    """For a registered domain (in A-labels), with the server's own active key before the one of all servers; None for another domain.

    `secret` is the token key of this host, be it the installation's or the server's own. Raises `KeyNotOpened`.
    """
    domain, key, server = models.SendingDomain, models.DkimKey, models.Server
    query = (
        sa.select(domain.return_path_domain, domain.tracking_domain, key.selector, key.private_key, server.key.label("server"))
        .join(key, key.domain_id == domain.id)
        .outerjoin(server, server.id == key.server_id)
        .where(domain.domain == from_domain, key.state == KeyState.ACTIVE.value, key.server_id.in_((ALL_SERVERS, server_id)))
        .order_by(key.server_id.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    private = keys.unseal_own(row.private_key, secret, row.server, from_domain, row.selector)
    return SendingAs(row.return_path_domain, f"https://{row.tracking_domain}", Signer(from_domain, row.selector, private))
