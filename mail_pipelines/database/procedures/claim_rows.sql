-- Lease the next rows of one shard and provider to one sender: the whole claim of `mail_pipelines.dispatch.claims`. Rows that may not be mailed
-- end, go back to the queue of another provider, or wait for their domain or for their send window. Valid for MariaDB from 10.6 and MySQL 8.
--
-- It runs with its definer's rights and gives out no recipient that it does not claim. It commits nothing. Result sets:
--   1. one row: refusal (NULL: claimed; else a value of `dispatch.claiming.refusals.Verdict`), now, detail, cap, window_seconds, version_id
--   2. if claimed, the rows to mail, in order: contact_id, attempt, email, attributes, asks (the first of its domain after a silence)
--
-- `tests/dispatch/test_claims_alike.py` compares it with the same claim on SQLite. p_ is what the caller gave, c_ a constant, v_ was found.
CREATE PROCEDURE claim_rows (
  IN p_claim_id BIGINT,
  IN p_campaign_id INT,
  IN p_shard TINYINT,
  IN p_provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_limit INT,
  IN p_server_id INT,
  IN p_incarnation VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_boot_id VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_run_id VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_generation VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_newest_claim BIGINT,
  IN p_last_beat DATETIME(6),
  IN p_journal_inode BIGINT,
  IN p_journal_offset BIGINT,
  IN p_lease_microseconds BIGINT
)
SQL SECURITY DEFINER
BEGIN
  -- Of `database.models.State`.
  DECLARE c_pending TINYINT DEFAULT 0;
  DECLARE c_claimed TINYINT DEFAULT 1;
  DECLARE c_deferred TINYINT DEFAULT 3;
  DECLARE c_suppressed TINYINT DEFAULT 12;
  DECLARE c_unresolved TINYINT DEFAULT 15;
  -- Of `delivery.recording`, in seconds.
  DECLARE c_slot INT DEFAULT 900;
  DECLARE c_hour INT DEFAULT 3600;
  DECLARE c_day INT DEFAULT 86400;
  -- Of `delivery/domain_health.toml`: so long the other rows of a domain wait for the one that asks.
  DECLARE c_answer_wait INT DEFAULT 60;
  -- Of `dispatch.claiming.hindrances`: within so many seconds after their domain does, its rows fall due.
  DECLARE c_spread INT DEFAULT 60;
  -- Of `dispatch.greylisting`: so long after it fell due, a greylisted row waits for the server that was greylisted.
  DECLARE c_greylist_wait INT DEFAULT 14400;
  -- The sort key of a deferred row is the second in which it is due; that of a pending row is its place, and each will do.
  DECLARE c_first_place INT DEFAULT -2147483648;
  DECLARE c_last_place INT DEFAULT 2147483647;
  -- Of `dispatch.windows`: places of a rank, and the seconds after its opening within which the rows of a window fall due.
  DECLARE c_places_a_rank INT DEFAULT 65536;
  DECLARE c_window_spread INT DEFAULT 91;
  -- Of `dispatch.claiming.best_ranks`: nothing is left to a server that has been silent for so many seconds; more rows than these are not passed over.
  DECLARE c_speaks INT DEFAULT 120;
  DECLARE c_most_left INT DEFAULT 2000;
  -- So many seconds a connection goes on from its last claim, and does not see rows that were given back before that place.
  DECLARE c_go_on INT DEFAULT 30;

  DECLARE v_now DATETIME(6) DEFAULT UTC_TIMESTAMP(6);
  -- Not UNIX_TIMESTAMP, which follows the caller's time zone.
  DECLARE v_second BIGINT DEFAULT TIMESTAMPDIFF(SECOND, '1970-01-01', v_now);
  DECLARE v_slot_start BIGINT DEFAULT v_second - MOD(v_second, c_slot);
  DECLARE v_refusal VARCHAR(20) CHARACTER SET ascii COLLATE ascii_bin;
  DECLARE v_detail VARCHAR(550) CHARACTER SET utf8mb4;

  DECLARE v_server_state, v_campaign_state VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin;
  DECLARE v_incarnation, v_generation VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin;
  DECLARE v_remembered, v_elsewhere, v_any_held, v_windowed BOOLEAN;
  DECLARE v_held VARCHAR(10) CHARACTER SET ascii COLLATE ascii_bin;
  DECLARE v_expire_at DATETIME(6);
  DECLARE v_version_id, v_brand_id, v_list_id, v_pool_id, v_overflow_pool_id, v_server_pool_id INT;
  DECLARE v_unsubscribe VARCHAR(8) CHARACTER SET ascii COLLATE ascii_bin;

  DECLARE v_room, v_left, v_cap, v_window, v_per_hour, v_per_day, v_warming INT;
  DECLARE v_limits_of VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin;

  DECLARE v_state TINYINT;
  DECLARE v_earliest, v_latest, v_last_place, v_since, v_until, v_last_due, v_due_since BIGINT;
  DECLARE v_found, v_from_pending, v_from_deferred, v_size, v_passed_over INT;
  DECLARE v_asking INT;
  DECLARE v_domain VARCHAR(253) CHARACTER SET ascii COLLATE ascii_bin;

  decision: BEGIN
    -- The campaign's row comes first: whoever pauses or cancels it, or puts back the whole database, waits until this claim is written, or was
    -- waited for, and then all that is asked below is as they left it.
    SELECT state, expire_at, version_id, brand_id, pool_id, overflow_pool_id, unsubscribe, unsubscribe_list_id, send_window IS NOT NULL
      INTO v_campaign_state, v_expire_at, v_version_id, v_brand_id, v_pool_id, v_overflow_pool_id, v_unsubscribe, v_list_id, v_windowed
      FROM campaigns
     WHERE id = p_campaign_id
      LOCK IN SHARE MODE;

    -- May this process speak for the server?
    SELECT s.state, s.incarnation, s.pool_id, g.generation,
           (p_newest_claim IS NULL OR EXISTS (SELECT 1 FROM claims WHERE id = p_newest_claim))
           AND (p_last_beat IS NULL OR COALESCE(s.heartbeat_at >= p_last_beat, FALSE)),
           g.database_id <> @@server_id,
           EXISTS (SELECT 1 FROM holds WHERE released_at IS NULL)
      INTO v_server_state, v_incarnation, v_server_pool_id, v_generation, v_remembered, v_elsewhere, v_any_held
      FROM servers AS s
      JOIN ledger_generation AS g ON g.id = 1
     WHERE s.id = p_server_id;
    IF v_server_state IS NULL THEN
      SET v_refusal = 'unregistered';
      LEAVE decision;
    ELSEIF NOT (v_incarnation <=> p_incarnation) THEN
      SET v_refusal = 'other_incarnation';
      LEAVE decision;
    ELSEIF v_server_state NOT IN ('active', 'warming') THEN
      SET v_refusal = 'inactive', v_detail = v_server_state;
      LEAVE decision;
    ELSEIF v_generation <> p_generation OR NOT v_remembered THEN
      SET v_refusal = 'went_back';
      LEAVE decision;
    ELSEIF v_elsewhere THEN
      SET v_refusal = 'other_database', v_detail = @@server_id;
      LEAVE decision;
    END IF;

    -- Is the campaign sending?
    IF v_campaign_state IS NULL THEN
      SET v_refusal = 'no_campaign';
      LEAVE decision;
    ELSEIF v_campaign_state <> 'sending' THEN
      SET v_refusal = 'not_sending', v_detail = v_campaign_state;
      LEAVE decision;
    END IF;
    -- If anything is held at all: is anything of this? A hold over the provider comes last, since it alone leaves the session something to do.
    IF v_any_held THEN
      SELECT scope_kind, CONCAT(CASE scope_kind WHEN 'everything' THEN scope_kind WHEN 'provider' THEN provider ELSE CONCAT('the ', scope_kind) END,
                                ' is held: ', reason)
        INTO v_held, v_detail
        FROM holds
       WHERE released_at IS NULL
         AND (scope_kind = 'everything' OR scope_kind = 'campaign' AND scope_id = p_campaign_id OR scope_kind = 'brand' AND scope_id = v_brand_id
              OR scope_kind = 'pool' AND scope_id IN (v_pool_id, v_server_pool_id) OR scope_kind = 'server' AND scope_id = p_server_id
              OR scope_kind = 'provider' AND provider = p_provider)
       ORDER BY scope_kind = 'provider', id
       LIMIT 1;
    END IF;
    IF v_held <> 'provider' THEN
      SET v_refusal = 'held';
      LEAVE decision;
    ELSEIF v_held IS NOT NULL THEN
      SET v_refusal = 'provider_held';
      LEAVE decision;
    END IF;
    IF v_server_pool_id NOT IN (v_pool_id, COALESCE(v_overflow_pool_id, v_pool_id)) THEN
      SET v_refusal = 'wrong_pool';
      LEAVE decision;
    ELSEIF v_expire_at <= v_now THEN
      SET v_refusal = 'expired';
      LEAVE decision;
    END IF;

    -- How many messages do grant and limits still allow? Their rows are locked in key order.
    SELECT granted - used INTO v_room
      FROM allotments
     WHERE campaign_id = p_campaign_id AND server_id = p_server_id AND provider = p_provider AND slot_start = v_slot_start
       FOR UPDATE;
    IF v_room IS NULL OR v_room <= 0 THEN
      SET v_refusal = 'no_grant';
      LEAVE decision;
    END IF;
    -- The limits that fit best: the server's own before those of all, the provider's before those of any.
    SELECT provider, per_hour, per_day INTO v_limits_of, v_per_hour, v_per_day
      FROM provider_limits
     WHERE server_id IN (0, p_server_id) AND provider IN (p_provider, '*')
     ORDER BY server_id DESC, provider DESC
     LIMIT 1;
    IF v_limits_of IS NULL THEN
      SET v_refusal = 'no_limits';
      LEAVE decision;
    END IF;
    -- A warm-up's cap of the day: that of the provider, or else that of all others. Of both limits of a day the lesser holds.
    SELECT per_day INTO v_warming
      FROM warm_ups
     WHERE server_id = p_server_id AND provider IN (p_provider, '*')
     ORDER BY provider DESC
     LIMIT 1;
    SET v_per_day = COALESCE(LEAST(v_per_day, v_warming), v_per_day, v_warming);
    SET v_window = c_hour, v_cap = v_per_hour;
    windows: LOOP
      IF v_cap IS NOT NULL THEN
        -- The row must exist to be locked: two campaigns that meet in a new window would both see an empty one.
        INSERT INTO provider_usage (server_id, provider, window_seconds, window_start, used)
        VALUES (p_server_id, p_provider, v_window, v_second - MOD(v_second, v_window), 0)
            ON DUPLICATE KEY UPDATE used = used + VALUES(used);
        SELECT v_cap - used INTO v_left
          FROM provider_usage
         WHERE server_id = p_server_id AND provider = p_provider AND window_seconds = v_window AND window_start = v_second - MOD(v_second, v_window)
           FOR UPDATE;
        IF v_left <= 0 THEN
          SET v_refusal = 'used_up';
          LEAVE decision;
        END IF;
        SET v_room = LEAST(v_room, v_left);
      END IF;
      IF v_window = c_day THEN
        LEAVE windows;
      END IF;
      SET v_window = c_day, v_cap = v_per_day;
    END LOOP;
    SET v_room = LEAST(v_room, p_limit);

    -- The rows of this claim. The table lives as long as the connection, since making one takes longer than emptying it; in memory, as its
    -- content means nothing outside this call. If its columns change, so must its name.
    CREATE TEMPORARY TABLE IF NOT EXISTS claim_rows_judged (
      position INT NOT NULL AUTO_INCREMENT PRIMARY KEY,
      contact_id BIGINT NOT NULL,
      state TINYINT NOT NULL,
      sort_key INT NOT NULL,
      attempt TINYINT NOT NULL,
      reason VARCHAR(24) CHARACTER SET ascii COLLATE ascii_bin,
      hindrance VARCHAR(24) CHARACTER SET ascii COLLATE ascii_bin,
      email VARCHAR(254) CHARACTER SET utf8mb4,
      address_hash BINARY(16),
      provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin,
      domain VARCHAR(253) CHARACTER SET ascii COLLATE ascii_bin,
      dead_until DATETIME(6),
      time_zone VARCHAR(48) CHARACTER SET ascii COLLATE ascii_bin,
      -- Of a row outside its send window: when that opens.
      opens_at BIGINT,
      -- Of a row that may not be mailed: where it goes.
      to_state TINYINT,
      to_provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin
    ) ENGINE = MEMORY;
    DELETE FROM claim_rows_judged;
    -- Where this connection's last claim ended. Index entries of rows that were claimed stay until the server has purged them, seconds later: whoever
    -- begins at the first entry reads them all, and with several servers at work that takes longer than all the rest.
    CREATE TEMPORARY TABLE IF NOT EXISTS claim_rows_places (
      campaign_id INT NOT NULL,
      shard TINYINT NOT NULL,
      provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
      last_place INT NOT NULL,
      since BIGINT NOT NULL,
      PRIMARY KEY (campaign_id, shard, provider)
    ) ENGINE = MEMORY;
    SELECT last_place, since INTO v_last_place, v_since
      FROM claim_rows_places
     WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND since BETWEEN v_second - c_go_on AND v_second;
    -- The same of deferred rows. Where there is a send window most rows are deferred ones, else there are few that are due.
    IF v_windowed THEN
      CREATE TEMPORARY TABLE IF NOT EXISTS claim_rows_dues (
        campaign_id INT NOT NULL,
        shard TINYINT NOT NULL,
        provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
        last_due INT NOT NULL,
        since BIGINT NOT NULL,
        PRIMARY KEY (campaign_id, shard, provider)
      ) ENGINE = MEMORY;
      SELECT last_due, since INTO v_last_due, v_due_since
        FROM claim_rows_dues
       WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND since BETWEEN v_second - c_go_on AND v_second;
    END IF;

    -- While warming servers may send some of these rows, an established one begins behind the best of them: as many as those may still send in this slot, but
    -- not more than half. It takes what lies before when nothing is left behind.
    IF v_warming IS NULL AND v_last_place IS NULL THEN
      SELECT LEAST(SUM(LEAST(a.granted - a.used, IF(o.server_id IS NULL, w.per_day, o.per_day) - COALESCE(u.used, 0))), c_most_left)
        INTO v_passed_over
        FROM servers AS s
        JOIN allotments AS a ON a.campaign_id = p_campaign_id AND a.server_id = s.id AND a.provider = p_provider AND a.slot_start = v_slot_start
        LEFT JOIN warm_ups AS o ON o.server_id = s.id AND o.provider = p_provider
        LEFT JOIN warm_ups AS w ON w.server_id = s.id AND w.provider = '*'
        LEFT JOIN provider_usage AS u ON u.server_id = s.id AND u.provider = p_provider AND u.window_seconds = c_day
                                     AND u.window_start = v_second - MOD(v_second, c_day)
       WHERE s.state = 'warming' AND s.heartbeat_at > v_now - INTERVAL c_speaks SECOND AND a.granted > a.used
         AND IF(o.server_id IS NULL, w.per_day, o.per_day) > COALESCE(u.used, 0);
      IF v_passed_over IS NOT NULL THEN
        SELECT LEAST(v_passed_over, COALESCE(SUM(count), 0) DIV 2) - 1 INTO v_passed_over
          FROM campaign_counters
         WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND state = c_pending;
        IF v_passed_over >= 0 THEN
          SELECT sort_key + 1, v_second INTO v_last_place, v_since
            FROM deliveries
           WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND state = c_pending
           ORDER BY sort_key
           LIMIT 1 OFFSET v_passed_over;
        END IF;
      END IF;
    END IF;

    -- Deferred rows that are due first, then pending ones; rows that others hold are skipped. Each is judged in the statement that reads
    -- it, so that the address given out is the one that was judged. Only the rows of the ledger are locked, not the contacts. Where they
    -- begin is asked without locks: to pass over rows that wait for another server takes twice as long with them, and would hide them from it.
    dues: LOOP
      SELECT sort_key INTO v_earliest
        FROM deliveries
       WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND state = c_deferred
         AND sort_key BETWEEN COALESCE(v_last_due, c_first_place) AND v_second
         AND (reason IS NULL OR reason <> 'greylisted' OR server_id = p_server_id OR sort_key <= v_second - c_greylist_wait
              OR server_id NOT IN (SELECT id FROM servers WHERE state IN ('active', 'warming')))
       ORDER BY sort_key
       LIMIT 1;
      IF v_earliest IS NOT NULL OR v_last_due IS NULL THEN
        LEAVE dues;
      END IF;
      SET v_last_due = NULL;
    END LOOP;
    IF v_earliest IS NOT NULL THEN
      SET v_state = c_deferred, v_latest = v_second;
    ELSE
      SET v_state = c_pending, v_earliest = COALESCE(v_last_place, c_first_place), v_latest = c_last_place;
    END IF;
    queues: LOOP
      INSERT INTO claim_rows_judged
             (contact_id, state, sort_key, attempt, reason, hindrance, email, address_hash, provider, domain, dead_until, time_zone)
      SELECT d.contact_id, v_state, d.sort_key, d.attempt, d.reason,
             CASE
               WHEN c.id IS NULL THEN 'erased'
               WHEN EXISTS (
                      SELECT 1 FROM suppressions AS s
                       WHERE s.address_hash = c.address_hash
                         AND (s.scope_kind = 'all' AND s.scope_id = 0 OR s.scope_kind = 'brand' AND s.scope_id = v_brand_id OR s.scope_kind = 'list' AND s.scope_id = v_list_id))
                 OR EXISTS (
                      SELECT 1 FROM suppressions AS s
                       WHERE s.domain = c.domain
                         AND (s.scope_kind = 'all' AND s.scope_id = 0 OR s.scope_kind = 'brand' AND s.scope_id = v_brand_id OR s.scope_kind = 'list' AND s.scope_id = v_list_id))
               THEN 'suppressed'
               WHEN c.address_hash <> d.address_hash THEN 'moved'
               WHEN h.domain IS NOT NULL THEN 'dead'
             END,
             c.email, c.address_hash, c.provider, h.domain, h.dead_until, c.time_zone
        FROM (
               SELECT contact_id, sort_key, attempt, reason, address_hash
                 FROM deliveries
                WHERE campaign_id = p_campaign_id AND shard = p_shard AND provider = p_provider AND state = v_state
                  AND sort_key BETWEEN v_earliest AND v_latest
                  AND (v_state = c_deferred OR not_before IS NULL OR not_before <= v_second)
                  AND (v_state = c_pending OR reason IS NULL OR reason <> 'greylisted' OR server_id = p_server_id OR sort_key <= v_second - c_greylist_wait
                       OR server_id NOT IN (SELECT id FROM servers WHERE state IN ('active', 'warming')))
                ORDER BY sort_key
                LIMIT v_room
                  FOR UPDATE SKIP LOCKED
             ) AS d
        LEFT JOIN contacts AS c ON c.id = d.contact_id
        LEFT JOIN domain_health AS h ON h.domain = c.domain;
      SET v_room = v_room - ROW_COUNT();
      IF v_room = 0 OR v_state = c_pending AND v_earliest = c_first_place THEN
        LEAVE queues;
      ELSEIF v_state = c_deferred AND v_last_due IS NOT NULL THEN
        SET v_latest = v_last_due - 1, v_earliest = c_first_place, v_last_due = NULL;
      ELSEIF v_state = c_deferred THEN
        SET v_state = c_pending, v_earliest = COALESCE(v_last_place, c_first_place), v_latest = c_last_place;
      ELSE
        -- What is left lies before that place.
        SET v_latest = v_last_place - 1, v_earliest = c_first_place, v_last_place = NULL;
      END IF;
    END LOOP;
    REPLACE INTO claim_rows_places (campaign_id, shard, provider, last_place, since)
    SELECT p_campaign_id, p_shard, p_provider, MAX(sort_key), IF(v_last_place IS NULL, v_second, v_since)
      FROM claim_rows_judged
     WHERE state = c_pending
    HAVING MAX(sort_key) IS NOT NULL;
    IF v_windowed THEN
      REPLACE INTO claim_rows_dues (campaign_id, shard, provider, last_due, since)
      SELECT p_campaign_id, p_shard, p_provider, MAX(sort_key), IF(v_last_due IS NULL, v_second, v_due_since)
        FROM claim_rows_judged
       WHERE state = c_deferred
      HAVING MAX(sort_key) IS NOT NULL;
    END IF;
    IF v_unsubscribe = 'list' THEN
      UPDATE claim_rows_judged AS q
        JOIN subscriptions AS s ON s.contact_id = q.contact_id AND s.list_id = v_list_id AND NOT s.subscribed
         SET q.hindrance = 'unsubscribed'
       WHERE q.hindrance IS NULL OR q.hindrance IN ('moved', 'dead');
    END IF;
    -- Whose window is closed, or would close before the lease ends, is put off until it opens, in the order of engagement. A row that moves is judged
    -- in its new queue. Zones that the campaign has no spans of, and none, go by its own.
    IF v_windowed THEN
      SET v_until = TIMESTAMPDIFF(SECOND, '1970-01-01', v_now + INTERVAL p_lease_microseconds MICROSECOND);
      UPDATE claim_rows_judged AS q
         SET q.time_zone = ''
       WHERE q.time_zone IS NULL OR NOT EXISTS (SELECT 1 FROM window_spans AS w WHERE w.campaign_id = p_campaign_id AND w.time_zone = q.time_zone);
      UPDATE claim_rows_judged AS q
         SET q.hindrance = 'window',
             q.opens_at = COALESCE((SELECT MIN(w.opens_at) FROM window_spans AS w
                                     WHERE w.campaign_id = p_campaign_id AND w.time_zone = q.time_zone AND w.opens_at > v_second), v_until)
       WHERE (q.hindrance IS NULL OR q.hindrance = 'dead')
         AND NOT EXISTS (SELECT 1 FROM window_spans AS w
                          WHERE w.campaign_id = p_campaign_id AND w.time_zone = q.time_zone AND w.opens_at <= v_second AND w.closes_at > v_until);
      UPDATE claim_rows_judged AS q
         SET q.sort_key = q.opens_at + LEAST(c_window_spread, GREATEST(0, CASE
                            WHEN q.state = c_pending THEN q.sort_key DIV c_places_a_rank
                            WHEN q.reason = 'window' THEN q.sort_key - COALESCE((SELECT MAX(w.opens_at) FROM window_spans AS w
                              WHERE w.campaign_id = p_campaign_id AND w.time_zone = q.time_zone AND w.opens_at <= q.sort_key), 0)
                            ELSE 0
                          END))
       WHERE q.hindrance = 'window';
    END IF;
    -- The first row of a dead domain that is due asks; all others of it wait for the answer. Of two claims that of them asks which moves the
    -- domain's time on. Domains are locked in their order.
    asking: LOOP
      SET v_asking = NULL;
      SELECT position, domain INTO v_asking, v_domain
        FROM claim_rows_judged
       WHERE hindrance = 'dead' AND dead_until <= v_now
       ORDER BY domain, position
       LIMIT 1;
      IF v_asking IS NULL THEN
        LEAVE asking;
      END IF;
      UPDATE domain_health
         SET dead_until = v_now + INTERVAL c_answer_wait SECOND
       WHERE domain = v_domain AND dead_until <= v_now;
      IF ROW_COUNT() = 1 THEN
        UPDATE claim_rows_judged SET hindrance = NULL WHERE position = v_asking;
      END IF;
      UPDATE claim_rows_judged SET dead_until = v_now + INTERVAL c_answer_wait SECOND WHERE domain = v_domain;
    END LOOP;
    SELECT COUNT(*), COUNT(IF(hindrance IS NULL AND state = c_pending, 1, NULL)), COUNT(IF(hindrance IS NULL AND state = c_deferred, 1, NULL))
      INTO v_found, v_from_pending, v_from_deferred
      FROM claim_rows_judged;
    SET v_size = v_from_pending + v_from_deferred;
    IF v_found = 0 THEN
      SET v_refusal = 'nothing_due';
      LEAVE decision;
    END IF;

    IF v_size > 0 THEN
      UPDATE claim_rows_judged AS q
        STRAIGHT_JOIN deliveries AS d ON d.campaign_id = p_campaign_id AND d.contact_id = q.contact_id
         SET d.state = c_claimed, d.claim_id = p_claim_id, d.server_id = p_server_id, d.version_id = COALESCE(v_version_id, 0)
       WHERE q.hindrance IS NULL;
      INSERT INTO provider_usage (server_id, provider, window_seconds, window_start, used)
      VALUES (p_server_id, p_provider, c_slot, v_slot_start, v_size),
             (p_server_id, p_provider, c_hour, v_second - MOD(v_second, c_hour), v_size),
             (p_server_id, p_provider, c_day, v_second - MOD(v_second, c_day), v_size)
          ON DUPLICATE KEY UPDATE used = used + VALUES(used);
      UPDATE allotments
         SET used = used + v_size
       WHERE campaign_id = p_campaign_id AND server_id = p_server_id AND provider = p_provider AND slot_start = v_slot_start;
      INSERT INTO campaign_counters (campaign_id, shard, provider, server_id, state, count)
      VALUES (p_campaign_id, p_shard, p_provider, p_server_id, c_pending, -v_from_pending),
             (p_campaign_id, p_shard, p_provider, p_server_id, c_claimed, v_size),
             (p_campaign_id, p_shard, p_provider, p_server_id, c_deferred, -v_from_deferred)
          ON DUPLICATE KEY UPDATE count = count + VALUES(count);
    END IF;
    IF v_found > v_size THEN
      UPDATE claim_rows_judged AS q
         SET q.hindrance = 'duplicate_address'
       WHERE q.hindrance = 'moved' AND EXISTS (SELECT 1 FROM deliveries AS d WHERE d.campaign_id = p_campaign_id AND d.address_hash = q.address_hash);
      -- Whoever was sent it again is not called suppressed: the first copy may have arrived.
      UPDATE claim_rows_judged AS q
         SET q.to_provider = IF(q.hindrance = 'moved', q.provider, p_provider),
             q.to_state = CASE
                            WHEN q.hindrance = 'moved' THEN q.state
                            WHEN q.hindrance IN ('dead', 'window') THEN c_deferred
                            WHEN EXISTS (SELECT 1 FROM delivery_events AS e
                                          WHERE e.campaign_id = p_campaign_id AND e.contact_id = q.contact_id AND e.kind = 'resent') THEN c_unresolved
                            ELSE c_suppressed
                          END
       WHERE q.hindrance IS NOT NULL;
      -- What the old address was answered says nothing about the new one, above all not that it is greylisted.
      UPDATE claim_rows_judged AS q
        STRAIGHT_JOIN deliveries AS d ON d.campaign_id = p_campaign_id AND d.contact_id = q.contact_id
         SET d.state = q.to_state, d.provider = q.to_provider,
             d.address_hash = IF(q.hindrance = 'moved', q.address_hash, d.address_hash),
             d.sort_key = CASE q.hindrance
                            WHEN 'moved' THEN d.sort_key
                            WHEN 'dead' THEN TIMESTAMPDIFF(SECOND, '1970-01-01', q.dead_until) + MOD(q.contact_id, c_spread)
                            WHEN 'window' THEN q.sort_key
                            ELSE v_second
                          END,
             d.code = IF(q.hindrance IN ('moved', 'dead', 'window'), 0, d.code),
             d.enhanced = IF(q.hindrance IN ('moved', 'dead', 'window'), 0, d.enhanced),
             d.reason = CASE q.hindrance
                          WHEN 'moved' THEN NULL
                          WHEN 'dead' THEN 'no_connection'
                          WHEN 'window' THEN IF(q.opens_at > TIMESTAMPDIFF(SECOND, '1970-01-01', v_expire_at), 'no_window', 'window')
                          ELSE q.hindrance
                        END
       WHERE q.hindrance IS NOT NULL;
      INSERT INTO campaign_counters (campaign_id, shard, provider, server_id, state, count)
      SELECT p_campaign_id, p_shard, p_provider, p_server_id, state, -COUNT(*) FROM claim_rows_judged WHERE hindrance IS NOT NULL GROUP BY state
          ON DUPLICATE KEY UPDATE count = campaign_counters.count + VALUES(count);
      INSERT INTO campaign_counters (campaign_id, shard, provider, server_id, state, count)
      SELECT p_campaign_id, p_shard, to_provider, p_server_id, to_state, COUNT(*) FROM claim_rows_judged WHERE hindrance IS NOT NULL
       GROUP BY to_provider, to_state
          ON DUPLICATE KEY UPDATE count = campaign_counters.count + VALUES(count);
      INSERT INTO campaign_minutes (campaign_id, minute, provider, server_id, state, reason, count)
      SELECT p_campaign_id, v_second DIV 60, p_provider, p_server_id, to_state, hindrance, COUNT(*) FROM claim_rows_judged
       WHERE hindrance IS NOT NULL AND hindrance NOT IN ('moved', 'dead', 'window')
       GROUP BY to_state, hindrance
          ON DUPLICATE KEY UPDATE count = campaign_minutes.count + VALUES(count);
      INSERT INTO window_rows (campaign_id, provider, time_zone, opens_at, count)
      SELECT p_campaign_id, p_provider, time_zone, opens_at, COUNT(*) FROM claim_rows_judged
       WHERE hindrance = 'window'
       GROUP BY time_zone, opens_at
          ON DUPLICATE KEY UPDATE count = window_rows.count + VALUES(count);
    END IF;
    -- A claim of which nothing is left to send is written closed: it proves to its server that the database remembers it.
    INSERT INTO claims (id, campaign_id, shard, provider, server_id, run_id, size, state, incarnation, boot_id, journal_inode, journal_offset,
                        opened_at, lease_until, closed_at)
    VALUES (p_claim_id, p_campaign_id, p_shard, p_provider, p_server_id, p_run_id, v_size, IF(v_size > 0, 'open', 'closed'), p_incarnation, p_boot_id,
            p_journal_inode, p_journal_offset, v_now, v_now + INTERVAL p_lease_microseconds MICROSECOND, IF(v_size > 0, NULL, v_now));
  END decision;

  SELECT v_refusal, v_now, v_detail, v_cap, v_window, v_version_id;
  IF v_refusal IS NULL THEN
    -- Who was erased since the statement above is as if erased after the claim; what is gone is not given out.
    SELECT q.contact_id, q.attempt, q.email, COALESCE(c.attributes, '{}'), q.domain IS NOT NULL
      FROM claim_rows_judged AS q
      LEFT JOIN contacts AS c ON c.id = q.contact_id
     WHERE q.hindrance IS NULL
     ORDER BY q.position;
  END IF;
END
