"""One play of ansible-runner, in a process of its own: `python -P player.py`. Uses nothing of this package.

It gets what to play as JSON on its standard input, and tells as lines of JSON what happens. It is a process of its own because ansible-runner writes
the whole environment of its process into its folder, where passwords would be found; because it ends with its caller, whatever ended that; and because
whatever Ansible leaves behind (workers, masters of SSH connections) becomes its child, and is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# prctl(2): orphans below this process become its children.
_SET_CHILD_SUBREAPER = 36
_PREFIX = "mail-pipelines-play-"
# In memory where there is such a folder; and a short path, since sockets of SSH are in it.
_ROOT = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
_TOLD = ("runner_on_ok", "runner_on_failed", "runner_on_unreachable")


def tell(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def said(result: dict[str, Any]) -> str:
    """Why a task failed: what its module says of it, or the program that the module has run."""
    # Of a loop, the first item that failed.
    one = next((item for item in result.get("results") or () if item.get("failed")), result)
    words = str(one.get("msg") or one.get("censored") or "")
    if words in ("", "non-zero return code"):
        words = ": ".join(filter(None, (words, str(one.get("stderr") or one.get("stdout") or "").strip())))
    return words


def sweep() -> None:
    """Remove what plays have left that were killed."""
    for folder in _ROOT.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not _is_locked(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    try:
        # Just made, and locked in a moment; or parts that a worker has made again after the end.
        if time.time() - path.parent.stat().st_mtime < 60:
            return True
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        # Without a lock, or swept away by another one meanwhile.
        pass
    return False


def children() -> list[int]:
    return [int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text(encoding="ascii").split()]


def end_children() -> None:
    """Kill all that is left below this process; orphans of what is killed come up here, too."""
    while found := children():
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


class Play:
    def __init__(self, given: dict[str, Any], work: Path) -> None:
        self.given, self.work, self.cancelled = given, work, False

    def run(self) -> None:
        import ansible_runner

        signal.signal(signal.SIGTERM, self._cancel)
        (self.work / "known_hosts").write_text(self.given["known_hosts"], encoding="utf-8")
        (self.work / "env").mkdir()
        # How often the end of the time, or of the caller, is looked for (s).
        (self.work / "env/settings").write_text('{"pexpect_timeout": 1}', encoding="utf-8")
        os.environ.update(
            {
                "ANSIBLE_HOME": str(self.work / "home"),
                "HOME": str(self.work),
                "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.work / "c"),
                "ANSIBLE_SSH_ARGS": f"-C -o ControlMaster=auto -o ControlPersist=30s -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes "
                f"-o UserKnownHostsFile={self.work}/known_hosts -o GlobalKnownHostsFile=/dev/null -F /dev/null",
                "ANSIBLE_HOST_KEY_CHECKING": "True",
            }
        )
        result = ansible_runner.run(
            private_data_dir=str(self.work),
            project_dir=self.given["project"],
            playbook=self.given["playbook"],
            inventory=self.given["inventory"],
            quiet=True,
            event_handler=self._heard,
            cancel_callback=self._is_over,
            timeout=self.given["seconds"],
        )
        stats = None if result.stats is None else {name: result.stats[name] for name in ("ok", "changed", "dark", "failures")}
        tell(kind="end", status=result.status, stats=stats)

    def _cancel(self, *_: object) -> None:
        self.cancelled = True

    def _is_over(self) -> bool:
        return self.cancelled or os.getppid() != self.given["caller"]

    def _heard(self, event: dict[str, Any]) -> bool:
        data = event.get("event_data", {})
        try:
            if event["event"] in _TOLD:
                result = data.get("res") or {}
                bad = event["event"] != "runner_on_ok" and not data.get("ignore_errors")
                message = "" if event["event"] == "runner_on_ok" else said(result)
                what = "unreachable" if event["event"].endswith("unreachable") else "failed" if bad else "changed" if result.get("changed") else "ok"
                tell(kind="task", host=data.get("host"), task=data.get("task"), what=what, message=message[:1000], seconds=data.get("duration"))
            if event.get("stdout"):
                tell(kind="output", text=event["stdout"])
        except BrokenPipeError:
            # The caller is gone.
            self.cancelled = True
        # Else the event is not stored, and there are no statistics.
        return True


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sweep()
    work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_ROOT))
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            Play(json.loads(sys.stdin.readline()), work).run()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        finally:
            end_children()
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
