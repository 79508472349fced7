"""What a campaign is: the definition an author writes, and the row with what became of it. Values only; `store` reads and writes them."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Any

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.dispatch.holds import Hold
from mail_pipelines.errors import MailPipelinesError

DEFAULT_POOL = "default"
EXPIRES_AFTER = dt.timedelta(hours=48)


class CampaignError(MailPipelinesError):
    """A campaign that does not exist, or cannot be as asked."""


class Priority(enum.IntEnum):
    LOW = 0
    NORMAL = 1
    HIGH = 2
    URGENT = 3


class Unsubscribe(enum.StrEnum):
    """What the unsubscribe link ends, and so which suppressions count: everything, this brand, or one list."""

    ALL = "all"
    BRAND = "brand"
    LIST = "list"


class OnUnknown(enum.StrEnum):
    """What becomes of a message whose outcome nobody recorded: it waits for evidence, or it may be offered again."""

    HOLD = "hold"
    RESEND = "resend"


@dataclass(frozen=True)
class Definition:
    """What the author decides, the content excepted. Brand, pools, list and segments are named by their keys; times are aware.

    `list` is set exactly when `unsubscribe` is list (else `CampaignError`). Without `start_at` the campaign starts when it is scheduled "now".
    """

    name: str
    key: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    brand: str = "default"
    pool: str = DEFAULT_POOL
    overflow_pool: str | None = None
    unsubscribe: Unsubscribe = Unsubscribe.BRAND
    list: str | None = None
    on_unknown: OnUnknown = OnUnknown.HOLD
    priority: Priority = Priority.NORMAL
    start_at: dt.datetime | None = None
    finish_by: dt.datetime | None = None
    expire_at: dt.datetime | None = None
    window: SendWindow | None = None

    def __post_init__(self) -> None:
        if (self.unsubscribe is Unsubscribe.LIST) != (self.list is not None):
            raise CampaignError(f"campaign {self.key}: a list is named exactly when unsubscribe is list, not {self.unsubscribe} with {self.list!r}")


@dataclass(frozen=True)
class Campaign:
    """A campaign as its row says. `brand_id`, `pool_id` and `list_id` are the ids behind the keys of the definition.

    `audience_manifest` is {file, sha256, rows, snapshots} and `audience_counts` {matched, audience, excluded: {reason: n}}, both
    set by the freeze; `shards` is the number of shards in use.
    """

    id: int
    definition: Definition
    state: CampaignState
    # Its own, or one over everything, its brand or its pool.
    hold: Hold | None
    brand_id: int
    pool_id: int
    list_id: int | None
    version_id: int | None
    shards: int | None
    audience_manifest: dict[str, Any] | None
    audience_counts: dict[str, Any] | None
    created_at: dt.datetime
    updated_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    # Where the ledger is since it is no longer (only) in the database: {table: [files]} of `delivery.ledger_archive`.
    archive: dict[str, Any] | None
    archived_at: dt.datetime | None

    @property
    def key(self) -> str:
        return self.definition.key

    @property
    def expires_at(self) -> dt.datetime | None:
        """When open rows become expired: as the author said, else 48 h after the start."""
        start = self.definition.start_at
        return self.definition.expire_at or (start + EXPIRES_AFTER if start else None)
