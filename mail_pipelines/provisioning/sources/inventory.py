"""A list of bare hosts that somebody owns: the next free one is taken, and given back by being free again.

Which are taken the database knows, by the id that a server's row has from its reservation on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mail_pipelines.provisioning.interfaces import Host, NoHost, Order, ProvisioningError


@dataclass(frozen=True)
class Inventory:
    name: str
    hosts: Sequence[Host]
    cost_per_hour: float = 0.0
    most: int | None = None
    warm: bool = False
    curve: str = "normal"
    kind: str = "exim"
    reused: bool = True

    def reserve(self, taken: Collection[str]) -> str:
        for host in self.hosts:
            if host.id not in taken:
                return host.id
        raise NoHost(f"all {len(self.hosts)} hosts of {self.name} are taken, or have failed lately")

    def create(self, order: Order) -> Host:
        found = self.find(order)
        if found is None:
            raise ProvisioningError(f"the host {order.reserved} is not in {self.name} any more")
        return found

    def find(self, order: Order) -> Host | None:
        return next((host for host in self.hosts if host.id == order.reserved), None)

    def delete(self, order: Order, host_id: str) -> None:
        """It stays where it is, and is free from now on."""
