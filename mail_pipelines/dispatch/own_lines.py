"""Whose lines are whose in a log that several servers of a host share, since they share its Exim.

The first line about a claim (MARK) names its server, where there are several; where there was one it names none, and is of the server whose log it is. Later
lines name the claim, or else a message that an earlier one has named.
A claim's own evidence needs none of this (`journal.Evidence` knows the claim); whoever reads a log from one end to the other does.
"""

from __future__ import annotations

from collections.abc import Iterable

from mail_pipelines.dispatch.journal import Entry, Kind

# More than the servers of a host have claims open at once, and messages at destinations and in queues. What is forgotten counts as one's own.
_CLAIMS_KEPT = 1_000
_MESSAGES_KEPT = 5_000
_LAST_WORDS = (Kind.DELIVERED, Kind.BOUNCED)


class OwnLines:
    """Tells entries about offers of `server`'s own from those of other servers, in the order of the log.

    `claims` and `messages` (tokens, and Exim's names of queued messages) are the others', as an earlier reading has left them. `shares` says that the log
    is another server's, to which this one's lines have come.
    """

    def __init__(self, server: str, claims: Iterable[str] = (), messages: Iterable[str] = (), *, shares: bool = False) -> None:
        self._server = server
        self._shares = shares
        # As ordered sets: the oldest are forgotten first.
        self._claims = dict.fromkeys(claims)
        self._messages = dict.fromkeys(messages)

    @property
    def claims(self) -> tuple[str, ...]:
        return tuple(self._claims)

    @property
    def messages(self) -> tuple[str, ...]:
        return tuple(self._messages)

    def has(self, entry: Entry) -> bool:
        """Whether an entry is the server's own. What names neither a claim nor a message is everybody's."""
        if entry.mark is None and not self._claims and not self._messages:
            return True
        names = [name for name in (entry.token, entry.message) if name]
        if entry.mark is not None:
            own = entry.server == self._server if entry.server else not self._shares
            if not own:
                _keep(self._claims, [_claim(entry.mark)], _CLAIMS_KEPT)
            return own
        if not entry.permit:
            own = not any(name in self._messages for name in names)
        else:
            own = _claim(entry.permit) not in self._claims
        # An outcome that names its claim is of a message that has been forgotten already, or never was offered.
        if own or (entry.outcome is not None and (entry.permit or entry.outcome.kind in _LAST_WORDS)):
            for name in names:
                self._messages.pop(name, None)
        else:
            _keep(self._messages, names, _MESSAGES_KEPT)
        return own


def _claim(permit: str) -> str:
    return permit.partition(".")[0]


def _keep(known: dict[str, None], names: Iterable[str], most: int) -> None:
    for name in names:
        known.pop(name, None)
        known[name] = None
    while len(known) > most:
        del known[next(iter(known))]
