"""What the demo sends: segments and one campaign, as a marketer would write them."""

from __future__ import annotations

SEGMENTS = (
    """
key: engaged
name: Opened or clicked one of the last two campaigns
criteria:
  any:
    - {did: opened, last: 2}
    - {did: clicked, last: 2}
""",
    """
key: buyers
name: Bought at least twice, on either list
criteria:
  all:
    - {field: orders, op: ">=", value: 2}
    - any:
        - {in_list: news}
        - {in_list: shop}
""",
    """
key: vip
name: VIP customers, who hear of it elsewhere
criteria: {field: vip, op: "=", value: true}
""",
)

# Of the people of the CRM, where there is one.
CRM_SEGMENT = """
key: crm-buyers
name: Bought at least twice, as the CRM says
criteria:
  all:
    - {in_list: crm}
    - {field: orders, op: ">=", value: 2}
"""
CRM_KEY = "crm-buyers"

CAMPAIGN = """
name: Spring sale
key: spring-sale
segments: {include: [engaged, buyers], exclude: [vip]}
unsubscribe: all
priority: high
content:
  from_name: The Garden Shop
  from_address: news@garden-shop.test
  subject: "{{ first_name | default('Hello') }}, spring is here"
  preheader: Everything for the garden, cheaper until Sunday
  body_format: mjml
  body: |
    <mjml>
      <mj-body background-color="#f4f4ef">
        <mj-section background-color="#2f5d3a">
          <mj-column><mj-text color="#ffffff" font-size="26px" align="center">Spring sale</mj-text></mj-column>
        </mj-section>
        <mj-section background-color="#ffffff">
          <mj-column>
            <mj-text font-size="16px">Dear {{ first_name | default('friend') }}{% if city %} in {{ city }}{% endif %},</mj-text>
            <mj-text>seeds, tools and furniture are cheaper until Sunday{% if orders and orders > 3 %}, and delivery is free for you{% endif %}.</mj-text>
            <mj-button background-color="#2f5d3a" href="https://garden-shop.test/spring">See the offers</mj-button>
            <mj-text font-size="12px" color="#777777">The Garden Shop, 1 Orchard Lane, Gardenville.
              <a href="{{ unsubscribe_url }}">Unsubscribe</a></mj-text>
          </mj-column>
        </mj-section>
      </mj-body>
    </mjml>
"""
KEY = "spring-sale"
FROM_DOMAIN = "garden-shop.test"
