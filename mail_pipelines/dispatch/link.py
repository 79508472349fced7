"""One connection of a lane to the mail server, for claim after claim."""

from __future__ import annotations

from collections.abc import Callable

from mail_pipelines.dispatch.batch import Batch
from mail_pipelines.dispatch.pacer import Slot
from mail_pipelines.dispatch.smtp import Connection, ServerUnreachable


class Link:
    """One connection with the slot that allows it, if it needs one; `renew` replaces the connection and keeps the slot."""

    def __init__(self, slot: Slot | None, connect: Callable[[], Connection]) -> None:
        self._slot = slot
        self._connect = connect
        self.connection = connect()
        # How many messages have been offered on the connection.
        self.offered = 0
        # The claim in which the connection was cut last, if it has not been of use since.
        self.cut: Batch | None = None

    async def greet(self, permit_name: str) -> None:
        """Open the connection if it is not, and greet for a claim. Raises `ServerUnreachable`."""
        if self.connection.is_open:
            try:
                await self.connection.greet(permit_name)
                return
            except ServerUnreachable:
                # The server may have closed it while it was idle.
                await self.renew()
        await self.connection.open()
        await self.connection.greet(permit_name)

    async def renew(self) -> None:
        await self.connection.close()
        self.connection = self._connect()
        self.offered = 0

    async def close(self) -> None:
        await self.connection.close()
        if self._slot is not None:
            self._slot.free()
