"""The instruments of `bench send` do what their figures are read as."""

from __future__ import annotations

import smtplib
import ssl
import subprocess
import sys
import time

import pytest

from mail_pipelines.benchmarks import exim_queue, far_away, feeding, postfix
from mail_pipelines.benchmarks.cpu import Meter
from mail_pipelines.benchmarks.send import ROUND_TRIPS

pytestmark = pytest.mark.server


def test_the_sink_takes_what_the_client_and_smtp_source_send() -> None:
    messages = feeding.Messages()
    with postfix.sink() as (port, _):
        assert feeding.send(port, messages, 40, 4) > 0
        assert postfix.source(port, b"Subject: x\n\nHello.\n", 40, 4) > 0


def test_exim_as_it_is_commonly_run_delivers_its_queue() -> None:
    messages = feeding.Messages()
    with postfix.sink() as (port, _), exim_queue.queueing(port) as queueing:
        feeding.send_composed(queueing.port, messages.take(6), 2)
        assert queueing.deliver(6, 2) > 0
        # What is delivered is gone.
        with pytest.raises(Exception, match="0 of 6 messages are in Exim's queue"):
            queueing.deliver(6, 2)


def test_a_message_to_a_far_destination_takes_as_many_round_trips_as_the_bound_counts() -> None:
    round_trip = 0.04
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with far_away.destinations(round_trip) as (port, _):
        begin = time.monotonic()
        with smtplib.SMTP("127.0.0.1", port, local_hostname="here") as client:
            client.ehlo("here")
            client.starttls(context=context)
            client.ehlo("here")
            client.sendmail("a@shop.test", ["b@small.test"], b"Subject: x\r\n\r\nHello.\r\n")
        taken = time.monotonic() - begin
    assert taken >= ROUND_TRIPS * round_trip


def test_processor_time_is_that_of_the_group_and_of_its_ended_children() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])\n{spin}\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        meter = Meter({"ours": lambda: [process.pid], "nobody": lambda: []})
        meter.start()
        assert process.stdout is not None
        process.stdout.readline()
        spent = meter.stop()
        assert process.stdin is not None
        process.stdin.close()
    assert spent["ours"] >= 0.55
    assert spent["nobody"] == 0
