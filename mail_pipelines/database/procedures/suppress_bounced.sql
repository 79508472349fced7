-- Suppress the addresses of bounced rows of a campaign, where they are not suppressed already. `p_contact_ids` is a JSON array. Whoever may only
-- record what became of messages can so suppress those that bounced, and no other address. `p_server_id`: only rows of this server; NULL: of any.
CREATE PROCEDURE suppress_bounced (
  IN p_campaign_id INT,
  IN p_server_id INT,
  IN p_contact_ids LONGTEXT CHARACTER SET utf8mb4
)
SQL SECURITY DEFINER
BEGIN
  -- Of `database.models.State`.
  DECLARE c_bounced TINYINT DEFAULT 11;

  INSERT IGNORE INTO suppressions (address_hash, scope_kind, scope_id, reason, created_at)
  SELECT d.address_hash, 'all', 0, 'bounce', UTC_TIMESTAMP(6)
    FROM JSON_TABLE(p_contact_ids, '$[*]' COLUMNS (contact_id BIGINT PATH '$')) AS q
    STRAIGHT_JOIN deliveries AS d ON d.campaign_id = p_campaign_id AND d.contact_id = q.contact_id
   WHERE d.state = c_bounced AND (p_server_id IS NULL OR d.server_id = p_server_id)
   ORDER BY d.address_hash;
  SELECT ROW_COUNT();
END
