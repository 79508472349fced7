"""A RabbitMQ server of our own for trials and tests: its own folder, node name, ports and port mapper; no system service is touched."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port

VHOST = "mail"
MANAGER = "centre-accounts"
_PASSWORD = "for tests"
# Not the script that Debian puts on the path: that one wants to be root or rabbitmq.
_SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_START_SECONDS = 180
_STOP_SECONDS = 15


@dataclass
class RabbitMQ:
    """A running server; `accounts` maps names to what each may configure, write and read (regular expressions). `centre` may do everything.

    With `management` it has the API by which `MANAGER` makes accounts, which takes its start a second longer.
    """

    folder: Path
    accounts: Mapping[str, str]
    management: bool = False
    port: int = field(default_factory=free_port)
    management_port: int = field(default_factory=free_port)
    # That of its processes, by which its commands find it.
    environ: dict[str, str] = field(default_factory=dict)
    _mapper_port: int = field(default_factory=free_port)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def url(self, account: str) -> str:
        return f"amqp://{account}:{quote(_PASSWORD)}@127.0.0.1:{self.port}/{VHOST}"

    @property
    def management_url(self) -> str:
        return f"http://{MANAGER}:{quote(_PASSWORD)}@127.0.0.1:{self.management_port}"

    def start(self) -> RabbitMQ:
        if shutil.which(_SERVER) is None:
            raise MailPipelinesError("RabbitMQ is not installed: run `script/setup test`, or install the package rabbitmq-server")
        definitions = self.folder / "definitions.json"
        definitions.write_text(json.dumps(self._definitions()), encoding="utf-8")
        settings = self.folder / "rabbitmq.conf"
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self.port}", f"load_definitions = {definitions}", "disk_free_limit.absolute = 10MB", "log.console = true"]
        if self.management:
            lines += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}", "management_agent.disable_metrics_collector = true"]
        settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "enabled_plugins").write_text(f"[{'rabbitmq_management' if self.management else ''}].\n", encoding="utf-8")
        self.environ = {
            # Before the scripts of Debian, which look for the machine's own server.
            "PATH": f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}",
            # Where Erlang keeps its cookie.
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(settings),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            # The script becomes the server, so that its process id is the server's.
            "RUNNING_UNDER_SYSTEMD": "yes",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        }
        self._spawn(["epmd"])
        self._wait(self._mapper_port)
        self._spawn([_SERVER])
        self._wait(self.port)
        if self.management:
            self._wait(self.management_port)
        return self

    def _spawn(self, command: list[str]) -> None:
        with (self.folder / "output").open("ab") as output:
            # In a session of its own: a terminal's Ctrl-C is for whoever started it.
            process = subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self._processes.append(process)

    def _wait(self, port: int) -> None:
        """Until the newest process listens there."""
        end = time.monotonic() + _START_SECONDS
        while not _listens(port):
            if self._processes[-1].poll() is not None or time.monotonic() > end:
                said = (self.folder / "output").read_text(errors="replace")[-2000:]
                raise MailPipelinesError(f"RabbitMQ does not listen on port {port}: {said}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End both processes by their ids, and wait for them."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def restart(self) -> None:
        """Killed, not asked."""
        self._processes[-1].kill()
        self.stop()
        self.start()

    def _definitions(self) -> dict[str, object]:
        everything = dict.fromkeys(("configure", "write", "read"), ".*")
        of_all = {"centre": everything} | {name: dict.fromkeys(everything, own) for name, own in self.accounts.items()}
        tags = dict.fromkeys(of_all, "") | ({MANAGER: "administrator"} if self.management else {})
        return {
            "vhosts": [{"name": VHOST}],
            "users": [
                {"name": name, "password_hash": _hashed(), "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": tag} for name, tag in tags.items()
            ],
            "permissions": [{"user": name, "vhost": VHOST, **right} for name, right in of_all.items()],
        }


def _hashed() -> str:
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + _PASSWORD.encode()).digest()).decode()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
