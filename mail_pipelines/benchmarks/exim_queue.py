"""The reference for a dispatch server: the same Exim as it is commonly run, taking messages into its queue and delivering them by queue runners."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mail_pipelines.benchmarks.postfix import wait_for_port
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port

_CONFIGURATION = """
primary_hostname = bench.example.test
exim_user = {user}
exim_group = {group}
deliver_drop_privilege = true
local_interfaces = <; [127.0.0.1]:{port}
spool_directory = {folder}/spool
log_file_path = {folder}/log/%s.log
pid_file_path = {folder}/spool/exim.pid
write_rejectlog = false
message_logs = false
split_spool_directory = true
queue_only = true
smtp_accept_max = 200
smtp_accept_queue_per_connection = 0
smtp_accept_max_per_connection = 0
smtp_connect_backlog = 1024
rfc1413_query_timeout = 0s
dkim_verify_signers =
tls_advertise_hosts =
acl_smtp_rcpt = acl_all
exim_path = {binary}
begin acl
acl_all:
  accept
begin routers
all:
  driver = manualroute
  route_list = * 127.0.0.1::{sink}
  self = send
  transport = onward
begin transports
onward:
  driver = smtp
  allow_localhost
  hosts_try_prdr =
begin retry
* * F,1h,15m
"""


@contextmanager
def queueing(sink: int) -> Iterator[QueueingExim]:
    """A running Exim that queues, with its spool on disk as accepted mail needs it; its queue goes to port `sink` of 127.0.0.1."""
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
    folder.chmod(0o711)
    binary = instance.find_binary()
    account = instance.account_for(binary)
    for name in ("spool", "log"):
        (folder / name).mkdir()
        if os.geteuid() == 0:
            os.chown(folder / name, account.uid, account.gid)
    port = free_port()
    configuration = folder / "exim.conf"
    configuration.write_text(
        _CONFIGURATION.format(user=account.user, group=account.group, port=port, folder=folder, binary=binary, sink=sink), encoding="utf-8"
    )
    daemon = subprocess.Popen([binary, "-C", str(configuration), "-bdf"], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_port(port, daemon)
        yield QueueingExim(binary, configuration, folder / "spool" / "input", port)
    finally:
        instance.stop(daemon.pid, seconds=5)
        daemon.wait()
        shutil.rmtree(folder)


class QueueingExim:
    """`port` takes messages; `deliver` runs the queue."""

    def __init__(self, binary: str, configuration: Path, queue: Path, port: int) -> None:
        self._binary, self._configuration, self._queue, self.port = binary, configuration, queue, port

    def deliver(self, messages: int, runners: int) -> float:
        """Seconds in which so many queue runners deliver the `messages` of the queue."""
        if (waiting := self._waiting()) != messages:
            raise MailPipelinesError(f"{waiting} of {messages} messages are in Exim's queue")
        begin = time.perf_counter()
        command = [self._binary, "-C", str(self._configuration), "-q"]
        for process in [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(runners)]:
            process.wait()
        taken = time.perf_counter() - begin
        if waiting := self._waiting():
            raise MailPipelinesError(f"{waiting} of {messages} messages are still in Exim's queue after a run of it")
        return taken

    def _waiting(self) -> int:
        return sum(1 for _ in self._queue.glob("**/*-H"))
