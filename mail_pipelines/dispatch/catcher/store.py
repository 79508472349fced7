"""What a catcher has taken: one append-only file for each life of the process, a JSON header line before each message.

A message counts as taken when its record is complete, so a record torn by a kill is at the end of its file and is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kept:
    """One message as it arrived. `at` is epoch seconds, `permit` the name in the greeting, `peer` the address it came from.

    `file` and `offset` say where its bytes begin, `size` how many.
    """

    at: float
    token: str
    permit: str
    sender: str
    recipient: str
    size: int
    peer: str = ""
    file: str = ""
    offset: int = 0

    def data(self) -> bytes:
        with Path(self.file).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Store:
    """The messages a running catcher keeps in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"{time.time_ns()}-{os.getpid()}.mail", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def keep(self, *, token: str, permit: str, sender: str, recipient: str, data: bytes, peer: str = "") -> bool:
        """Write one message; false, with nothing left behind, if there is no space for it."""
        header = Kept(time.time(), token, permit, sender, recipient, len(data), peer)
        fields = {name: value for name, value in asdict(header).items() if name not in ("file", "offset")}
        record = json.dumps(fields).encode() + b"\n" + data + b"\n"
        before = os.fstat(self._file).st_size
        try:
            whole = os.write(self._file, record) == len(record)
        except OSError:
            whole = False
        if not whole:
            os.ftruncate(self._file, before)
        return whole

    def close(self) -> None:
        os.close(self._file)


def kept(folder: Path) -> Iterator[Kept]:
    """All messages below `folder`, file by file in order of arrival."""
    for path in sorted(folder.glob("**/*.mail")):
        with path.open("rb") as file:
            size = path.stat().st_size
            while header := file.readline():
                if not header.endswith(b"\n"):
                    break
                fields = json.loads(header)
                offset = file.tell()
                if offset + fields["size"] + 1 > size:
                    break
                yield Kept(**fields, file=str(path), offset=offset)
                file.seek(offset + fields["size"] + 1)
