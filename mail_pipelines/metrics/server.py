"""What a server's process tells about itself. It asks no database, so that it answers while that is away."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from mail_pipelines.dispatch.presence import Presence


class ServerMetrics(Collector):
    """Beats, settlement, journal and disks of one server."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence

    def collect(self) -> Iterator[Metric]:
        presence, tally = self._presence, self._presence.settler.tally
        facts = presence.facts()
        info = self._gauge("info", "1 for what this server is.", "kind", "version")
        info.add_metric((presence.info.key, presence.info.kind, str(facts.get("version", ""))), 1)
        yield info
        if (beaten := presence.heartbeat.last) is not None:
            yield self._one("heartbeat_timestamp_seconds", "When the database last took a heartbeat, by its clock.", beaten.timestamp())
        if tally.finished_at is not None:
            yield self._one("settled_timestamp_seconds", "When the settler last ended a round, by the database's clock.", tally.finished_at)
        yield self._counter("settler_failures", "Rounds of the settler that failed: no database, or no journal.", tally.failures)
        yield self._counter("settled_claims", "Claims of dead sessions that this process settled.", tally.claims)
        rows = CounterMetricFamily("mail_pipelines_server_settled_rows", "Rows of those claims, by what they became.", labels=("server", "state"))
        for state, count in sorted(tally.rows.items()):
            rows.add_metric((presence.info.key, state.name.lower()), count)
        yield rows
        if "queue" in facts:
            yield self._one("queue_messages", "Messages in Exim's queue.", float(str(facts["queue"])))
        yield self._one(
            "permits", "Permits of claims: while one is there, messages of its claim may be offered.", sum(1 for _ in presence.folders.permits.glob("c*"))
        )
        yield from self._files()
        if presence.shipper is not None:
            yield from self._shipped(presence.shipper.standing()["shipped"])

    def _files(self) -> Iterator[Metric]:
        folders = self._presence.folders
        free = self._gauge("free_bytes", "Free on the disk of a folder.", "folder")
        for name, folder in (("log", folders.journal.parent), ("run", folders.run)):
            free.add_metric((self._presence.info.key, name), shutil.disk_usage(folder).free)
        yield free
        # None before the first message, and for a moment while it is rotated.
        with contextlib.suppress(FileNotFoundError):
            yield self._one("journal_bytes", "Size of the journal's newest file.", folders.journal.stat().st_size)

    def _shipped(self, shipped: object) -> Iterator[Metric]:
        assert isinstance(shipped, dict)
        if shipped["at"]:
            yield self._one("log_shipped_timestamp_seconds", "When the end of the log was last in the archive.", shipped["at"])
        yield self._one("log_shipping_failed", "Whether the archive took no piece when it was last tried.", int(bool(shipped["error"])))

    def _gauge(self, metric: str, words: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"mail_pipelines_server_{metric}", words, labels=("server", *labels))

    def _one(self, metric: str, words: str, value: float) -> Metric:
        family = self._gauge(metric, words)
        family.add_metric((self._presence.info.key,), value)
        return family

    def _counter(self, metric: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(f"mail_pipelines_server_{metric}", words, labels=("server",))
        family.add_metric((self._presence.info.key,), value)
        return family
