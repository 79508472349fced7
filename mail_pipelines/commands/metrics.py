"""What the centre tells Prometheus."""

from __future__ import annotations

from mail_pipelines.commands.context import console, open_engine, settings


def metrics() -> None:
    """Tell Prometheus about campaigns and servers, at metrics.listen and metrics.port, until stopped. One, at the centre; servers tell by their own process."""
    import signal

    from mail_pipelines.metrics.centre import CentreMetrics
    from mail_pipelines.metrics.endpoint import telling

    ends = (signal.SIGTERM, signal.SIGINT)
    # Before any thread is started, so that none of them takes the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    given = settings().metrics
    with telling(CentreMetrics(open_engine()), given):
        console.print(f"metrics: http://{given.listen}:{given.port}/metrics", markup=False, highlight=False)
        signal.sigwait(ends)
