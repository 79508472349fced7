"""The file of host sources: TOML, in the order in which they are used.

What belongs here: the form of the file. What does not: what a source does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from mail_pipelines.capacity.warm_up_rules import WarmUpError, rules
from mail_pipelines.config import Settings
from mail_pipelines.keys import check_key
from mail_pipelines.provisioning.interfaces import Host, HostSource, ProvisioningError
from mail_pipelines.provisioning.sources.catchers import Catchers
from mail_pipelines.provisioning.sources.command import Command
from mail_pipelines.provisioning.sources.inventory import Inventory


class HostsError(ProvisioningError):
    """The file of host sources cannot be used; the message says what to change."""


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def _known(curve: str | None) -> str | None:
    if curve is None:
        return None
    try:
        return rules().curve(curve).name
    except WarmUpError as error:
        raise ValueError(str(error)) from error


class _Host(_Table):
    address: str
    host_key: str
    user: str = "root"
    key_file: str
    port: int = pydantic.Field(default=22, ge=1, le=65535)


class _Source(_Table):
    name: Annotated[str, pydantic.AfterValidator(lambda name: check_key(name, "name of a host source"))]
    cost_per_hour: float = pydantic.Field(default=0, ge=0)
    most: int | None = pydantic.Field(default=None, ge=0)
    warm: bool = False
    # Of addresses that are warm none, unless one is named.
    curve: Annotated[str | None, pydantic.AfterValidator(_known)] = None


class _Inventory(_Source):
    kind: Literal["inventory"]
    hosts: list[_Host]


class _Command(_Source):
    kind: Literal["command"]
    command: list[str] = pydantic.Field(min_length=1)
    user: str = "root"
    key_file: str
    seconds: float = pydantic.Field(default=600, gt=0)


class _Catchers(_Source):
    kind: Literal["catcher"]
    warm: bool = True


class _File(_Table):
    source: list[Annotated[_Inventory | _Command | _Catchers, pydantic.Field(discriminator="kind")]] = []
    variables: dict[str, Any] = {}


@dataclass(frozen=True)
class Hosts:
    """`variables` are the operator's own for the playbook, such as the names of broker and database."""

    sources: Sequence[HostSource] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


def read(settings: Settings) -> Hosts:
    """What the file has; nothing if there is no file. Raises `HostsError`."""
    path = Path(settings.provisioning.hosts)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Hosts()
    except OSError as error:
        raise HostsError(f"{path} cannot be read: {error.strerror}") from error
    try:
        document = _File.model_validate(tomllib.loads(text.replace("{home}", str(settings.home))))
    except tomllib.TOMLDecodeError as error:
        raise HostsError(f"{path} is not valid TOML: {error}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise HostsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']} (docs/provisioning.md)") from None
    names = [source.name for source in document.source]
    if len(set(names)) < len(names):
        raise HostsError(f"{path}: two sources have the same name; give each its own")
    return Hosts([_made(source, settings) for source in document.source], document.variables)


def _made(source: _Inventory | _Command | _Catchers, settings: Settings) -> HostSource:
    name, cost, most, warm = source.name, source.cost_per_hour, source.most, source.warm
    curve = source.curve or ("" if warm else "normal")
    match source:
        case _Inventory():
            hosts = [Host(f"{host.address}:{host.port}", host.address, host.host_key, host.user, host.key_file, host.port) for host in source.hosts]
            return Inventory(name, hosts, cost, most, warm, curve)
        case _Command():
            return Command(name, source.command, source.user, source.key_file, cost, most, warm, curve, source.seconds)
        case _Catchers():
            return Catchers(name, settings.home / "hosts", Path(settings.server.run_folder), cost, most, warm, curve)
