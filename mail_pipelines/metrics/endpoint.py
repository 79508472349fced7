"""The place at which one process tells its metrics: an HTTP server of its own in a thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from mail_pipelines.config import MetricsSettings
from mail_pipelines.errors import MailPipelinesError

_RETRY_SECONDS = 10.0
_log = logging.getLogger(__name__)


class MetricsError(MailPipelinesError):
    """The metrics cannot be told."""


@contextmanager
def telling(collector: Collector, settings: MetricsSettings) -> Iterator[None]:
    """Tell what `collector` collects, and what this process uses, for as long as the block runs. Raises `MetricsError` if nobody can listen there."""
    if not settings.port:
        raise MetricsError("metrics.port is 0: set it, or MAIL_PIPELINES_METRICS__PORT, to the port that Prometheus asks")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(settings.port, settings.listen, registry)
    except OSError as error:
        raise MetricsError(
            f"metrics cannot be told at {settings.listen} port {settings.port}: {error.strerror}; set metrics.listen and metrics.port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def tell_for_ever(collector: Collector, settings: MetricsSettings) -> None:
    """Tell until cancelled. What cannot be told is tried again: a server sends mail with or without metrics, and Prometheus sees that it is not told."""
    if not settings.port:
        await asyncio.Event().wait()
    while True:
        try:
            with telling(collector, settings):
                await asyncio.Event().wait()
        except MetricsError as error:
            _log.warning("%s", error)
        await asyncio.sleep(_RETRY_SECONDS)
