"""A broker of files in a folder, for the processes of one host: kombu's, with its two races closed.

kombu makes a message's file first and writes it then, and a worker that looks in between ends with an error; so it is with the files in which
exchanges keep their queues.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override]
        folder = Path(self.data_folder_out)
        # The order of the names is that of the queue.
        name = f"{time.monotonic_ns() // 1_000_000:015}_{uuid.uuid4()}"
        draft = folder / f"{name}.draft"
        draft.write_text(dumps(payload), encoding="utf-8")
        draft.rename(folder / f"{name}.{queue}.msg")

    def get_table(self, exchange: str) -> Any:
        with self._alone():
            return super().get_table(exchange)

    def _queue_bind(self, *arguments: Any) -> None:
        with self._alone():
            super()._queue_bind(*arguments)

    def _delete(self, *arguments: Any, **options: Any) -> None:
        with self._alone():
            super()._delete(*arguments, **options)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (Path(self.control_folder) / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Transport(filesystem.Transport):
    Channel = Channel
