-- Give rows of a claim that were not offered back to their queue, and their debit where its windows are still open. Result set: how many rows
-- were given back. What is refunded are rows that really went back, so nobody claims more than was granted by asking for refunds.
-- Those deferred before are due at once: the claim has left their sort keys alone. `p_contact_ids` is a JSON array.
--
-- A greylisting is no attempt, but its row goes on waiting for its server, which only a deferred one does. The caller counts what went back by attempts,
-- as workers one version older do, so those are counted here from one state to the other.
CREATE PROCEDURE release_rows (
  IN p_claim_id BIGINT,
  IN p_server_id INT,
  IN p_contact_ids LONGTEXT CHARACTER SET utf8mb4
)
SQL SECURITY DEFINER
BEGIN
  -- Of `database.models.State`.
  DECLARE c_pending TINYINT DEFAULT 0;
  DECLARE c_claimed TINYINT DEFAULT 1;
  DECLARE c_deferred TINYINT DEFAULT 3;
  -- Of `delivery.recording`, in seconds.
  DECLARE c_slot INT DEFAULT 900;

  DECLARE v_second BIGINT DEFAULT TIMESTAMPDIFF(SECOND, '1970-01-01', UTC_TIMESTAMP(6));
  DECLARE v_campaign_id, v_shard INT;
  DECLARE v_provider VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin;
  DECLARE v_opened BIGINT;
  DECLARE v_released, v_greylisted INT DEFAULT 0;

  SELECT campaign_id, shard, provider, TIMESTAMPDIFF(SECOND, '1970-01-01', opened_at) INTO v_campaign_id, v_shard, v_provider, v_opened
    FROM claims
   WHERE id = p_claim_id AND server_id = p_server_id;
  SELECT COUNT(*) INTO v_greylisted
    FROM JSON_TABLE(p_contact_ids, '$[*]' COLUMNS (contact_id BIGINT PATH '$')) AS q
    STRAIGHT_JOIN deliveries AS d ON d.campaign_id = v_campaign_id AND d.contact_id = q.contact_id
   WHERE d.claim_id = p_claim_id AND d.state = c_claimed AND d.attempt = 0 AND d.reason = 'greylisted';
  UPDATE JSON_TABLE(p_contact_ids, '$[*]' COLUMNS (contact_id BIGINT PATH '$')) AS q
    STRAIGHT_JOIN deliveries AS d ON d.campaign_id = v_campaign_id AND d.contact_id = q.contact_id
     SET d.state = IF(d.attempt > 0 OR d.reason <=> 'greylisted', c_deferred, c_pending), d.claim_id = 0
   WHERE d.claim_id = p_claim_id AND d.state = c_claimed;
  SET v_released = ROW_COUNT();
  UPDATE provider_usage
     SET used = used - v_released
   WHERE server_id = p_server_id AND provider = v_provider
     AND window_start = v_opened - MOD(v_opened, window_seconds) AND window_start = v_second - MOD(v_second, window_seconds);
  UPDATE allotments
     SET used = used - v_released
   WHERE campaign_id = v_campaign_id AND server_id = p_server_id AND provider = v_provider
     AND slot_start = v_opened - MOD(v_opened, c_slot) AND slot_start = v_second - MOD(v_second, c_slot);
  IF v_greylisted > 0 THEN
    INSERT INTO campaign_counters (campaign_id, shard, provider, server_id, state, count)
    VALUES (v_campaign_id, v_shard, v_provider, p_server_id, c_pending, -v_greylisted),
           (v_campaign_id, v_shard, v_provider, p_server_id, c_deferred, v_greylisted)
        ON DUPLICATE KEY UPDATE count = count + VALUES(count);
  END IF;
  SELECT v_released;
END
