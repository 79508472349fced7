"""Signatures hold through Exim, in either mode: what arrives at the far end verifies by dkimpy, whatever was composed, and any change of it does not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.endings import Ending
from mail_pipelines.dispatch.exim import runners
from mail_pipelines.dispatch.gate import Gate
from mail_pipelines.dispatch.pacer import Pacer
from mail_pipelines.dispatch.smtp import Connection
from mail_pipelines.messages.composing import Message, Recipient, compose
from tests.dispatch.world import RunningExim, Servers, make_world, write_play
from tests.messages.test_composing import message_of, subjects, templates, values_of
from tests.messages.test_dkim import SIGNING, verdict, verifies

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]

Source = tuple[str, str, str, dict[str, Any]]
# What SMTP or a mail server could do something to.
EDGES: list[Source] = [
    ("", "", "", {}),
    ("{{ city }}", ".{{ city }}\n.\n..\n.{{ city }}", ".", {"city": "."}),
    ("{{ city }}", " {{ city }} \n\t\n \n", "<pre>\n  a \t b  </pre>  \n\n\n", {"city": ""}),
    ("{{ city }} ", "{{ city }}\t", "{{ city }}", {"city": "x" * 5000}),
    ("{{ city }}" * 9, "{{ city }}" * 99, "{{ city }}" * 99, {"city": "Łódź  "}),
    ("{{ city }}", "From me\n{{ city }}", "--=_boundary--\n", {"city": "Rome\r\n.\r\nMAIL FROM:<>\r\n"}),
    ("{% if city %}a  b{% endif %}", "{% if city %}\t a  b{% endif %}\n", "{% if city %} \t a  b{% endif %}", {"city": "x"}),
    ("{{ city }}", "{{ city }}", "{{ city }}", {"city": "a\0b\x1b\x7f\tc\x0bd 👩‍👩‍👧 ü \u2028 \x85"}),
]


def drawn(count: int) -> list[Source]:
    """The same random templates and values every time."""
    sources: list[Source] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.tuples(subjects, templates, templates, values_of))
    def draw(source: Source) -> None:
        sources.append(source)

    draw()
    return sources


def signed(sources: list[Source]) -> dict[str, Message]:
    """One message for each, by its token."""
    messages = []
    for number, (subject, text, html, values) in enumerate(sources, 1):
        recipient = Recipient(campaign_id=1, contact_id=number, attempt=0, email=f"person{number}@google.test", values=values)
        messages.append(compose(message_of(subject, f"{text}\n", f"{html}\n"), recipient, SIGNING()))
    return {message.token: message for message in messages}


async def offer(exim: RunningExim, greeting: str, messages: list[Message]) -> list[Ending]:
    """All over one connection, each envelope with the body before it."""
    connection = Connection(exim.server.host, exim.server.port, 120)
    await connection.open()
    await connection.greet(greeting)
    following = [*messages[1:], None]
    endings = [(await connection.offer(message, after)).ending for message, after in zip(messages, following, strict=True)]
    await connection.close()
    return endings


async def through_queue(exim: RunningExim, name: str, messages: list[Message]) -> list[Ending]:
    folder = exim.folders.gates / "google"
    folder.mkdir(exist_ok=True)
    pacer = Pacer(exim.folders.pacers, "google", per_second=1000, connections=1)
    gate = Gate(folder, name, [message.token for message in messages], pacer, time.monotonic() + 600)
    await gate.open()
    endings = await offer(exim, f"{name}.google", messages)
    while list((exim.folders.run / "spool").glob("google/input/*-D")):
        await runners.run_queue(exim.folders.runners, "google", len(messages))
    await gate.close()
    pacer.close()
    return endings


def changes(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """Copies with one octet changed: some in the header, of which all behind the signature is signed, and some in the body.

    Not the CR of line ends: dkimpy reads a bare LF as a line end too.
    """
    begin, body = data.index(b"\r\nFrom: ") + 2, data.index(b"\r\n\r\n") + 4
    for start, end in ((begin, body - 4), (body, len(data))):
        for place in draw.sample(range(start, end), 4):
            if data[place] != 0x0D:
                yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_whatever_arrives_verifies_and_any_change_does_not(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=1, kind=kind)
    exim = running.start(world, world.server(), write_play(tmp_path / "play.toml"))
    messages = signed([*drawn(32), *EDGES, *EDGES])
    whole = list(messages.values())
    queued = len(EDGES)
    granted = permit.grant(exim.folders.permits, 1, seconds=600)
    try:
        endings = asyncio.run(offer(exim, granted.name, whole[:-queued])) + asyncio.run(through_queue(exim, granted.name, whole[-queued:]))
    finally:
        granted.release()
    assert endings == [Ending.DELIVERED] * len(messages)
    log = exim.folders.journal.read_text().splitlines()
    assert [sum(mark in line for line in log) for mark in (" >> ", " => ")] == [len(messages) - queued, queued]
    kept = world.kept()
    arrived = {message.token: message.data() for message in kept}
    assert len(kept) == len(arrived) == len(messages) == 32 + 2 * len(EDGES)
    assert arrived.keys() == messages.keys()
    draw = random.Random(1)
    for token, data in arrived.items():
        # Exim puts its own fields above, and touches nothing.
        assert data.endswith(b"\r\n" + messages[token].data)
        assert verifies(data)
        assert [changed for changed in changes(data, draw) if verdict(changed)] == []
