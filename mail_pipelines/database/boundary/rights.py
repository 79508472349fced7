"""Everything that the account of a dispatch server may do in the database, as one table.

`{central}` is the central schema; `{me}` is the id of the server whose account asks, nothing for any other account.
`{in_hand}` are the states in `IN_HAND`.
A view with a check lets no row be written that it would not show.
"""

from __future__ import annotations

from dataclasses import dataclass

from mail_pipelines.database.models import State


@dataclass(frozen=True)
class View:
    """A view of the servers' schema and what their accounts may do with it, as GRANT has it. `checked`: WITH CHECK OPTION."""

    name: str
    rights: str
    query: str
    checked: bool = False


# The states of rows whose end a server may write.
IN_HAND = (State.CLAIMED, State.UNKNOWN, State.BOUNCED)
# The server that asks, by the name under which its account has logged in; nothing for an account that was revoked, also on a connection that is still
# open. MAX, since MariaDB then asks once a statement and not once a row.
ME = "(SELECT MAX(id) FROM {central}.servers WHERE account = SUBSTRING_INDEX(USER(), '@', 1))"

VIEWS = (
    # --- what is the same for all: no recipients ---
    View("alembic_version", "SELECT", "SELECT version_num FROM {central}.alembic_version"),
    View("ledger_generation", "SELECT", "SELECT id, generation, oldest_schema, database_id FROM {central}.ledger_generation"),
    View("recoveries", "SELECT", "SELECT generation, began_at, finished_at FROM {central}.recoveries"),
    View("brands", "SELECT", "SELECT id, `key` FROM {central}.brands"),
    View("pools", "SELECT", "SELECT id, `key` FROM {central}.pools"),
    # That there is a send window, not which: the rest is in the rows that were put off.
    View(
        "campaigns",
        "SELECT",
        "SELECT id, `key`, state, brand_id, pool_id, overflow_pool_id, priority, unsubscribe, unsubscribe_list_id, shards, archive, "
        "NULLIF(send_window IS NOT NULL, FALSE) AS send_window FROM {central}.campaigns",
    ),
    View(
        "campaign_versions",
        "SELECT",
        "SELECT v.id, v.compiled FROM {central}.campaign_versions AS v JOIN {central}.campaigns AS m ON m.id = v.campaign_id "
        "WHERE m.state IN ('sending', 'paused', 'cancelled')",
    ),
    View("holds", "SELECT", "SELECT * FROM {central}.holds"),
    View("sending_domains", "SELECT", "SELECT id, domain, return_path_domain, tracking_domain FROM {central}.sending_domains"),
    View("active_servers", "SELECT", "SELECT id FROM {central}.active_servers"),
    View("shard_counts", "SELECT", "SELECT * FROM {central}.shard_counts"),
    View("deferred_rows", "SELECT", "SELECT * FROM {central}.deferred_rows"),
    # Domains that do not answer are found by all for all.
    View("domain_health", "SELECT, INSERT, UPDATE, DELETE", "SELECT * FROM {central}.domain_health"),
    # --- what is the server's own ---
    View(
        "servers",
        "SELECT, UPDATE (incarnation, boot_id, heartbeat_token, heartbeat_at, health)",
        "SELECT id, `key`, kind, pool_id, state, host, port, incarnation, boot_id, heartbeat_token, heartbeat_at, health FROM {central}.servers "
        "WHERE account = SUBSTRING_INDEX(USER(), '@', 1)",
    ),
    View("allotments", "SELECT", "SELECT * FROM {central}.allotments WHERE server_id = {me}"),
    View("provider_limits", "SELECT", "SELECT * FROM {central}.provider_limits WHERE server_id IN (0, {me})"),
    # The key of all servers only where it has none of its own.
    View(
        "dkim_keys",
        "SELECT",
        "SELECT k.domain_id, k.selector, k.server_id, k.state, k.private_key FROM {central}.dkim_keys AS k "
        "WHERE k.state = 'active' AND k.server_id IN (0, {me}) AND NOT EXISTS (SELECT 1 FROM {central}.dkim_keys AS o "
        "WHERE o.domain_id = k.domain_id AND o.state = 'active' AND o.server_id = {me} AND k.server_id <> o.server_id)",
    ),
    View("claims", "SELECT, UPDATE (state, closed_at)", "SELECT * FROM {central}.claims WHERE server_id = {me}"),
    # Rows whose end it may write. Which recipient a row is, and whose, it cannot change.
    View(
        "deliveries",
        "SELECT, UPDATE (state, claim_id, sort_key, attempt, code, enhanced, reason)",
        "SELECT * FROM {central}.deliveries WHERE server_id = {me} AND state IN ({in_hand})",
    ),
    # Rows that its log may speak of.
    View(
        "ledger_rows",
        "SELECT",
        "SELECT e.campaign_id, e.contact_id, e.provider, e.state, e.attempt FROM {central}.deliveries AS e WHERE e.server_id = {me} OR EXISTS "
        "(SELECT 1 FROM {central}.delivery_events AS v WHERE v.campaign_id = e.campaign_id AND v.contact_id = e.contact_id AND v.server_id = {me})",
    ),
    # Of rows that the server was the last to claim.
    View(
        "delivery_events",
        "SELECT, INSERT, DELETE",
        "SELECT * FROM {central}.delivery_events AS e WHERE EXISTS "
        "(SELECT 1 FROM {central}.deliveries AS d WHERE d.campaign_id = e.campaign_id AND d.contact_id = e.contact_id AND d.server_id = {me})",
        checked=True,
    ),
    View("campaign_counters", "SELECT, INSERT, UPDATE", "SELECT * FROM {central}.campaign_counters WHERE server_id = {me}", checked=True),
    View("campaign_minutes", "SELECT, INSERT, UPDATE", "SELECT * FROM {central}.campaign_minutes WHERE server_id = {me}", checked=True),
    View(
        "sync_state",
        "SELECT, INSERT, UPDATE (value, version, changed_at)",
        "SELECT * FROM {central}.sync_state WHERE source = 'journal' AND `key` = "
        "(SELECT MAX(s.`key`) FROM {central}.servers AS s WHERE s.account = SUBSTRING_INDEX(USER(), '@', 1))",
        checked=True,
    ),
    View("recovery_servers", "SELECT, INSERT, UPDATE (part, offers, note)", "SELECT * FROM {central}.recovery_servers WHERE server_id = {me}", checked=True),
    View("recovered_offers", "SELECT, INSERT, UPDATE", "SELECT * FROM {central}.recovered_offers WHERE server_id = {me}", checked=True),
)
