"""Telling operators: from causes to messages that every channel takes once.

One message has all the news of a look, so that a database that was away makes one and not three hundred. A channel that does not take it is offered it
again at the next look; the others are not told twice.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.engine import Engine

from mail_pipelines.alerts import memory
from mail_pipelines.alerts.cause import Cause
from mail_pipelines.alerts.channels import Channel, ChannelError
from mail_pipelines.alerts.memory import Alert, News
from mail_pipelines.database.engine import reading, transact

_SUBJECT = 120
_MOST_TOLD = 50


@dataclass(frozen=True)
class Told:
    """How many pieces of news went out, over all channels, and what kept channels from taking theirs."""

    news: int
    errors: tuple[str, ...] = ()


def look(engine: Engine, causes: Collection[Cause], channels: Sequence[Channel], now: dt.datetime, reminder: dt.timedelta) -> Told:
    """Remember what there is, and tell what is due. A message that was taken just before this process died is sent again."""

    def remember(alerts: Collection[Alert]) -> None:
        transact(engine, lambda connection: memory.store(connection, alerts))

    with reading(engine) as connection:
        known = memory.load(connection)
    alerts = memory.meet(known, causes, now)
    if alerts != known:
        remember(alerts)
    count, errors = 0, []
    for channel in channels:
        news = [(piece, alert) for alert in alerts if (piece := alert.news_for(channel.name, now, reminder)) is not None]
        if not news:
            continue
        try:
            channel.send(*write(news))
        except ChannelError as error:
            errors.append(str(error))
            continue
        count += len(news)
        taken = {alert.key for _, alert in news}
        alerts = [replace(alert, sent={**alert.sent, channel.name: now}) if alert.key in taken else alert for alert in alerts]
        remember(alerts)
    return Told(count, tuple(errors))


def write(news: Sequence[tuple[News, Alert]]) -> tuple[str, str]:
    """Subject and text of one message."""
    (piece, first), *others = news
    words = {News.NEW: "", News.REMINDER: "still: ", News.RESOLVED: "resolved: "}
    subject = f"{words[piece]}{first.text}"
    subject = subject if len(subject) <= _SUBJECT else f"{subject[: _SUBJECT - 1]}…"
    blocks = []
    for piece, alert in news[:_MOST_TOLD]:
        since = f"since {alert.first_seen:%Y-%m-%d %H:%M} UTC"
        until = f" until {alert.resolved_at:%Y-%m-%d %H:%M} UTC" if alert.resolved_at else ""
        command = "" if piece is News.RESOLVED else f"\n    {alert.command}"
        blocks.append(f"{words[piece]}{alert.text}\n  ({since}{until}){command}")
    if len(news) > _MOST_TOLD:
        blocks.append(f"and {len(news) - _MOST_TOLD} more: mail-pipelines alert list")
    return f"[mail_pipelines] {subject}{f' (and {len(others)} more)' if others else ''}", "\n\n".join(blocks) + "\n"
