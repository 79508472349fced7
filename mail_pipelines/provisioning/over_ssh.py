"""One command on a host, by SSH: its key is the one that is known, or nothing is said to it."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mail_pipelines.provisioning.interfaces import Host, ProvisioningError

_SSH_PORT = 22
# What ssh itself ends with.
_NO_SESSION = 255


def known_hosts(host: Host) -> str:
    """The line of known_hosts for this host."""
    return f"{host.address if host.port == _SSH_PORT else f'[{host.address}]:{host.port}'} {host.host_key}\n"


def run(host: Host, words: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command as root. Raises `ProvisioningError` if there is no session, or it takes longer."""
    asked = shlex.join([*([] if host.user == "root" else ["sudo", "-n"]), *words])
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-ssh-") as folder:
        known = Path(folder, "known_hosts")
        known.write_text(known_hosts(host), encoding="ascii")
        options = {"UserKnownHostsFile": known, "StrictHostKeyChecking": "yes", "BatchMode": "yes", "IdentitiesOnly": "yes", "LogLevel": "ERROR"}
        command = ["ssh", "-F", os.devnull, "-i", host.key_file, "-p", str(host.port)]
        command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        try:
            done = subprocess.run([*command, f"{host.user}@{host.address}", asked], capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise ProvisioningError(f"`{asked}` on the host {host.id} was not done within {seconds:.0f} s") from error
    if done.returncode == _NO_SESSION:
        said = done.stderr.strip()
        raise ProvisioningError(f"the host {host.id} does not let us in at {host.user}@{host.address} port {host.port}: {said}")
    return done
