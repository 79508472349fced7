"""What the destinations behind a server counted: by the token of each message that arrived, and by their own log of what they refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.messages.tokens import read_delivery


@dataclass(frozen=True)
class Arrived:
    """One campaign at the destinations behind one server. `copies` by contact; `seconds` (of the epoch) in which messages arrived."""

    copies: Counter[int] = field(default_factory=Counter)
    seconds: set[int] = field(default_factory=set)
    refusals: Counter[Kind] = field(default_factory=Counter)

    def outcomes(self) -> dict[str, int]:
        return {"delivered": self.copies.total(), "bounced": self.refusals[Kind.BOUNCED], "deferred": self.refusals[Kind.DEFERRED]}


def count(folders: ServerFolders, token_key: bytes) -> dict[int, Arrived]:
    """By the campaign's id; `token_key` is that of the server."""
    found: defaultdict[int, Arrived] = defaultdict(Arrived)
    for message in kept(folders.mail):
        token = read_delivery(message.token, token_key)
        found[token.campaign_id].copies[token.contact_id] += 1
        found[token.campaign_id].seconds.add(int(message.at))
    with folders.journal.open("rb") as journal:
        for line in journal:
            entry = log.parse(line.rstrip(b"\n"))
            if entry is not None and entry.outcome is not None and entry.outcome.kind is not Kind.DELIVERED:
                found[read_delivery(entry.token, token_key).campaign_id].refusals[entry.outcome.kind] += 1
    return found
