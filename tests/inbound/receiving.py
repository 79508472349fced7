"""A running `mail-pipelines inbound run`, and conversations with it."""

from __future__ import annotations

import os
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mail_pipelines.config import InboundSettings
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.messages.keyring import KeyRing
from tests.parts.processes import free_port, listens, stop, wait_for

KEY = "a key for tests"


def key_ring(key: str = KEY) -> KeyRing:
    """That of an installation without servers of their own keys."""
    return KeyRing.of(key.encode(), {})


class Receiving:
    """The command as a process with folders of its own, which the user that Exim runs as can reach. `database` is an empty central database in SQLite."""

    def __init__(self, database: Path) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
        self.base.chmod(0o711)
        self.database = self.base / "home" / "central.sqlite3"
        self.database.parent.mkdir()
        shutil.copy(database, self.database)
        self.port = free_port()
        self.folders = InboundFolders.of(InboundSettings(folder=str(self.base / "inbound")))
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environ = os.environ | {
            "MAIL_PIPELINES_HOME": str(self.base / "home"),
            "MAIL_PIPELINES_SENDING__TOKEN_KEY": KEY,
            "MAIL_PIPELINES_INBOUND__FOLDER": str(self.folders.root),
            "MAIL_PIPELINES_INBOUND__PORT": str(self.port),
        }
        with (self.base / "output").open("ab") as output:
            process = subprocess.Popen([sys.executable, "-m", "mail_pipelines", "inbound", "run"], env=environ, stdout=output, stderr=output)
        wait_for(lambda: self._serves(process) or process.poll() is not None, what="Exim")
        assert process.poll() is None, (self.base / "output").read_text()
        return process

    def _serves(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether Exim listens, and is not the one that an earlier process has left."""
        try:
            daemon = int((self.folders.run / "exim.group").read_text())
            parent = int(Path(f"/proc/{daemon}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return False
        return parent == process.pid and listens(self.port)

    def restart(self) -> None:
        stop(self.process, 120)
        self.process = self._start()

    def end(self) -> None:
        stop(self.process, 120)
        shutil.rmtree(self.base)

    def connect(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, timeout=120)

    def send(self, recipient: str, message: bytes, sender: str = "") -> int:
        """Offer one message; the code of the last reply."""
        with self.connect() as client:
            client.ehlo("mx.example.net")
            for command in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>"):
                code, _ = client.docmd(command)
                if code >= 400:
                    return code
            return client.data(message)[0]

    def offer(self, recipients: Sequence[str]) -> list[bytes]:
        """The replies to recipients offered in one write on one connection."""
        commands = b"".join(f"RCPT TO:<{recipient}>\r\n".encode() for recipient in recipients)
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            answers = connection.makefile("rb")
            answers.readline()
            connection.sendall(b"EHLO mx.example.net\r\n")
            while answers.readline()[3:4] == b"-":
                pass
            connection.sendall(b"MAIL FROM:<>\r\n" + commands + b"QUIT\r\n")
            return answers.read().splitlines()[1:-1]

    def stored(self) -> list[Path]:
        """The files of all messages, filed or still in the spool."""
        return [path for folder in (self.folders.mail, self.folders.spool / "input") for path in folder.rglob("*") if path.is_file()]

    def filed(self, maildir: str, count: int = 1) -> list[Path]:
        """The messages in a maildir, once there are so many and Exim, which files a message before it forgets it, has none left."""

        def found() -> list[Path] | None:
            paths = sorted((self.folders.mail / maildir / "new").glob("*"))
            is_done = not any((self.folders.spool / "input").glob("*"))
            return paths if len(paths) >= count and is_done else None

        return wait_for(found, what=f"mail in {maildir}") or []
