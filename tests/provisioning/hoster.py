"""A hoster as a command: `hoster.py FOLDER create|find|delete`. Each host is a folder with an SSH server of its own on a free port of the loopback.

What a test wants to go wrong it says in FOLDER/trouble.json: {verb: [status, words]}. While FOLDER/slow is there, `create` has made nothing yet.
Each host that is made adds a line to FOLDER/created.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/pid
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
SetEnv PATH={folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin
UsePAM no
"""


def create(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    (folder / "asked").write_text("")
    while (folder / "slow").exists():
        time.sleep(0.02)
    host = folder / "hosts" / asked["name"]
    host.mkdir(parents=True)
    with (folder / "created").open("a") as made:
        made.write(f"{asked['name']}\n")
    (host / "host_key").write_text(asked["host_key"])
    (host / "host_key").chmod(0o600)
    (host / "authorized_keys").write_text(asked["public_key"] + "\n")
    # Where Debian's unit makes it.
    Path("/run/sshd").mkdir(exist_ok=True)
    # Somebody else may be quicker to take a free port.
    while not _serves(host):
        pass
    return found(host)


def _serves(host: Path) -> bool:
    """Start its SSH server on a free port; whether it has got that."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (host / "port").write_text(str(port))
    (host / "sshd_config").write_text(CONFIG.format(port=port, folder=host))
    with (host / "log").open("w") as log:
        words = ["/usr/sbin/sshd", "-D", "-e", "-f", str(host / "sshd_config")]
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    while not _is_written(host / "pid"):
        if server.poll() is not None:
            assert "Address already in use" in (host / "log").read_text(), (host / "log").read_text()
            return False
        time.sleep(0.02)
    return True


def _is_written(place: Path) -> bool:
    return place.exists() and place.read_text().endswith("\n")


def found(host: Path) -> dict[str, Any]:
    return {"id": f"id-of-{host.name}", "address": "127.0.0.1", "port": int((host / "port").read_text())}


def delete(host: Path) -> None:
    """SSH servers of connections that are open end with it: they are of its session."""
    if _is_written(host / "pid"):
        pid = int((host / "pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.02)
    shutil.rmtree(host, ignore_errors=True)


def main() -> None:
    folder, verb = Path(sys.argv[1]), sys.argv[2]
    asked = json.loads(sys.stdin.read())
    trouble = json.loads((folder / "trouble.json").read_text()) if (folder / "trouble.json").exists() else {}
    if verb in trouble:
        status, words = trouble[verb]
        sys.stderr.write(f"{words}\n")
        sys.exit(status)
    host = folder / "hosts" / asked["name"]
    if verb == "create":
        answer: object = create(folder, asked)
    elif verb == "find":
        answer = found(host) if _is_written(host / "pid") else None
    else:
        delete(host)
        answer = None
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
