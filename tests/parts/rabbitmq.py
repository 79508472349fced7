"""A RabbitMQ server of our own: its own folder, node name, ports and port mapper; no system service is touched."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.parts.processes import free_port, listens, stop, wait_for

VHOST = "mail"
_PASSWORD = "for tests"


@dataclass
class RabbitMQ:
    """A running server; `accounts` maps names to what each may configure, write and read (regular expressions)."""

    folder: Path
    accounts: Mapping[str, str]
    port: int = field(default_factory=free_port)
    # That of its processes, by which its commands find it.
    environ: dict[str, str] = field(default_factory=dict)
    _mapper_port: int = field(default_factory=free_port)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def url(self, account: str) -> str:
        return f"amqp://{account}:{_PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/{VHOST}"

    def start(self) -> RabbitMQ:
        definitions = self.folder / "definitions.json"
        definitions.write_text(json.dumps(self._definitions()), encoding="utf-8")
        settings = self.folder / "rabbitmq.conf"
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self.port}", f"load_definitions = {definitions}", "disk_free_limit.absolute = 10MB", "log.console = true"]
        settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "enabled_plugins").write_text("[].\n", encoding="utf-8")
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
        with (self.folder / "output").open("ab") as output:
            for command in (["epmd"], ["/usr/lib/rabbitmq/bin/rabbitmq-server"]):
                self._processes.append(subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
                if command == ["epmd"]:
                    wait_for(lambda: listens(self._mapper_port), what="Erlang's port mapper")
        wait_for(self._is_up, seconds=90, what=f"RabbitMQ ({self.folder / 'output'})")
        return self

    def _is_up(self) -> bool:
        assert self._processes[-1].poll() is None, (self.folder / "output").read_text(errors="replace")[-2000:]
        return listens(self.port)

    def stop(self) -> None:
        for process in reversed(self._processes):
            stop(process)
        self._processes.clear()

    def restart(self) -> None:
        """Killed, not asked."""
        self._processes[-1].kill()
        self.stop()
        self.start()

    def _definitions(self) -> dict[str, object]:
        everything = dict.fromkeys(("configure", "write", "read"), ".*")
        rights = {"centre": everything} | {name: dict.fromkeys(everything, own) for name, own in self.accounts.items()}
        return {
            "vhosts": [{"name": VHOST}],
            "users": [{"name": name, "password_hash": _hashed(), "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""} for name in rights],
            "permissions": [{"user": name, "vhost": VHOST, **right} for name, right in rights.items()],
        }


def _hashed() -> str:
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + _PASSWORD.encode()).digest()).decode()
