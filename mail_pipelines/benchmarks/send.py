"""Sending, end to end: into a sink, and through Exim with ledger and journal, against what Postfix, aiosmtplib and Exim's own queue do.

References are measured in the same run, in turns with what they judge, so that other programs disturb both alike. Rates are bounded
by processor time, so the run through Exim also says whose it is.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import aiosmtplib
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from mail_pipelines.benchmarks import exim_queue, far_away, feeding, postfix, sign, silence
from mail_pipelines.benchmarks.compose import SENDER, recipients
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.dispatching import Dispatching, Run, Server, dispatching
from mail_pipelines.messages.composing import compose

# Of the rate at which one core makes RSA-2048 signatures and does nothing else.
RAW_TARGET = 0.75
PLAIN_TARGET = 15.0
QUEUE_TARGET = 8.0
LEDGER_TARGET = 0.05
SENDER_TARGET = 1 / 3
MEMORY_MEGABYTES = 60.0
CONNECTIONS = 16
SINK_CONNECTIONS = 4
RUNNERS = 4
ROUND_TRIP_SECONDS = 0.05
# Connection, greeting, EHLO, STARTTLS, TLS 1.3, EHLO, MAIL, RCPT, DATA, body, QUIT.
ROUND_TRIPS = 11
FAR_CONNECTIONS = 32
FAR_TARGET = 0.85
# At this distance a shorter run is mostly begin and end.
FAR_SECONDS = 5.0
# Longer than the first message to a silent domain waits, which is 5 s.
SILENT_SECONDS = 7.0
DOMAINS = 100
SILENT_DOMAIN = "d7.test"
SILENT_TARGET = 0.95
BURST_CONNECTIONS = 4
BURST_TARGET = 3.0
# A send run finds the pace of a burst from the bursts before.
BURST_SECONDS = 6.0
_SIGNED_OCTETS = 1200


def run(quick: bool) -> list[Result]:
    """All figures, each with its reference; `quick`: in fewer and shorter runs, without silent domains and bursts, which show only in longer ones."""
    return [*into_a_sink(quick), *through_exim(quick)]


def into_a_sink(quick: bool) -> list[Result]:
    """Composed, signed and sent by one process."""
    messages = feeding.Messages()
    octets, padding, algorithm = bytes(_SIGNED_OCTETS), PKCS1v15(), SHA256()
    # Message by message: many short turns find moments in which no other program disturbs.
    turns, count, plain_count, source_count = (12, 60, 2, 1200) if quick else (80, 60, 3, 8000)
    best = _Best()
    with postfix.sink() as (port, _):
        data = next(messages.take(1)).data
        plain = _plain(port, messages)
        for _ in range(turns):
            best.note("own", count / feeding.send(port, messages, count, SINK_CONNECTIONS))
            best.note("raw", count / _seconds(lambda: [messages.key.sign(octets, padding, algorithm) for _ in range(count)]))
            best.note("plain", plain_count / plain(plain_count))
        composed = list(messages.take(count))
        for _ in range(turns):
            best.note("unsigned", count / feeding.send_composed(port, iter(composed), SINK_CONNECTIONS))
            best.note("source", source_count / turns / postfix.source(port, data.replace(b"\r\n", b"\n"), source_count // turns, SINK_CONNECTIONS))
    return [
        judge("compose, sign, send into a sink", best["own"], "messages/s", best["raw"], target=RAW_TARGET, better="higher"),
        judge("the same against aiosmtplib, standard library and dkimpy", best["own"], "messages/s", best["plain"], target=PLAIN_TARGET, better="higher"),
        judge("composed messages sent, against smtp-source", best["unsigned"], "messages/s", best["source"], target=1.0, better="higher"),
    ]


def through_exim(quick: bool) -> list[Result]:
    """Real send runs: claimed, composed, signed, delivered in cutthrough mode, journaled, recorded in MariaDB."""
    turns, seconds, queued = (1, 3.0, 150) if quick else (4, 15.0, 1500)
    # More than can be sent in the time.
    with dispatching(int((turns + 1) * seconds * 2000)) as world:
        results = [*_nearby(world, turns, seconds, queued), *_far_away(world, turns, seconds, also_silent=not quick)]
        return results if quick else [*results, *_bursts(world, turns, seconds)]


def _nearby(world: Dispatching, turns: int, seconds: float, queued: int) -> list[Result]:
    messages = feeding.Messages()
    runs: list[Run] = []
    queue_rate = 0.0
    with postfix.sink() as (port, sink), exim_queue.queueing(port) as queueing, world.server("near", ("127.0.0.1", port), (sink,)) as server:
        server.limit(CONNECTIONS)
        for _ in range(turns):
            # Not measured, and over sooner with few connections: with 16 one of them always waits for eight seconds.
            feeding.send_composed(queueing.port, messages.take(queued), 2)
            queue_rate = max(queue_rate, queued / queueing.deliver(queued, RUNNERS))
            runs.append(server.send(seconds))
    best = max(runs, key=lambda run: run.rate)
    total = sum(best.cpu.values())
    parts = {
        "signatures": best.signing_cpu,
        "the sender's own work": best.cpu["sender"] - best.signing_cpu,
        "Exim": best.cpu["exim"],
        "the database": best.cpu["database"],
        "the destination": best.cpu["sink"],
    }
    return [
        judge("through Exim, signed, journaled, recorded", best.rate, "messages/s", queue_rate, target=QUEUE_TARGET, better="higher"),
        judge("ledger's part of the processor time", best.cpu["database"] + best.ledger_cpu, "s", total, target=LEDGER_TARGET, better="lower"),
        judge("sender's part of the processor time", best.cpu["sender"], "s", total, target=SENDER_TARGET, better="lower"),
        *(judge(f"part of {name}", part, "s", total, target=1, better="lower") for name, part in parts.items()),
        judge("processors that all of it kept busy", total / best.seconds, "processors", os.cpu_count() or 1, target=1, better="lower"),
        judge("memory of a send run above its imports", max(run.megabytes for run in runs), "MB", MEMORY_MEGABYTES, target=1, better="lower"),
    ]


def _far_away(world: Dispatching, turns: int, seconds: float, *, also_silent: bool) -> list[Result]:
    """The same to destinations with TLS, first nearby, where handshakes take all the processor's time, and then at a distance."""
    with far_away.destinations(0.0) as (port, sink), world.server("tls-near", ("127.0.0.1", port), (sink,)) as server:
        server.limit(FAR_CONNECTIONS)
        # It is over the sooner.
        near = max(server.send(seconds / 2).rate for _ in range(turns))
    with (
        far_away.destinations(ROUND_TRIP_SECONDS) as (port, sink),
        silence.silent_port() as nobody,
        world.server("tls-far", ("127.0.0.1", port), (sink,), silent=(SILENT_DOMAIN, nobody)) as server,
    ):
        server.limit(FAR_CONNECTIONS)
        seconds = max(seconds, FAR_SECONDS)
        far = max(server.send(seconds).rate for _ in range(turns))
        partly_silent = max(_send_to_domains(world, server, max(seconds, SILENT_SECONDS)) for _ in range(turns)) if also_silent else None
    bound = min(near, FAR_CONNECTIONS / (ROUND_TRIPS * ROUND_TRIP_SECONDS))
    name = f"TLS, {ROUND_TRIP_SECONDS * 1000:.0f} ms round trips, {FAR_CONNECTIONS} connections"
    results = [judge(name, far, "messages/s", bound, target=FAR_TARGET, better="higher")]
    if partly_silent is not None:
        name = f"the same, and nobody answers for one of {DOMAINS} domains"
        results.append(judge(name, partly_silent, "messages/s", far, target=SILENT_TARGET, better="higher"))
    return results


def _send_to_domains(world: Dispatching, server: Server, seconds: float) -> float:
    """The rate of a run that knows nothing of the domains of its recipients. Nobody answers for one of them."""
    world.spread(DOMAINS)
    return server.send(seconds).rate


def _bursts(world: Dispatching, turns: int, seconds: float) -> list[Result]:
    """Both modes to one provider as large ones are: at a distance, with TLS, and taking commands together."""
    rates: dict[str, float] = {}
    with far_away.destinations(ROUND_TRIP_SECONDS, pipelining=True) as (port, sink), world.server("large", ("127.0.0.1", port), (sink,)) as server:
        for mode, duration in (("cutthrough", seconds), ("burst", max(seconds, BURST_SECONDS))):
            server.limit(BURST_CONNECTIONS, mode)
            rates[mode] = max(server.send(duration).rate for _ in range(turns))
    name = f"burst over cutthrough, TLS, {ROUND_TRIP_SECONDS * 1000:.0f} ms, {BURST_CONNECTIONS} connections"
    return [judge(name, rates["burst"], "messages/s", rates["cutthrough"], target=BURST_TARGET, better="higher")]


class _Best:
    """The best of several rates, by name: the ones least disturbed by other programs."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def note(self, name: str, rate: float) -> None:
        self._rates[name] = max(rate, self._rates.get(name, 0.0))

    def __getitem__(self, name: str) -> float:
        return self._rates[name]


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _plain(port: int, messages: feeding.Messages) -> Callable[[int], float]:
    """A function that sends so many messages as a plain program would, one after another, and returns the seconds it took."""
    message = compose(messages.compiled, next(recipients()), SENDER)
    build = sign.by_dkimpy(message.data, messages.compiled.from_domain, messages.key)

    async def send(count: int) -> float:
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
            begin = time.perf_counter()
            for _ in range(count):
                await client.sendmail(message.envelope_sender, message.recipient, build())
            return time.perf_counter() - begin

    return lambda count: asyncio.run(send(count))
