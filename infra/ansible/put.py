"""Writes files as a role wants them, each in one step: one task for all of them, since a task for each takes longer than the writing.

Standard input: a JSON list of files, each with `path`, `content`, `mode` ("0644"), where it is not root's `owner` and `group`, and where a program takes it
or not `validate`: its words before the name of a file. Says the paths of those that were not so; with the argument --check it writes nothing. It runs on the
host, by that one's Python.
"""

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

for file in json.load(sys.stdin):
    path, content, mode = Path(file["path"]), file["content"].encode(), int(file["mode"], 8)
    owner, group = pwd.getpwnam(file.get("owner", "root")).pw_uid, grp.getgrnam(file.get("group", "root")).gr_gid
    if path.is_file() and not path.is_symlink():
        there = path.stat()
        if (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == (owner, group, mode) and path.read_bytes() == content:
            continue
    print(path)  # noqa: T201
    if sys.argv[1:] == ["--check"]:
        continue
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as written:
        written.write(content)
        os.fchown(descriptor, owner, group)
        os.fchmod(descriptor, mode)
    if "validate" in file and subprocess.run([*file["validate"], new]).returncode != 0:
        Path(new).unlink()
        sys.exit(f"{path} stays as it was: {file['validate'][0]} does not take the new one")
    Path(new).replace(path)
