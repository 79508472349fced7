"""First schema: all tables; on MySQL/MariaDB the ledger and the events are range partitioned."""

import datetime as dt

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database import partitions
from mail_pipelines.database.types import BigId, Blob, Hash16, LongText, TinyInt, UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "allotments",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("slot_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("granted", sa.Integer(), nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "server_id", "provider", "slot_start", name=op.f("pk_allotments")),
        **MYSQL,
    )
    op.create_index(op.f("ix_allotments_slot_start"), "allotments", ["slot_start"], unique=False)

    op.create_table(
        "brands",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("postal_address", sa.String(length=500), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_brands")),
        sa.UniqueConstraint("key", name=op.f("uq_brands_key")),
        **MYSQL,
    )
    op.create_table(
        "campaign_counters",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("shard", TinyInt, autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", TinyInt, autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "shard", "provider", "server_id", "state", name=op.f("pk_campaign_counters")),
        **MYSQL,
    )
    op.create_table(
        "campaign_minutes",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("minute", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", TinyInt, autoincrement=False, nullable=False),
        sa.Column("reason", ascii_string(24), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "minute", "provider", "server_id", "state", "reason", name=op.f("pk_campaign_minutes")),
        **MYSQL,
    )
    op.create_table(
        "claims",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("shard", TinyInt, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column("run_id", ascii_string(36), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("state", ascii_string(8), nullable=False),
        sa.Column("incarnation", ascii_string(36), nullable=False),
        sa.Column("boot_id", ascii_string(36), nullable=False),
        sa.Column("journal_inode", sa.BigInteger(), nullable=False),
        sa.Column("journal_offset", sa.BigInteger(), nullable=False),
        sa.Column("opened_at", UtcDateTime(), nullable=False),
        sa.Column("lease_until", UtcDateTime(), nullable=False),
        sa.Column("closed_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_claims")),
        **MYSQL,
    )
    op.create_index(op.f("ix_claims_campaign_id_state"), "claims", ["campaign_id", "state"], unique=False)
    op.create_index(op.f("ix_claims_server_id_state"), "claims", ["server_id", "state"], unique=False)
    op.create_index(op.f("ix_claims_state_lease_until"), "claims", ["state", "lease_until"], unique=False)

    op.create_table(
        "contact_changes",
        sa.Column("seq", BigId, autoincrement=True, nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("op", ascii_string(8), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_contact_changes")),
        **MYSQL,
    )
    op.create_index(op.f("ix_contact_changes_created_at"), "contact_changes", ["created_at"], unique=False)

    op.create_table(
        "contacts",
        sa.Column("id", BigId, autoincrement=True, nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("address", sa.String(length=254), nullable=False),
        sa.Column("address_hash", Hash16, nullable=False),
        sa.Column("domain", ascii_string(253), nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("time_zone", ascii_string(48), nullable=True),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.Column("consent", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("tracking_allowed", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_contacts")),
        sa.UniqueConstraint("address_hash", name=op.f("uq_contacts_address_hash")),
        **MYSQL,
    )
    op.create_index(op.f("ix_contacts_domain"), "contacts", ["domain"], unique=False)

    op.create_table(
        "deliveries",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("contact_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("address_hash", Hash16, nullable=False),
        sa.Column("shard", TinyInt, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("state", TinyInt, nullable=False),
        sa.Column("sort_key", sa.Integer(), nullable=False),
        sa.Column("attempt", TinyInt, nullable=False),
        sa.Column("not_before", sa.Integer(), nullable=True),
        sa.Column("claim_id", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("server_id", sa.Integer(), server_default="0", nullable=False),
        sa.Column("version_id", sa.Integer(), server_default="0", nullable=False),
        sa.Column("variant", TinyInt, nullable=False),
        sa.Column("code", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("enhanced", sa.Integer(), server_default="0", nullable=False),
        sa.Column("reason", ascii_string(24), nullable=True),
        sa.PrimaryKeyConstraint("campaign_id", "contact_id", name=op.f("pk_deliveries")),
        sa.UniqueConstraint("campaign_id", "address_hash", name=op.f("uq_deliveries_campaign_id_address_hash")),
        **MYSQL,
    )
    op.create_index(
        op.f("ix_deliveries_campaign_id_shard_provider_state_sort_key"), "deliveries", ["campaign_id", "shard", "provider", "state", "sort_key"], unique=False
    )
    op.create_index(op.f("ix_deliveries_contact_id"), "deliveries", ["contact_id"], unique=False)

    op.create_table(
        "delivery_events",
        sa.Column("month", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("occurred_at", UtcDateTime(), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=True),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", TinyInt, nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("code", sa.SmallInteger(), nullable=True),
        sa.Column("enhanced", ascii_string(11), nullable=True),
        sa.Column("reason", ascii_string(24), nullable=True),
        sa.Column("text", sa.String(length=500), nullable=True),
        sa.PrimaryKeyConstraint("month", "id", name=op.f("pk_delivery_events")),
        **MYSQL,
    )
    op.create_index(op.f("ix_delivery_events_campaign_id_contact_id"), "delivery_events", ["campaign_id", "contact_id"], unique=False)
    op.create_index(op.f("ix_delivery_events_contact_id"), "delivery_events", ["contact_id"], unique=False)

    op.create_table(
        "domain_health",
        sa.Column("domain", ascii_string(253), nullable=False),
        sa.Column("dead_until", UtcDateTime(), nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("domain", name=op.f("pk_domain_health")),
        **MYSQL,
    )
    op.create_table(
        "engagement_events",
        sa.Column("month", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("occurred_at", UtcDateTime(), nullable=False),
        sa.Column("recorded_at", UtcDateTime(), nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("link_id", sa.BigInteger(), nullable=True),
        sa.Column("machine", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("month", "id", name=op.f("pk_engagement_events")),
        **MYSQL,
    )
    op.create_index(op.f("ix_engagement_events_campaign_id_kind"), "engagement_events", ["campaign_id", "kind"], unique=False)
    op.create_index(op.f("ix_engagement_events_contact_id"), "engagement_events", ["contact_id"], unique=False)
    op.create_index(op.f("ix_engagement_events_recorded_at"), "engagement_events", ["recorded_at"], unique=False)

    op.create_table(
        "fields",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("label", sa.String(length=200), nullable=False),
        sa.Column("type", ascii_string(16), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fields")),
        sa.UniqueConstraint("key", name=op.f("uq_fields_key")),
        **MYSQL,
    )
    op.create_table(
        "ledger_generation",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", ascii_string(36), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_generation")),
        **MYSQL,
    )
    op.create_table(
        "pools",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("overflow_pool_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["overflow_pool_id"], ["pools.id"], name=op.f("fk_pools_overflow_pool_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pools")),
        sa.UniqueConstraint("key", name=op.f("uq_pools_key")),
        **MYSQL,
    )
    op.create_table(
        "provider_limits",
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("mode", ascii_string(12), nullable=False),
        sa.Column("connections", sa.Integer(), nullable=False),
        sa.Column("per_second", sa.Double(), nullable=False),
        sa.Column("per_hour", sa.Integer(), nullable=True),
        sa.Column("per_day", sa.Integer(), nullable=True),
        sa.Column("messages_per_connection", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("server_id", "provider", name=op.f("pk_provider_limits")),
        **MYSQL,
    )
    op.create_table(
        "provider_usage",
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("window_seconds", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("window_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("server_id", "provider", "window_seconds", "window_start", name=op.f("pk_provider_usage")),
        **MYSQL,
    )
    op.create_table(
        "segments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
        sa.UniqueConstraint("key", name=op.f("uq_segments_key")),
        **MYSQL,
    )
    op.create_table(
        "subscriptions",
        sa.Column("contact_id", BigId, autoincrement=False, nullable=False),
        sa.Column("list_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("subscribed", sa.Boolean(), nullable=False),
        sa.Column("source", ascii_string(32), nullable=False),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("contact_id", "list_id", name=op.f("pk_subscriptions")),
        **MYSQL,
    )
    op.create_index(op.f("ix_subscriptions_list_id_subscribed"), "subscriptions", ["list_id", "subscribed"], unique=False)

    op.create_table(
        "suppressions",
        sa.Column("id", BigId, autoincrement=True, nullable=False),
        sa.Column("address_hash", Hash16, nullable=True),
        sa.Column("domain", ascii_string(253), nullable=True),
        sa.Column("scope_kind", ascii_string(8), nullable=False),
        sa.Column("scope_id", sa.Integer(), nullable=False),
        sa.Column("reason", ascii_string(32), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_suppressions")),
        sa.UniqueConstraint("address_hash", "scope_kind", "scope_id", name=op.f("uq_suppressions_address_hash_scope_kind_scope_id")),
        sa.UniqueConstraint("domain", "scope_kind", "scope_id", name=op.f("uq_suppressions_domain_scope_kind_scope_id")),
        **MYSQL,
    )
    op.create_table(
        "sync_state",
        sa.Column("source", ascii_string(64), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("source", "key", name=op.f("pk_sync_state")),
        **MYSQL,
    )
    op.create_table(
        "lists",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("brand_id", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["brand_id"], ["brands.id"], name=op.f("fk_lists_brand_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lists")),
        sa.UniqueConstraint("key", name=op.f("uq_lists_key")),
        **MYSQL,
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("pool_id", sa.Integer(), nullable=True),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("host", sa.String(length=253), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("incarnation", ascii_string(36), nullable=True),
        sa.Column("boot_id", ascii_string(36), nullable=True),
        sa.Column("heartbeat_token", ascii_string(36), nullable=True),
        sa.Column("heartbeat_at", UtcDateTime(), nullable=True),
        sa.Column("health", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["pool_id"], ["pools.id"], name=op.f("fk_servers_pool_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_servers")),
        sa.UniqueConstraint("key", name=op.f("uq_servers_key")),
        **MYSQL,
    )
    op.create_table(
        "campaigns",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("held_reason", sa.String(length=500), nullable=True),
        sa.Column("brand_id", sa.Integer(), nullable=False),
        sa.Column("pool_id", sa.Integer(), nullable=True),
        sa.Column("segments", sa.JSON(), nullable=False),
        sa.Column("unsubscribe", ascii_string(8), nullable=False),
        sa.Column("unsubscribe_list_id", sa.Integer(), nullable=True),
        sa.Column("on_unknown", ascii_string(8), nullable=False),
        sa.Column("priority", TinyInt, nullable=False),
        sa.Column("start_at", UtcDateTime(), nullable=True),
        sa.Column("finish_by", UtcDateTime(), nullable=True),
        sa.Column("expire_at", UtcDateTime(), nullable=True),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("shards", TinyInt, nullable=True),
        sa.Column("audience_manifest", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("audience_counts", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=True),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["brand_id"], ["brands.id"], name=op.f("fk_campaigns_brand_id")),
        sa.ForeignKeyConstraint(["pool_id"], ["pools.id"], name=op.f("fk_campaigns_pool_id")),
        sa.ForeignKeyConstraint(["unsubscribe_list_id"], ["lists.id"], name=op.f("fk_campaigns_unsubscribe_list_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaigns")),
        sa.UniqueConstraint("key", name=op.f("uq_campaigns_key")),
        **MYSQL,
    )
    op.create_index(op.f("ix_campaigns_state_start_at"), "campaigns", ["state", "start_at"], unique=False)

    op.create_table(
        "campaign_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("sha256", ascii_string(64), nullable=False),
        sa.Column("compiled", Blob, nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_campaign_versions_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_versions")),
        sa.UniqueConstraint("campaign_id", "number", name=op.f("uq_campaign_versions_campaign_id_number")),
        **MYSQL,
    )
    op.create_table(
        "links",
        sa.Column("id", BigId, autoincrement=True, nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("url", LongText, nullable=False),
        sa.Column("url_sha256", ascii_string(64), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_links_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_links")),
        sa.UniqueConstraint("campaign_id", "url_sha256", name=op.f("uq_links_campaign_id_url_sha256")),
        **MYSQL,
    )
    op.create_table(
        "variants",
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("number", TinyInt, autoincrement=False, nullable=False),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_variants_campaign_id")),
        sa.ForeignKeyConstraint(["version_id"], ["campaign_versions.id"], name=op.f("fk_variants_version_id")),
        sa.PrimaryKeyConstraint("campaign_id", "number", name=op.f("pk_variants")),
        **MYSQL,
    )
    partitions.create(op.get_bind(), dt.datetime.now(dt.UTC).date())


def downgrade() -> None:
    op.drop_table("variants")
    op.drop_table("links")
    op.drop_table("campaign_versions")

    op.drop_table("campaigns")
    op.drop_table("servers")
    op.drop_table("lists")
    op.drop_table("sync_state")
    op.drop_table("suppressions")

    op.drop_table("subscriptions")
    op.drop_table("segments")
    op.drop_table("provider_usage")
    op.drop_table("provider_limits")
    op.drop_table("pools")
    op.drop_table("ledger_generation")
    op.drop_table("fields")

    op.drop_table("engagement_events")
    op.drop_table("domain_health")

    op.drop_table("delivery_events")

    op.drop_table("deliveries")

    op.drop_table("contacts")

    op.drop_table("contact_changes")

    op.drop_table("claims")
    op.drop_table("campaign_minutes")
    op.drop_table("campaign_counters")
    op.drop_table("brands")

    op.drop_table("allotments")
