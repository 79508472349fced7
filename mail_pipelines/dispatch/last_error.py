"""The last reason why something on a server failed: kept beside its log by sessions and settlers, and told by its heartbeat."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, replace_file
from mail_pipelines.errors import MailPipelinesError

_LONGEST = 300


def keep(folders: ServerFolders, what: str, error: BaseException | str) -> None:
    """Keep why `what` failed. Of an error that is not ours only the type: its text may name anybody."""
    text = str(error) if isinstance(error, str | MailPipelinesError) else type(error).__name__
    value = {"at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "what": what, "text": mask_addresses(text)[:_LONGEST]}
    try:
        replace_file(folders.last_error, json.dumps(value), durable=False)
    except DispatchError:
        # The disk is full, perhaps, and that is what failed; the failure itself goes on.
        return


def read(folders: ServerFolders) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(folders.last_error.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found
