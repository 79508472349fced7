-- Whether a recipient whose row a server has claimed exists, and is neither suppressed for the campaign nor has left its list: one row if so.
CREATE PROCEDURE recipient_wanted (
  IN p_campaign_id INT,
  IN p_server_id INT,
  IN p_contact_id BIGINT
)
SQL SECURITY DEFINER
BEGIN
  -- Of `database.models.State`.
  DECLARE c_claimed TINYINT DEFAULT 1;

  SELECT 1
    FROM deliveries AS d
    JOIN campaigns AS m ON m.id = d.campaign_id
    JOIN contacts AS c ON c.id = d.contact_id
   WHERE d.campaign_id = p_campaign_id AND d.contact_id = p_contact_id AND d.server_id = p_server_id AND d.state = c_claimed
     AND NOT EXISTS (
           SELECT 1 FROM suppressions AS s
            WHERE s.address_hash = c.address_hash
              AND (s.scope_kind = 'all' AND s.scope_id = 0 OR s.scope_kind = 'brand' AND s.scope_id = m.brand_id
                   OR s.scope_kind = 'list' AND s.scope_id = m.unsubscribe_list_id))
     AND NOT EXISTS (
           SELECT 1 FROM suppressions AS s
            WHERE s.domain = c.domain
              AND (s.scope_kind = 'all' AND s.scope_id = 0 OR s.scope_kind = 'brand' AND s.scope_id = m.brand_id
                   OR s.scope_kind = 'list' AND s.scope_id = m.unsubscribe_list_id))
     AND NOT (m.unsubscribe = 'list' AND EXISTS (
           SELECT 1 FROM subscriptions AS l WHERE l.contact_id = c.id AND l.list_id = m.unsubscribe_list_id AND NOT l.subscribed));
END
