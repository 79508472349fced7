"""All tables of the central database, as SQLAlchemy 2 models.

The ledger (`deliveries`) and the event tables carry no foreign keys: on MySQL/MariaDB they are range partitioned,
the ledger by blocks of campaign ids and the events by month (`database.partitions`), and partitioned tables
cannot have any. Times are UTC; `*_at` columns are `UtcDateTime`.
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mail_pipelines.database.types import BigId, Blob, EnhancedCode, Hash16, LongText, OrZero, TinyInt, UtcDateTime, ascii_string, byte_string

KEY_LENGTH = 64
# The row of the pool `default`, which every installation has.
DEFAULT_POOL = 1
MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class State(enum.IntEnum):
    """Where one recipient of a frozen audience stands (`delivery.transitions` has the moves between them)."""

    PENDING = 0
    # With a server, perhaps in a queue of its Exim. (2 was once meant for that.)
    CLAIMED = 1
    DEFERRED = 3
    UNKNOWN = 4
    DELIVERED = 10
    BOUNCED = 11
    SUPPRESSED = 12
    EXPIRED = 13
    CANCELLED = 14
    UNRESOLVED = 15

    @property
    def is_final(self) -> bool:
        return self >= State.DELIVERED


OPEN_STATES = tuple(state for state in State if not state.is_final)
# States of servers that send (`dispatch.registry.ServerState` has all of them).
SENDING_STATES = ("active", "warming")


# --- people -----------------------------------------------------------------------------------------------------


class Contact(Base):
    """One person's address with typed fields. `address` is the normalised form, `email` what was given."""

    __tablename__ = "contacts"
    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    email: Mapped[str] = mapped_column(sa.String(254))
    address: Mapped[str] = mapped_column(sa.String(254))
    address_hash: Mapped[bytes] = mapped_column(Hash16)
    domain: Mapped[str] = mapped_column(ascii_string(253))
    provider: Mapped[str] = mapped_column(ascii_string(32))
    time_zone: Mapped[str | None] = mapped_column(ascii_string(48))
    attributes: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    consent: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    tracking_allowed: Mapped[bool] = mapped_column(sa.Boolean, default=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.UniqueConstraint("address_hash"), sa.Index(None, "domain"), MYSQL)


class Field(Base):
    """A typed custom field of contacts. `type` is text, number, boolean, date or datetime."""

    __tablename__ = "fields"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    label: Mapped[str] = mapped_column(sa.String(200))
    type: Mapped[str] = mapped_column(ascii_string(16))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class Brand(Base):
    """A name the company mails under; suppressions may be limited to one brand."""

    __tablename__ = "brands"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    postal_address: Mapped[str] = mapped_column(sa.String(500), default="")
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class ContactList(Base):
    """A list contacts subscribe to."""

    __tablename__ = "lists"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    brand_id: Mapped[int] = mapped_column(sa.ForeignKey("brands.id"))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class Subscription(Base):
    """Membership of a contact in a list. Once `subscribed` is false no import sets it again: only the contact's own act does."""

    __tablename__ = "subscriptions"
    contact_id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)
    list_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    subscribed: Mapped[bool] = mapped_column(sa.Boolean)
    source: Mapped[str] = mapped_column(ascii_string(32))
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "list_id", "subscribed"), MYSQL)


class Suppression(Base):
    """An address or a domain that must not be mailed. `scope_kind` is all, brand or list; `scope_id` its id (0 for all).

    Exactly one of `address_hash` and `domain` is set. The address itself is not kept, so a suppression outlives erasure.
    `reason` is unsubscribe, complaint, bounce, erased or manual.
    """

    __tablename__ = "suppressions"
    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    address_hash: Mapped[bytes | None] = mapped_column(Hash16)
    domain: Mapped[str | None] = mapped_column(ascii_string(253))
    scope_kind: Mapped[str] = mapped_column(ascii_string(8))
    scope_id: Mapped[int] = mapped_column(sa.Integer)
    reason: Mapped[str] = mapped_column(ascii_string(32))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (
        sa.UniqueConstraint("address_hash", "scope_kind", "scope_id"),
        sa.UniqueConstraint("domain", "scope_kind", "scope_id"),
        MYSQL,
    )


class ContactChange(Base):
    """Change feed of everything a contact snapshot holds, written in the transaction of the change. `op` is upsert or delete.

    Old ones go, but the newest row always stays: SQLite numbers the next one by it.
    """

    __tablename__ = "contact_changes"
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    op: Mapped[str] = mapped_column(ascii_string(8))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "created_at"), MYSQL)


class Segment(Base):
    """Saved criteria: `definition` is the tree of `segments.criteria`."""

    __tablename__ = "segments"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    definition: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


# --- campaigns --------------------------------------------------------------------------------------------------


class Campaign(Base):
    """One mailing. `campaigns.states` has the moves between states; a hold (`holds`) stops a campaign in any state."""

    __tablename__ = "campaigns"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    state: Mapped[str] = mapped_column(ascii_string(16))
    brand_id: Mapped[int] = mapped_column(sa.ForeignKey("brands.id"))
    pool_id: Mapped[int] = mapped_column(sa.ForeignKey("pools.id"), nullable=True, default=DEFAULT_POOL)
    # Not a foreign key, which SQLite cannot add to a table.
    overflow_pool_id: Mapped[int | None] = mapped_column(sa.Integer)
    # {"include": [segment keys], "exclude": [segment keys]}
    segments: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    # all, brand, or list (then `unsubscribe_list_id`): what the unsubscribe link ends, and which suppressions count.
    unsubscribe: Mapped[str] = mapped_column(ascii_string(8))
    unsubscribe_list_id: Mapped[int | None] = mapped_column(sa.ForeignKey("lists.id"))
    on_unknown: Mapped[str] = mapped_column(ascii_string(8))
    # 0 low, 1 normal, 2 high, 3 urgent
    priority: Mapped[int] = mapped_column(TinyInt)
    start_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    finish_by: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    expire_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    # The document of `campaigns.send_window`; and the epoch second up to which rows of windows that closed have been put off.
    send_window: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    windows_kept: Mapped[int | None] = mapped_column(sa.BigInteger)
    version_id: Mapped[int | None] = mapped_column(sa.Integer)
    # Set by the freeze: number of shards in use, manifest (file name, sha256, rows, snapshot versions), counts by reason.
    shards: Mapped[int | None] = mapped_column(TinyInt)
    audience_manifest: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    audience_counts: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    # {table: [files]} as `delivery.ledger_archive` wrote and verified them; rows go after this is set, and `archived_at` is when all were gone.
    archive: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    archived_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "state", "start_at"), MYSQL)


class WindowSpan(Base):
    """When a campaign with a send window may be sent to recipients of a time zone, in epoch seconds; "" is the zone of those who have none.

    The last span of each zone has no length: it is the campaign's end (`dispatch.windows`).
    """

    __tablename__ = "window_spans"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    time_zone: Mapped[str] = mapped_column(ascii_string(48), primary_key=True)
    opens_at: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    closes_at: Mapped[int] = mapped_column(sa.BigInteger)
    __table_args__ = (MYSQL,)


class WindowRows(Base):
    """How many rows of a campaign were put off until a span opens, or were there in it from the start. Claims do not take off what they send."""

    __tablename__ = "window_rows"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    time_zone: Mapped[str] = mapped_column(ascii_string(48), primary_key=True)
    opens_at: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    count: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


class CampaignVersion(Base):
    """Immutable content of a campaign. `source` is what was written, `compiled` what servers fill in per recipient."""

    __tablename__ = "campaign_versions"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    campaign_id: Mapped[int] = mapped_column(sa.ForeignKey("campaigns.id"))
    number: Mapped[int] = mapped_column(sa.Integer)
    source: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    sha256: Mapped[str] = mapped_column(ascii_string(64))
    compiled: Mapped[bytes] = mapped_column(Blob)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.UniqueConstraint("campaign_id", "number"), MYSQL)


class Link(Base):
    """A link of a campaign's content. Ids are global and never reused, so a token in old mail keeps its meaning."""

    __tablename__ = "links"
    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    campaign_id: Mapped[int] = mapped_column(sa.ForeignKey("campaigns.id"))
    url: Mapped[str] = mapped_column(LongText)
    url_sha256: Mapped[str] = mapped_column(ascii_string(64))
    __table_args__ = (sa.UniqueConstraint("campaign_id", "url_sha256"), MYSQL)


class Variant(Base):
    """A weighted alternative content of a campaign (split test)."""

    __tablename__ = "variants"
    campaign_id: Mapped[int] = mapped_column(sa.ForeignKey("campaigns.id"), primary_key=True)
    number: Mapped[int] = mapped_column(TinyInt, primary_key=True, autoincrement=False)
    weight: Mapped[int] = mapped_column(sa.Integer)
    version_id: Mapped[int] = mapped_column(sa.ForeignKey("campaign_versions.id"))
    __table_args__ = (MYSQL,)


# --- sending domains --------------------------------------------------------------------------------------------


class SendingDomain(Base):
    """A domain of From addresses. Its return path takes bounces, its tracking domain is in links; all in A-labels.

    `findings` is what the last look at the DNS found (`domains.checking`), `ready` whether that lets campaigns start.
    """

    __tablename__ = "sending_domains"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    domain: Mapped[str] = mapped_column(ascii_string(253), unique=True)
    return_path_domain: Mapped[str] = mapped_column(ascii_string(253))
    tracking_domain: Mapped[str] = mapped_column(ascii_string(253))
    ready: Mapped[bool] = mapped_column(sa.Boolean, default=False)
    findings: Mapped[list[dict[str, Any]] | None] = mapped_column(sa.JSON(none_as_null=True))
    checked_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class DkimKey(Base):
    """A DKIM key of a domain, published under its selector. `server_id` 0 means every server that has no key of its own.

    `private_key` is sealed (`domains.keys`), and gone once the key is retired. `public_key` is the value of p= in the DNS.
    """

    __tablename__ = "dkim_keys"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    domain_id: Mapped[int] = mapped_column(sa.ForeignKey("sending_domains.id"))
    selector: Mapped[str] = mapped_column(ascii_string(63))
    server_id: Mapped[int] = mapped_column(sa.Integer, default=0)
    # waiting, active, retired
    state: Mapped[str] = mapped_column(ascii_string(16))
    public_key: Mapped[str] = mapped_column(ascii_string(1024))
    private_key: Mapped[bytes | None] = mapped_column(Blob)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    retired_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (sa.UniqueConstraint("domain_id", "selector"), MYSQL)


# --- servers and limits -----------------------------------------------------------------------------------------


class Pool(Base):
    """A group of servers; a campaign sends only through its pool, or its overflow pool (`capacity.pools`)."""

    __tablename__ = "pools"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    # Not used: campaigns name their own. SQLite could drop it only with the whole table.
    overflow_pool_id: Mapped[int | None] = mapped_column(sa.ForeignKey("pools.id"))
    __table_args__ = (MYSQL,)


class Server(Base):
    """A dispatch server: one sending address. The heartbeat is a compare-and-swap on (`incarnation`, `heartbeat_token`)."""

    __tablename__ = "servers"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    # catcher or exim: which journal its log is.
    kind: Mapped[str] = mapped_column(ascii_string(16))
    pool_id: Mapped[int] = mapped_column(sa.ForeignKey("pools.id"), nullable=True, default=DEFAULT_POOL)
    # Of `dispatch.registry.ServerState`.
    state: Mapped[str] = mapped_column(ascii_string(16))
    host: Mapped[str] = mapped_column(sa.String(253))
    port: Mapped[int] = mapped_column(sa.Integer)
    incarnation: Mapped[str | None] = mapped_column(ascii_string(36))
    boot_id: Mapped[str | None] = mapped_column(ascii_string(36))
    heartbeat_token: Mapped[str | None] = mapped_column(ascii_string(36))
    heartbeat_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    health: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    # The account of MySQL/MariaDB that is this server (`database.boundary`). Without it no account is.
    account: Mapped[str | None] = mapped_column(ascii_string(32))
    __table_args__ = (sa.Index(None, "account", unique=True), MYSQL)


class ProviderLimit(Base):
    """What a server may send to a provider. `server_id` 0 holds the defaults; NULL means no limit."""

    __tablename__ = "provider_limits"
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    mode: Mapped[str] = mapped_column(ascii_string(12))
    connections: Mapped[int] = mapped_column(sa.Integer)
    per_second: Mapped[float] = mapped_column(sa.Double)
    per_hour: Mapped[int | None] = mapped_column(sa.Integer)
    per_day: Mapped[int | None] = mapped_column(sa.Integer)
    messages_per_connection: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


class ProviderUsage(Base):
    """Messages a server has debited to a provider in one window: `window_seconds` is 900, 3600 or 86400; `window_start` epoch seconds."""

    __tablename__ = "provider_usage"
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    window_seconds: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    window_start: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    used: Mapped[int] = mapped_column(sa.Integer, default=0)
    __table_args__ = (MYSQL,)


class Allotment(Base):
    """Messages of a campaign a server may send to a provider in a slot of 15 minutes. Planning writes `granted`, claims write `used`.

    `planned` is the part of the grant that the plan `plan_epoch` meant for it; the rest is what that plan left (`capacity.allotments`).
    """

    __tablename__ = "allotments"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    slot_start: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    granted: Mapped[int] = mapped_column(sa.Integer)
    used: Mapped[int] = mapped_column(sa.Integer, default=0)
    planned: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    plan_epoch: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    __table_args__ = (sa.Index(None, "slot_start"), MYSQL)


class Breaker(Base):
    """Whether a server may send to a provider that refused it: `capacity.breakers` has the states. No row: closed, and never was open."""

    __tablename__ = "breakers"
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    state: Mapped[str] = mapped_column(ascii_string(8))
    # The rule that opened it, in `breakers.toml`, and what had been counted.
    rule: Mapped[str] = mapped_column(ascii_string(24))
    reason: Mapped[str] = mapped_column(sa.String(200))
    # How often it has opened without being forgotten: the wait doubles with it.
    trips: Mapped[int] = mapped_column(sa.Integer)
    until: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    # Answers of the minute of the last change that came before it: state and class → count.
    baseline: Mapped[dict[str, int]] = mapped_column(sa.JSON)
    __table_args__ = (MYSQL,)


class WarmUp(Base):
    """How far a server's warm-up towards a provider is (`capacity.warm_up`); `*` stands for the providers without a row. No rows: there is no warm-up.

    Claims take no more than `per_day` messages a day; NULL is the end of the curve. `judged` and `last_used` are days, as the first second of their window.
    """

    __tablename__ = "warm_ups"
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    curve: Mapped[str] = mapped_column(ascii_string(32))
    step: Mapped[int] = mapped_column(sa.Integer)
    per_day: Mapped[int | None] = mapped_column(sa.Integer)
    # The newest day that has been judged, and the newest with mail.
    judged: Mapped[int] = mapped_column(sa.BigInteger)
    last_used: Mapped[int | None] = mapped_column(sa.BigInteger)
    # Why it is at this step.
    reason: Mapped[str] = mapped_column(sa.String(200))
    __table_args__ = (MYSQL,)


class WarmUpDay(Base):
    """A day of a warm-up that was judged: its step and cap, what was sent and answered, and what came of it. Days without mail and complaints are left out."""

    __tablename__ = "warm_up_days"
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    day: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(sa.Integer)
    per_day: Mapped[int | None] = mapped_column(sa.Integer)
    sent: Mapped[int] = mapped_column(sa.Integer)
    delivered: Mapped[int] = mapped_column(sa.Integer)
    bounced: Mapped[int] = mapped_column(sa.Integer)
    deferred: Mapped[int] = mapped_column(sa.Integer)
    complaints: Mapped[int] = mapped_column(sa.Integer)
    # Of `capacity.warm_up_rules.Verdict`.
    verdict: Mapped[str] = mapped_column(ascii_string(8))
    why: Mapped[str] = mapped_column(sa.String(200))
    __table_args__ = (MYSQL,)


class Reputation(Base):
    """What a mailbox provider tells of a sending domain or an address of ours, day by day (`reputation.readings`). NULL: it does not tell.

    `source` is google_postmaster or microsoft_snds; `day` is the first second of the day by the provider's calendar, as if that were UTC. `spam_rate` and
    `delivery_errors` are parts of 1. `details` has what decides nothing. `changed_at` is when the reading came to be what it is.
    """

    __tablename__ = "reputation"
    source: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    subject: Mapped[str] = mapped_column(ascii_string(253), primary_key=True)
    day: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    spam_rate: Mapped[float | None] = mapped_column(sa.Double)
    delivery_errors: Mapped[float | None] = mapped_column(sa.Double)
    messages: Mapped[int | None] = mapped_column(sa.BigInteger)
    # GREEN, YELLOW or RED.
    filter_result: Mapped[str | None] = mapped_column(ascii_string(8))
    trap_hits: Mapped[int | None] = mapped_column(sa.Integer)
    details: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "day"), MYSQL)


class DomainBreaker(Base):
    """Whether mail of a sending domain may go to a provider whose users report too much of it as spam: `capacity.domain_breakers` has the states.

    No row: closed, and never was open. `day` is the newest day (as in `reputation`) that does not count any more.
    """

    __tablename__ = "domain_breakers"
    domain: Mapped[str] = mapped_column(ascii_string(253), primary_key=True)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    state: Mapped[str] = mapped_column(ascii_string(8))
    reason: Mapped[str] = mapped_column(sa.String(200))
    trips: Mapped[int] = mapped_column(sa.Integer)
    until: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    day: Mapped[int] = mapped_column(sa.BigInteger)
    __table_args__ = (MYSQL,)


class DomainHealth(Base):
    """Recipient domains that do not answer: rows of a dead domain are deferred without an attempt until `dead_until` (`delivery.domain_health`).

    `failures` in a row without an answer; `changed_at` is when the last of them was recorded. No row: nothing is known against the domain.
    """

    __tablename__ = "domain_health"
    domain: Mapped[str] = mapped_column(ascii_string(253), primary_key=True)
    dead_until: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    failures: Mapped[int] = mapped_column(sa.Integer)
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


# --- sending ----------------------------------------------------------------------------------------------------


class Hold(Base):
    """What is stopped until it is released (`dispatch.holds`). Released holds stay, as the record of who decided what and when.

    `scope_kind` is everything, brand, campaign, pool, server or provider; `scope_id` is 0 for everything and a provider, `provider` empty for all others.
    """

    __tablename__ = "holds"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    scope_kind: Mapped[str] = mapped_column(ascii_string(10))
    scope_id: Mapped[int] = mapped_column(sa.Integer)
    provider: Mapped[str] = mapped_column(ascii_string(32))
    reason: Mapped[str] = mapped_column(sa.String(500))
    by_whom: Mapped[str] = mapped_column(sa.String(100))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    released_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    released_by: Mapped[str | None] = mapped_column(sa.String(100))
    # A claim looks for holds that are not released, of which there is hardly ever one.
    __table_args__ = (sa.Index(None, "released_at"), MYSQL)


class Claim(Base):
    """Rows of the ledger leased to one send run. `id` is random, so it is never reused after a restore.

    `journal_*` is the place in the server's log after the claim's marker line; `lease_until` is database time.
    `state` is open, settling or closed.
    """

    __tablename__ = "claims"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    campaign_id: Mapped[int] = mapped_column(sa.Integer)
    shard: Mapped[int] = mapped_column(TinyInt)
    provider: Mapped[str] = mapped_column(ascii_string(32))
    server_id: Mapped[int] = mapped_column(sa.Integer)
    run_id: Mapped[str] = mapped_column(ascii_string(36))
    size: Mapped[int] = mapped_column(sa.Integer)
    state: Mapped[str] = mapped_column(ascii_string(8))
    incarnation: Mapped[str] = mapped_column(ascii_string(36))
    boot_id: Mapped[str] = mapped_column(ascii_string(36))
    journal_inode: Mapped[int] = mapped_column(sa.BigInteger)
    journal_offset: Mapped[int] = mapped_column(sa.BigInteger)
    opened_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    lease_until: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    closed_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "server_id", "state"), sa.Index(None, "state", "lease_until"), sa.Index(None, "campaign_id", "state"), MYSQL)


class Delivery(Base):
    """The ledger: one small row for each recipient of a frozen audience.

    `sort_key` is the place of a pending row in the order of sending (`segments.ranks`), the due second of a deferred one, and in
    every other state the second in which that state was reached. `attempt` counts offers: it rises only on an explicit
    refusal, so a retry after silence carries the same Message-ID. `code` and `enhanced` are the destination's reply.
    `server_id` is the server of the last claim, for which a greylisted row waits (`dispatch.greylisting`).
    A row that is to wait is a deferred one, whose due second counters and index know. `not_before` of a pending row only claims
    know, so sessions would ask for it in vain again and again: nothing sets it.
    """

    __tablename__ = "deliveries"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    address_hash: Mapped[bytes] = mapped_column(Hash16)
    shard: Mapped[int] = mapped_column(TinyInt)
    provider: Mapped[str] = mapped_column(ascii_string(32))
    state: Mapped[int] = mapped_column(TinyInt)
    sort_key: Mapped[int] = mapped_column(sa.Integer)
    attempt: Mapped[int] = mapped_column(TinyInt)
    not_before: Mapped[int | None] = mapped_column(sa.Integer)
    claim_id: Mapped[int | None] = mapped_column(OrZero(sa.BigInteger), server_default="0", nullable=False)
    server_id: Mapped[int | None] = mapped_column(OrZero(), server_default="0", nullable=False)
    version_id: Mapped[int | None] = mapped_column(OrZero(), server_default="0", nullable=False)
    variant: Mapped[int] = mapped_column(TinyInt, default=0)
    code: Mapped[int | None] = mapped_column(OrZero(sa.SmallInteger), server_default="0", nullable=False)
    enhanced: Mapped[str | None] = mapped_column(EnhancedCode, server_default="0", nullable=False)
    reason: Mapped[str | None] = mapped_column(ascii_string(24))
    __table_args__ = (
        sa.Index(None, "campaign_id", "shard", "provider", "state", "sort_key"),
        sa.Index(None, "contact_id"),
        sa.UniqueConstraint("campaign_id", "address_hash"),
        MYSQL,
    )


class DeliveryEvent(Base):
    """What a journal, a DSN or a report said about one message. `id` is a digest of where it was read, so reading twice adds nothing."""

    __tablename__ = "delivery_events"
    # Year and month of `occurred_at` as YYYYMM: the partition.
    month: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    occurred_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    server_id: Mapped[int | None] = mapped_column(sa.Integer)
    campaign_id: Mapped[int] = mapped_column(sa.Integer)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(TinyInt)
    # deferred, bounced, unknown, resent: what came of a claim. Later evidence: `delivery.evidence.Kind`.
    kind: Mapped[str] = mapped_column(ascii_string(16))
    code: Mapped[int | None] = mapped_column(sa.SmallInteger)
    enhanced: Mapped[str | None] = mapped_column(ascii_string(11))
    reason: Mapped[str | None] = mapped_column(ascii_string(24))
    # The destination's words with every address masked.
    text: Mapped[str | None] = mapped_column(sa.String(500))
    __table_args__ = (sa.Index(None, "campaign_id", "contact_id"), sa.Index(None, "contact_id"), MYSQL)


class EngagementEvent(Base):
    """What a recipient did: open, click, unsubscribe, complaint. `id` is a digest of the event's source."""

    __tablename__ = "engagement_events"
    month: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    occurred_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    # When this row was written: snapshots read by it, with an overlap for late commits.
    recorded_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    campaign_id: Mapped[int] = mapped_column(sa.Integer)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    kind: Mapped[str] = mapped_column(ascii_string(16))
    link_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    machine: Mapped[bool] = mapped_column(sa.Boolean, default=False)
    __table_args__ = (sa.Index(None, "contact_id"), sa.Index(None, "campaign_id", "kind"), sa.Index(None, "recorded_at"), MYSQL)


class EngagementSum(Base):
    """What is kept of engagement events past their time: how often one recipient did one thing in one campaign, and when first and last.

    An event is either here or in `engagement_events`: the transaction that adds it deletes it there (`delivery.retention`). `link_id` is 0 for no link.
    """

    __tablename__ = "engagement_sums"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(ascii_string(16), primary_key=True)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    link_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    machine: Mapped[bool] = mapped_column(sa.Boolean, primary_key=True, autoincrement=False)
    count: Mapped[int] = mapped_column(sa.Integer)
    first_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    last_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "contact_id"), MYSQL)


class EngagementHour(Base):
    """The same events by the hour in which they occurred (its first epoch second), for a campaign's curves; whose they were is in `engagement_sums`."""

    __tablename__ = "engagement_hours"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    hour: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(ascii_string(16), primary_key=True)
    machine: Mapped[bool] = mapped_column(sa.Boolean, primary_key=True, autoincrement=False)
    count: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


class CampaignCounter(Base):
    """How many rows are in a state, by shard, provider and server; the sum over servers counts.

    Each server adds deltas to its own rows in the transaction of the change (so a row may be negative), and no two
    servers wait for each other. Server 0 is the centre (freeze, expiry, cancel).
    """

    __tablename__ = "campaign_counters"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    shard: Mapped[int] = mapped_column(TinyInt, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    state: Mapped[int] = mapped_column(TinyInt, primary_key=True, autoincrement=False)
    count: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


class CampaignMinute(Base):
    """Outcomes over time: how many rows reached a state in a minute (epoch minutes), by provider, server and reason."""

    __tablename__ = "campaign_minutes"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    minute: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    state: Mapped[int] = mapped_column(TinyInt, primary_key=True, autoincrement=False)
    reason: Mapped[str] = mapped_column(ascii_string(24), primary_key=True)
    count: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


class CampaignFact(Base):
    """How many recipients count for something beside their state: bounced after acceptance, complained, unsubscribed by mail."""

    __tablename__ = "campaign_facts"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    provider: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    kind: Mapped[str] = mapped_column(ascii_string(16), primary_key=True)
    count: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (MYSQL,)


# --- provisioning -----------------------------------------------------------------------------------------------


class Provision(Base):
    """A server that is being made, was made, or is being given back here. `state` and `step` are of `provisioning.states`.

    `key` is the server's name, and the one by which its host is found again at the source. It costs from `ordered_at` until `ended_at`.
    """

    __tablename__ = "provisions"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), unique=True)
    state: Mapped[str] = mapped_column(ascii_string(16))
    # What is to be done next, or is being done since `begun_at`; empty if nothing is.
    step: Mapped[str] = mapped_column(ascii_string(16))
    begun_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    # Failures of this step so far, and why the last one; of a failed server why it is that.
    attempt: Mapped[int] = mapped_column(TinyInt)
    reason: Mapped[str | None] = mapped_column(sa.String(1000))
    # Since when it is in this state, and when there is something to do again.
    state_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    due_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    why: Mapped[str] = mapped_column(sa.String(500))
    # Of one that was in service, why it was given back.
    left_why: Mapped[str | None] = mapped_column(sa.String(500))
    proposal_id: Mapped[int | None] = mapped_column(sa.Integer)
    pool: Mapped[str | None] = mapped_column(ascii_string(KEY_LENGTH))
    source: Mapped[str | None] = mapped_column(ascii_string(KEY_LENGTH))
    # The id of the host at its source, from the moment it is chosen or known.
    host_id: Mapped[str | None] = mapped_column(sa.String(200))
    # When it is registered: a server of its name without that is somebody else's.
    server_id: Mapped[int | None] = mapped_column(sa.Integer)
    # The rest of `provisioning.interfaces.Host`.
    host: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    # Lines of zone files that it waits for.
    records: Mapped[list[str] | None] = mapped_column(sa.JSON(none_as_null=True))
    cost_per_hour: Mapped[float | None] = mapped_column(sa.Double)
    requested_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    ordered_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "ended_at"), MYSQL)


class ProvisionProposal(Base):
    """Servers that would help, for somebody to decide. `state` is open, accepted, superseded or lapsed."""

    __tablename__ = "provision_proposals"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    state: Mapped[str] = mapped_column(ascii_string(16))
    servers: Mapped[int] = mapped_column(sa.Integer)
    pool: Mapped[str | None] = mapped_column(ascii_string(KEY_LENGTH))
    why: Mapped[str] = mapped_column(sa.String(500))
    effect: Mapped[str] = mapped_column(sa.String(500))
    cost_per_month: Mapped[float] = mapped_column(sa.Double)
    made_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    decided_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class SourceSetAside(Base):
    """A host source that is not used any more until somebody says so: its hosts cannot send, or it gives none."""

    __tablename__ = "sources_set_aside"
    name: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), primary_key=True)
    reason: Mapped[str] = mapped_column(sa.String(1000))
    at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


# --- bookkeeping ------------------------------------------------------------------------------------------------


class SyncState(Base):
    """Where a reader stands: snapshot manifests, external sources. One JSON value for each (`source`, `key`)."""

    __tablename__ = "sync_state"
    source: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), primary_key=True)
    key: Mapped[str] = mapped_column(ascii_string(KEY_LENGTH), primary_key=True)
    value: Mapped[Any] = mapped_column(sa.JSON)
    # Compare-and-swap: a writer that read version n may write only n + 1.
    version: Mapped[int] = mapped_column(sa.BigInteger)
    changed_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class SourceContact(Base):
    """A record of an external source that became a contact: by which id it is known there, and which version of it is in.

    `external_id` is the source's own, or the address's hash in hexadecimal if it has none. `changed_at` is the source's time of the version merged at
    `merged_at`, `run` the last run that saw it. `state`: 0 present, 1 missing (the run after a whole reading that did not have it, or had it marked as
    deleted), 2 gone (that was carried out).
    """

    __tablename__ = "source_contacts"
    source: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    external_id: Mapped[str] = mapped_column(byte_string(190), primary_key=True)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    address_hash: Mapped[bytes] = mapped_column(Hash16)
    changed_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    merged_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    run: Mapped[int] = mapped_column(sa.Integer)
    state: Mapped[int] = mapped_column(TinyInt)
    __table_args__ = (sa.Index(None, "contact_id"), sa.Index(None, "source", "state", "run"), MYSQL)


class SyncOutbox(Base):
    """An event that an external source is told, or was: kept until no reading of the feed comes back to it, so that it is not told again.

    `kind` is open, click, bounce, unsubscribe or suppression; `event_id` its number there, which with the kind is the key that the service gets.
    `recorded_at` is when the feed had it. `facts` has what is told besides whose it is, and names no person. `state`: 0 waiting until `due_at`, 1 told (or
    learned from the source itself: a suppression has the contact 0 then), 2 refused (then it has a dead letter, for as long as these are kept). `attempts`
    counts those that failed.
    """

    __tablename__ = "sync_outbox"
    source: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    kind: Mapped[str] = mapped_column(ascii_string(16), primary_key=True)
    event_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    occurred_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    recorded_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    facts: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    state: Mapped[int] = mapped_column(TinyInt)
    attempts: Mapped[int] = mapped_column(sa.Integer)
    due_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "source", "state", "due_at"), sa.Index(None, "contact_id"), MYSQL)


class SyncDeadLetter(Base):
    """An event that an external source refused for good, or failed to take too often: why, after how many attempts, when."""

    __tablename__ = "sync_dead_letters"
    source: Mapped[str] = mapped_column(ascii_string(32), primary_key=True)
    kind: Mapped[str] = mapped_column(ascii_string(16), primary_key=True)
    event_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger)
    reason: Mapped[str] = mapped_column(sa.String(500))
    attempts: Mapped[int] = mapped_column(sa.Integer)
    at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (sa.Index(None, "contact_id"), MYSQL)


class Alert(Base):
    """A cause that operators are told of (`alerts.memory`), also for a while after it is over. `sent`: channel → when it last took word of it."""

    __tablename__ = "alerts"
    key: Mapped[str] = mapped_column(ascii_string(190), primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(1000))
    command: Mapped[str] = mapped_column(sa.String(200))
    first_seen: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    last_seen: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    due_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    sent: Mapped[dict[str, str]] = mapped_column(sa.JSON)
    resolved_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class LedgerGeneration(Base):
    """One row: which life of the ledger this is. Servers that know another one stop, as do those whose software knows only schemas before `oldest_schema`.

    `database_id` is the `server_id` of the MySQL/MariaDB server it was begun on: another one is a copy, which may lack the last seconds.
    """

    __tablename__ = "ledger_generation"
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    generation: Mapped[str] = mapped_column(ascii_string(36))
    oldest_schema: Mapped[str] = mapped_column(ascii_string(8), server_default="")
    database_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class Recovery(Base):
    """The completion of a restored ledger from the servers' logs; `generation` is the life of the ledger that it made."""

    __tablename__ = "recoveries"
    generation: Mapped[str] = mapped_column(ascii_string(36), primary_key=True)
    began_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    __table_args__ = (MYSQL,)


class RecoveryServer(Base):
    """One server's part in a recovery, and what the restored database knew of it: its last heartbeat and life, and the file of its log audited last."""

    __tablename__ = "recovery_servers"
    generation: Mapped[str] = mapped_column(ascii_string(36), primary_key=True)
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    # Of `dispatch.recovery.standing.Part`.
    part: Mapped[str] = mapped_column(ascii_string(12))
    heartbeat_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    incarnation: Mapped[str | None] = mapped_column(ascii_string(36))
    boot_id: Mapped[str | None] = mapped_column(ascii_string(36))
    journal_inode: Mapped[int | None] = mapped_column(sa.BigInteger)
    offers: Mapped[int] = mapped_column(sa.BigInteger)
    note: Mapped[str | None] = mapped_column(sa.String(200))
    __table_args__ = (MYSQL,)


class RecoveredOffer(Base):
    """What a server's log says became of one offer: delivered, bounced, deferred or unknown. Kept as long as a campaign may still need it."""

    __tablename__ = "recovered_offers"
    campaign_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    contact_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(TinyInt, primary_key=True, autoincrement=False)
    server_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    # Of `dispatch.journal.Kind`.
    kind: Mapped[str] = mapped_column(ascii_string(12))
    # The second in which it was logged.
    at: Mapped[int] = mapped_column(sa.Integer)
    code: Mapped[int | None] = mapped_column(sa.SmallInteger)
    enhanced: Mapped[str | None] = mapped_column(ascii_string(11))
    # With every address masked.
    text: Mapped[str | None] = mapped_column(sa.String(500))
    __table_args__ = (MYSQL,)
