"""The demo's own home: a folder that nothing else uses, so that each demo may begin with an empty one.

What belongs here: which folder that is, and what the demo takes from the reader's environment. What does not: what is made in the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mail_pipelines import config, up
from mail_pipelines.home import HomeError, checkout
from mail_pipelines.provisioning.sources import catchers

FOLDER = ".mail_pipelines_demo"
MARKER = "demo"
_MARKER_TEXT = "The demo made this folder. The next one deletes everything in it.\n"
# Greylisted recipients are tried again after seconds, not after the quarter of an hour that real destinations want.
SETTINGS = {
    "MAIL_PIPELINES_SENDING__FIRST_RETRY_SECONDS": "6",
    "MAIL_PIPELINES_SENDING__LAST_RETRY_SECONDS": "6",
    "MAIL_PIPELINES_OPERATION__SENSOR_SECONDS": "2",
    "MAIL_PIPELINES_OPERATION__UI_PORT": "0",
}
# What a reader may set as well: none of it leads to a database, a folder or a server.
_TAKEN = ("MAIL_PIPELINES_HOME", "MAIL_PIPELINES_DNS__SERVERS", "MAIL_PIPELINES_OPERATION__UI_HOST", *SETTINGS)


def environment(given: Mapping[str, str], more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The environment of the demo and its children: of the settings only `_TAKEN`, so that the database and all folders are the home's own; and `more`."""
    kept = {name: value for name, value in given.items() if not name.startswith(config.PREFIX) or name in _TAKEN}
    return {**SETTINGS, **kept, **more, "MAIL_PIPELINES_HOME": kept.get("MAIL_PIPELINES_HOME") or str(checkout() / FOLDER)}


def claim(folder: Path) -> None:
    """Mark a new or empty folder as the demo's. Raises `HomeError` for one that holds what no demo has made."""
    marker = folder / MARKER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if marker.is_file():
            return
        if any(folder.iterdir()):
            raise HomeError(
                f"{folder} was not made by the demo, which deletes everything in its home: set MAIL_PIPELINES_HOME to a folder that is new or empty"
            )
        marker.write_text(_MARKER_TEXT, encoding="utf-8")
    except OSError as error:
        raise HomeError(f"{error.filename or folder} cannot be used: {error.strerror}; MAIL_PIPELINES_HOME names the folder to use") from error


def empty(folder: Path) -> None:
    """Delete what an earlier demo left in a claimed folder. Hold the lock of `up`: it stays, as a new file would be another lock."""
    end_servers(folder)
    for entry in folder.iterdir():
        if entry in (folder / MARKER, up.lock(folder)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def end_servers(folder: Path) -> None:
    """End the servers that `provision_server` has made in this home, also those of a demo that was killed."""
    catchers.stop_all(folder / "run")
