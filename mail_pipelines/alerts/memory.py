"""What was told of which cause, in the central database, and from it what is to be told now.

```
(seen) → waiting ─lasted long enough→ told ─reminder period→ told again
             └─gone→ forgotten          └─gone for some minutes→ resolved, told once more
```

What belongs here: the table `alerts` and the decision. What does not: words and ways of sending (`telling`).
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.alerts.cause import Cause
from mail_pipelines.database import models
from mail_pipelines.database.upsert import put

# What is gone for a moment is not over: a server that beats now and then would be told of again and again.
GONE_FOR = dt.timedelta(minutes=5)
# What is over is remembered so long, for `alert list`.
KEPT_FOR = dt.timedelta(days=30)
_KEY, _TEXT, _COMMAND = 190, 1000, 200


class News(enum.StrEnum):
    """What a message says of a cause."""

    NEW = "new"
    REMINDER = "reminder"
    RESOLVED = "resolved"


@dataclass(frozen=True)
class Alert:
    """One cause as it is remembered. `sent`: when each channel has last taken word of it."""

    key: str
    text: str
    command: str
    first_seen: dt.datetime
    last_seen: dt.datetime
    # When it has lasted long enough to be told.
    due_at: dt.datetime
    sent: Mapping[str, dt.datetime]
    resolved_at: dt.datetime | None = None

    def news_for(self, channel: str, now: dt.datetime, reminder: dt.timedelta) -> News | None:
        """What is to be told to a channel now."""
        told = self.sent.get(channel)
        if self.resolved_at is not None:
            return News.RESOLVED if told is not None and told < self.resolved_at else None
        if told is None:
            return News.NEW if now >= self.due_at else None
        return News.REMINDER if now - told >= reminder else None


def meet(known: Iterable[Alert], causes: Collection[Cause], now: dt.datetime) -> list[Alert]:
    """What is remembered after a look that found `causes`: old alerts go on, end or are forgotten, new ones begin."""
    by_key = {cause.key[:_KEY]: cause for cause in causes}
    after = []
    for alert in known:
        cause = by_key.get(alert.key)
        if cause is not None and alert.resolved_at is None:
            del by_key[alert.key]
            after.append(replace(alert, text=cause.text[:_TEXT], command=cause.command[:_COMMAND], last_seen=now))
        elif cause is None and alert.resolved_at is not None:
            if now - alert.resolved_at < KEPT_FOR:
                after.append(alert)
        elif cause is None and now - alert.last_seen < GONE_FOR:
            after.append(alert)
        elif cause is None and alert.sent:
            after.append(replace(alert, resolved_at=now))
        # Otherwise nobody was told of it, or it begins anew.
    after += [Alert(key, cause.text[:_TEXT], cause.command[:_COMMAND], now, now, now + cause.after, {}) for key, cause in by_key.items()]
    return sorted(after, key=lambda alert: (alert.first_seen, alert.key))


def load(connection: Connection) -> list[Alert]:
    """All that is remembered, the oldest first."""
    table = models.Alert
    rows = connection.execute(sa.select(*table.__table__.c).order_by(table.first_seen, table.key))
    return [_alert(row) for row in rows]


def store(connection: Connection, alerts: Collection[Alert]) -> None:
    """Remember exactly these."""
    table = models.Alert
    connection.execute(sa.delete(table).where(table.key.not_in([alert.key for alert in alerts])))
    rows = [
        {
            "key": alert.key,
            "text": alert.text,
            "command": alert.command,
            "first_seen": alert.first_seen,
            "last_seen": alert.last_seen,
            "due_at": alert.due_at,
            "sent": {channel: at.isoformat() for channel, at in alert.sent.items()},
            "resolved_at": alert.resolved_at,
        }
        for alert in sorted(alerts, key=lambda alert: alert.key)
    ]
    put(connection, table, rows)


def _alert(row: sa.Row[tuple[object, ...]]) -> Alert:
    values = dict(row._mapping)
    return Alert(**values | {"sent": {channel: dt.datetime.fromisoformat(at) for channel, at in values["sent"].items()}})
