"""One Exim of its own: its configuration, its folders, and its processes from start to end.

What belongs here: everything about running Exim, with nothing else of the system's mail set-up touched. What does not: who
speaks for the server in the database (`exim.process`), and what Exim's log means (`exim.log`).

Started by root, Exim runs as the user it was built for; started by any other user, as that one. Either way it needs no root to work.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from mail_pipelines.config import project_folder
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, replace_file

# Exim itself waits 60 s for the reply to a final dot: a process that still lives after this is stuck.
STOP_SECONDS = 75.0
_POLL_SECONDS = 0.05
_LEFT_SECONDS = 3600.0
# As docs/exim.md says.
OLDEST = (4, 96)
_PLAIN = re.compile(r"[\w./:;\[\]@ -]+", re.ASCII)


class EximError(DispatchError):
    """Exim cannot be set up or does not run."""


@dataclass(frozen=True)
class Account:
    """The user and group that Exim's processes run as."""

    user: str
    uid: int
    group: str
    gid: int


# Ports with what holds for the connections that come in there.
Table = Mapping[int, str]


class Exim(Protocol):
    """What it takes to run one Exim: `Instance` is the dispatch server, `inbound.receiver.Receiver` the host that takes bounces."""

    @property
    def binary(self) -> str: ...

    @property
    def account(self) -> Account: ...

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the daemon beside those that every one gets."""

    @property
    def template(self) -> str:
        """The file of `infra/exim` that follows the macros."""

    @property
    def macros(self) -> Mapping[str, str | Table]:
        """By name a value, or one for each port that is listened on."""

    @property
    def configuration(self) -> Path:
        """Where the whole configuration is written; its folder also holds what names the running processes."""

    @property
    def spool(self) -> Path: ...

    @property
    def log_folder(self) -> Path: ...

    @property
    def needs(self) -> Mapping[Path, int]:
        """The folders that the account has to reach, and for what (`os.access`)."""

    @property
    def remedy(self) -> str:
        """What to say when it does not: which settings to set."""

    def make(self) -> None:
        """Make all folders."""


class Speaker(NamedTuple):
    """A server that sends through an Exim: where it hands over, by which name it greets destinations, and from which address (empty: any)."""

    key: str
    folders: ServerFolders
    address: str
    port: int
    hostname: str
    interface: str = ""


@dataclass(frozen=True)
class Instance:
    """What one Exim needs to know: the macros of `infra/exim/dispatch.conf`.

    `folders` to `hostname`, `key` and `interface` are those of its own server, and `others` share it: which one a message is of says the port at which it
    is handed over. Where there are others each has its own queues, and the log says whose a claim is.

    `destinations` are (address, port) in place of mail exchangers, and `routes` others for the mail of some domains: (domain, (address, port)).
    """

    binary: str
    account: Account
    folders: ServerFolders
    address: str
    port: int
    hostname: str
    destinations: tuple[tuple[str, int], ...] = ()
    routes: tuple[tuple[str, tuple[str, int]], ...] = ()
    key: str = ""
    interface: str = ""
    others: tuple[Speaker, ...] = ()

    @property
    def speakers(self) -> tuple[Speaker, ...]:
        """All servers that send through it."""
        return (Speaker(self.key, self.folders, self.address, self.port, self.hostname, self.interface), *self.others)

    def queue_prefix(self, key: str) -> str:
        """What the names of a server's queues begin with."""
        return f"{key}." if self.others else ""

    @property
    def spool(self) -> Path:
        return spool_of(self.folders)

    @property
    def configuration(self) -> Path:
        return self.folders.run / "exim.conf"

    @property
    def log_folder(self) -> Path:
        return self.folders.log

    @property
    def options(self) -> tuple[str, ...]:
        return ()

    @property
    def template(self) -> str:
        return "dispatch.conf"

    @property
    def macros(self) -> dict[str, str | Table]:
        speakers = self.speakers
        from_address = [speaker for speaker in speakers if speaker.interface]
        values: dict[str, str | Table] = {
            "MP_HOSTNAME": self.hostname,
            "MP_USER": self.account.user,
            "MP_GROUP": self.account.group,
            "MP_ADDRESS": " ; ".join(speaker.address for speaker in speakers),
            "MP_LISTEN": " ; ".join(f"[{speaker.address}]:{speaker.port}" for speaker in speakers),
            "MP_SPOOL": str(self.spool),
            "MP_LOGS": str(self.folders.log),
            "MP_PERMITS": {speaker.port: str(speaker.folders.permits) for speaker in speakers},
            "MP_GATES": {speaker.port: str(speaker.folders.gates) for speaker in speakers},
            "MP_HELOS": {speaker.port: speaker.hostname for speaker in speakers},
            "MP_NAMES": {speaker.port: speaker.key for speaker in speakers if self.others},
            "MP_INTERFACES": {speaker.port: speaker.interface for speaker in from_address},
            # Exim would reach these hosts from whichever address it has.
            "MP_UNREACHED": {speaker.port: "0.0.0.0/0" if ":" in speaker.interface else "::/0" for speaker in from_address},
        }
        if self.destinations:
            values["MP_DESTINATIONS"] = ":".join(f"{address}::{port}" for address, port in self.destinations)
        if self.routes:
            values["MP_ROUTES"] = " ".join(f"{domain} {address}::{port} ;" for domain, (address, port) in self.routes)
        return values

    @property
    def needs(self) -> dict[Path, int]:
        read, write = os.R_OK | os.X_OK, os.W_OK | os.X_OK
        asked = [folder for speaker in self.speakers for folder in (speaker.folders.permits, speaker.folders.gates)]
        return {**dict.fromkeys(asked, read), self.folders.log: write, self.spool: write}

    @property
    def remedy(self) -> str:
        return "set server.run_folder and server.log_folder"

    def make(self) -> None:
        for speaker in self.speakers:
            speaker.folders.make()
        self.spool.mkdir(exist_ok=True)
        for folder in (self.spool / "input", *self.spool.glob("*/input")):
            _clean(folder)


def spool_of(folders: ServerFolders) -> Path:
    return folders.run / "spool"


def find_binary() -> str:
    """The path of Exim's program; raises `EximError` if it is not installed."""
    path = shutil.which("exim4", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or shutil.which("exim", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        raise EximError("Exim is not installed: install the Debian package exim4-daemon-light (its own service is not needed)")
    return path


def version(binary: str) -> str:
    """As in `Exim 4.96`."""
    words = subprocess.run([binary, "-C", "/dev/null", "-bV"], capture_output=True, text=True, check=False).stdout.split()
    return f"Exim {words[2]}" if len(words) > 2 else "Exim"


def is_too_old(version: str) -> bool:
    """Whether an Exim, as `version` calls it, is older than what its configuration and log are written for. One that has no number is not."""
    found = re.search(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST


def queue_length(spool: Path, prefix: str = "") -> int:
    """Messages in the queue, those of each provider's burst with them: one header file each. `prefix`: only in queues whose names begin with it."""
    return sum(1 for folder in ([] if prefix else [spool], spool.glob(f"{prefix}*")) for place in folder for _ in place.glob("input/*-H"))


def account_for(binary: str) -> Account:
    """Who Exim runs as when this process starts it."""
    user = pwd.getpwuid(os.geteuid())
    if user.pw_uid == 0:
        answer = subprocess.run([binary, "-C", "/dev/null", "-bP", "exim_user"], capture_output=True, text=True, check=False).stdout
        name = answer.partition("=")[2].strip()
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            raise EximError(f"{binary} names {name or 'no user'} as the user that it runs as, and there is none of that name") from None
    return Account(user.pw_name, user.pw_uid, grp.getgrgid(user.pw_gid).gr_name, user.pw_gid)


def configure(exim: Exim) -> str:
    """The whole configuration: values as macros, `exim_path`, then the template as it is. Raises `EximError` for a value that Exim would not take as plain."""
    project = project_folder()
    if project is None:
        raise EximError(f"no checkout found, and with it no infra/exim/{exim.template}: run this from the checkout")
    head = []
    for name, given in exim.macros.items():
        for value in [given] if isinstance(given, str) else given.values():
            if not _PLAIN.fullmatch(value) or "MP_" in value:
                raise EximError(f"{name} is {value!r}: expected only letters, digits and any of . / : ; [ ] @ _ - and spaces, and not MP_")
        # A key of digits alone would be the number of a field.
        head.append(f"{name} = {given}" if isinstance(given, str) else " ".join([f"{name} =", *(f'p{port}="{value}"' for port, value in given.items())]))
    # Written out: Exim's own utilities look for this line and understand no macro in it.
    head.append(f"exim_path = {exim.binary}")
    return "\n".join(head) + "\n\n" + (project / "infra/exim" / exim.template).read_text(encoding="utf-8")


def prepare(exim: Exim) -> None:
    """Make folders that Exim can use, and write the configuration. Raises `EximError` if Exim could not reach them or refuses the configuration."""
    exim.make()
    if os.geteuid() == 0:
        os.chown(exim.spool, exim.account.uid, exim.account.gid)
        # Exim makes its logs; what is ours in there stays ours.
        os.chown(exim.log_folder, 0, exim.account.gid)
        exim.log_folder.chmod(0o1775)
        for folder, mode in exim.needs.items():
            if not _may_use(exim.account, folder, mode):
                raise EximError(
                    f"{exim.account.user}, the user that Exim runs as, cannot use {folder}: {exim.remedy} to folders below ones that every user "
                    "may pass (on a real host /run, /var/log, /var/lib), or start this as an ordinary user"
                )
    replace_file(exim.configuration, configure(exim))
    # Processes of the account read it again.
    exim.configuration.chmod(0o644)
    checked = subprocess.run([exim.binary, "-C", str(exim.configuration), "-bV"], capture_output=True, text=True, check=False)
    if checked.returncode:
        raise EximError(f"Exim does not take {exim.configuration}: {(checked.stderr or checked.stdout).strip()[-500:]}")


def _may_use(account: Account, folder: Path, mode: int) -> bool:
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(account.gid)
        os.setuid(account.uid)
        os._exit(not os.access(folder, mode))
    return os.waitpid(child, 0)[1] == 0


def _clean(folder: Path) -> None:
    """Remove messages that killed processes have left: nothing delivers them, and nothing that still lives is that old."""
    for path in folder.glob("*") if folder.exists() else ():
        if path.is_file() and path.stat().st_mtime < time.time() - _LEFT_SECONDS:
            path.unlink(missing_ok=True)


def start(exim: Exim, output: Path) -> subprocess.Popen[bytes]:
    """Start the daemon in the foreground, in a process group that its children and queue runners share. An earlier daemon of this server is ended first."""
    end_earlier(exim)
    with output.open("ab") as file:
        daemon = subprocess.Popen(
            [exim.binary, "-C", str(exim.configuration), "-bdf", *exim.options], stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
    replace_file(_group_file(exim), str(daemon.pid), durable=False)
    return daemon


def stop(group: int, seconds: float = STOP_SECONDS) -> None:
    """End the daemon and its children. One with a message at a destination ends after it has written what became of it; one that takes longer is killed.

    Exim heeds SIGTERM while it waits for a command or reads a body, and not between a body and its outcome: so it is asked again and again.
    Not so in a delivery from the queue, which it would end at any moment. Those end by themselves when their senders' gates close.
    """
    end = time.monotonic() + seconds
    while pids := living(group):
        over = time.monotonic() > end
        for pid in pids:
            if over or not _delivers_from_queue(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if over else signal.SIGTERM)
        time.sleep(_POLL_SECONDS)


def _delivers_from_queue(pid: int) -> bool:
    """Whether this is a queue runner's delivery, or one that a delivery has passed its connection on to."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(word.startswith((b"-qG", b"-MC")) for word in words)


def end_earlier(exim: Exim) -> None:
    """End what an earlier life of this server has left running: after a kill of the process that watched it, the daemon would hold the port."""
    try:
        group = int(_group_file(exim).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return
    if _is_ours(living(group), exim):
        stop(group)


def living(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in (b"Z", b"X"):
            found.append(int(folder.name))
    return found


def _is_ours(pids: Iterable[int], exim: Exim) -> bool:
    """Whether these are processes of this instance, and not others that have got an old number."""
    wanted = str(exim.configuration).encode()
    for pid in pids:
        try:
            if wanted in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False


def _group_file(exim: Exim) -> Path:
    return exim.configuration.with_name("exim.group")
