"""A machine of its own, with systemd and a network address: namespaces of the kernel over the tree that `script/machine` makes.

All that a machine changes is in memory, and ends with its first process. Nothing of it can be seen in this machine's mounts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.parts.hosts import Host
from tests.parts.processes import wait_for

# Arguments: the tree, a folder of files to put over it, this machine's folder for control groups, and pairs of a folder and where to show it.
# A folder that is shown can be written to; what is written stays in the machine.
BOOT = r"""
set -eu
tree=$1 files=$2 group=$3
shift 3
mount --make-rprivate /
mount -t tmpfs -o "mode=755,size=$SIZE" machine /mnt
mkdir /mnt/changes /mnt/work /mnt/root /mnt/shown
mount -t overlay -o "lowerdir=$tree,upperdir=/mnt/changes,workdir=/mnt/work" machine /mnt/root
number=0
while [ $# -gt 0 ]; do
  number=$((number + 1))
  mkdir -p "/mnt/root$2" "/mnt/shown/$number/changes" "/mnt/shown/$number/work"
  mount -t overlay -o "lowerdir=$1,upperdir=/mnt/shown/$number/changes,workdir=/mnt/shown/$number/work" shown "/mnt/root$2"
  shift 2
done
cp -a "$files/." /mnt/root/
cd /mnt/root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
mount -t tmpfs -o mode=755 run run
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
# Nodes of its own: systemd changes the modes of those it finds, and those of this machine are not to be touched.
while read -r device major minor; do
  mknod -m 666 "dev/$device" c "$major" "$minor"
done <<DEVICES
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
console 1 3
DEVICES
hostname "$(cat etc/hostname)"
# apt takes its lists for those of today.
touch var/lib/apt/lists
mkdir -p .outside
pivot_root . .outside
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . sh -c \
  'umount -l /.outside && rmdir /.outside && exec /lib/systemd/systemd --unit=multi-user.target --log-target=journal' >/dev/null
"""
# Into a control group of its own, which is then the root of what it sees. This machine's own mounts of control groups are left alone.
ENTER = r"""
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroup2 /mnt
mkdir -p "/mnt/$3"
echo $$ >"/mnt/$3/cgroup.procs"
umount /mnt
exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child sh -c "$BOOT" machine "$@"
"""
LEAVE = 'mount --make-rprivate / && mount -t cgroup2 cgroup2 /mnt && cd /mnt && set -- $1 && { [ ! -d "$1" ] || find "$@" -depth -type d -exec rmdir {} +; }'
# What is left when this process has ended and could not do it itself: what runs on its hosts, their networks, and their control groups.
SWEEP = r"""
trap '' INT TERM HUP
read -r word && exit
for place in /run/netns/$1*; do
  [ -e "$place" ] || continue
  ip netns pids "${place##*/}" | xargs --no-run-if-empty kill -s KILL
  ip netns delete "${place##*/}"
done
for try in $(seq 1200); do
  unshare --mount sh -c "$LEAVE" leave "$1*" && exit
  sleep 0.1
done
"""


@dataclass(frozen=True)
class Machine:
    """A running machine; `pid` is that of its first process."""

    name: str
    host: Host
    pid: int

    def run(self, *words: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command there, as root."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "--wd=/", "env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        done = subprocess.run([*enter, *words], input=text, stdin=None if text is not None else subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done


@contextmanager
def swept() -> Iterator[None]:
    """Hosts and machines that are made in this leave nothing behind, even if this process is killed."""
    words = ["sh", "-c", SWEEP, "sweep", f"mail-pipelines-{os.getpid()}-"]
    # It learns of the end by the end of its input, which nobody else can write to.
    sweep = subprocess.Popen(words, env={**os.environ, "LEAVE": LEAVE}, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        sweep.communicate(b"nothing is left\n")


@contextmanager
def machine(name: str, host: Host, tree: Path, files: Path, shown: Mapping[str, Path] | None = None, size: str = "4G") -> Iterator[Machine]:
    """Boot one; `files` are put over its tree, `shown` are places in it with the folders of this machine that are there. Its disk has room for `size`."""
    group = f"mail-pipelines-{os.getpid()}-{name}"
    arguments = [str(tree), str(files), group, *(str(word) for place, shows in (shown or {}).items() for word in (shows, place))]
    words = [*host.run, "unshare", "--mount", "sh", "-c", ENTER, "enter", *arguments]
    process = subprocess.Popen(words, env={**os.environ, "BOOT": BOOT, "SIZE": size}, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or _init(process.pid), what=f"the first process of {name}")
        assert process.poll() is None, f"{name} does not start"
        running = Machine(name, host, _init(process.pid))
        wait_for(lambda: running.run("systemctl", "is-active", "ssh", check=False).stdout == "active\n", what=f"sshd of {name}")
        yield running
    finally:
        # Its first process gets SIGKILL with this one, and everything in it with that.
        process.kill()
        process.wait()
        wait_for(lambda: subprocess.run(["unshare", "--mount", "sh", "-c", LEAVE, "leave", group], capture_output=True, check=False).returncode == 0)


def _init(parent: int) -> int:
    """The one child of `unshare`, when it has become systemd; 0 until then."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    return next((int(child) for child in children if _name(child) == "systemd"), 0)


def _name(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        # One of the commands before it, which has just ended.
        return ""


def environment(venv: Path, place: Path, tree: Path, files: Path) -> None:
    """Put into `files` what makes of this environment one at `place` for the tree's Python: as `script/setup` would have made it there."""
    own = files / str(place.relative_to("/"))
    (own / "bin").mkdir(parents=True)
    for script in (venv / "bin").iterdir():
        if not script.is_symlink() and (text := script.read_bytes()).startswith(b"#!"):
            (own / "bin" / script.name).write_bytes(text.replace(bytes(venv), bytes(place)))
            shutil.copymode(script, own / "bin" / script.name)
    (own / "bin/python").symlink_to("/usr/bin/python3")
    (own / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n", encoding="utf-8")
    (packages,) = (venv / "lib").glob("python3.*/site-packages")
    version = subprocess.run(
        ["chroot", str(tree), "python3", "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True, check=True
    )
    python = version.stdout.strip()
    assert packages.parent.name == f"python{python.rpartition('.')[0]}", f"the tests run on {packages.parent.name}, and the machine has Python {python}"
    (editable,) = packages.glob("*mail_pipelines*.pth")
    other = own / editable.relative_to(venv)
    other.parent.mkdir(parents=True)
    other.write_text(f"{place.parent}\n", encoding="utf-8")
    stamp = (venv / ".setup").read_text(encoding="utf-8").split(" ", 2)[2]
    (own / ".setup").write_text(f"{place.parent} {python} {stamp}", encoding="utf-8")
