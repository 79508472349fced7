"""What a block list answers, and what it does not mean."""

from __future__ import annotations

import pytest

from mail_pipelines.config import DnsSettings
from mail_pipelines.domains.resolver import Question
from mail_pipelines.provisioning import block_lists, dns_checks
from mail_pipelines.provisioning.block_lists import BlockList, Standing
from tests.parts.dns import Zone

LIST = BlockList("bl.test", "https://bl.test/remove")
IN_ORDER = "2.0.0.127.bl.test. 60 IN A 127.0.0.2"


def standing(dns: DnsSettings, address: str = "192.0.2.9") -> tuple[Standing, str]:
    [look] = block_lists.look(dns, [address], [LIST])
    return look.standing, look.text


def test_a_listing_says_where_to_ask_for_removal(zone: Zone, dns: DnsSettings) -> None:
    zone.publish(IN_ORDER, "9.2.0.192.bl.test. 60 IN A 127.0.0.4")
    assert standing(dns) == (Standing.LISTED, "192.0.2.9 is listed by bl.test (127.0.0.4): find the cause, then ask to be removed at https://bl.test/remove")
    assert standing(dns, "192.0.2.10") == (Standing.CLEAR, "192.0.2.10 is not listed by bl.test")


def test_an_address_of_six_is_asked_by_nibbles(zone: Zone, dns: DnsSettings) -> None:
    zone.publish(IN_ORDER, f"{'9' + '.0' * 23}.8.b.d.0.1.0.0.2.bl.test. 60 IN A 127.0.0.2")
    assert standing(dns, "2001:db8::9")[0] is Standing.LISTED


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        # 127.255.255.0/24: the query was refused, which must never be read as a listing.
        (["2.0.0.127.bl.test. 60 IN A 127.255.255.254", "9.2.0.192.bl.test. 60 IN A 127.255.255.254"], "refuses this resolver"),
        ([IN_ORDER, "9.2.0.192.bl.test. 60 IN A 127.255.255.252"], "refuses this resolver"),
        ([IN_ORDER, "1.0.0.127.bl.test. 60 IN A 127.0.0.2", "9.2.0.192.bl.test. 60 IN A 127.0.0.2"], "lists everything"),
        (["9.2.0.192.bl.test. 60 IN A 127.0.0.2"], "lists nothing"),
    ],
)
def test_a_list_that_is_out_of_order_is_not_believed(zone: Zone, dns: DnsSettings, records: list[str], reason: str) -> None:
    zone.publish(*records)
    found, text = standing(dns)
    assert found is Standing.UNKNOWN
    assert reason in text


def test_a_parked_zone_lists_nobody(zone: Zone, dns: DnsSettings) -> None:
    """It answers with the address of some web server."""
    zone.publish(IN_ORDER, "9.2.0.192.bl.test. 60 IN A 203.0.113.80")
    assert standing(dns)[0] is Standing.CLEAR


def test_silence_is_no_listing(zone: Zone, dns: DnsSettings) -> None:
    zone.publish(IN_ORDER)
    zone.silent.add("9.2.0.192.bl.test")
    assert standing(dns.model_copy(update={"timeout_seconds": 1}))[0] is Standing.UNKNOWN
    zone.failing.add("2.0.0.127.bl.test")
    assert "does not answer" in standing(dns, "192.0.2.10")[1]


def test_the_lists_are_data_each_with_a_source_and_a_way_out(zone: Zone, dns: DnsSettings) -> None:
    lists = block_lists.block_lists()
    assert len({a_list.zone for a_list in lists}) == len(lists) >= 3
    for a_list in lists:
        assert a_list.remedy.startswith("https://")
        assert a_list.source.startswith("https://")
        # A zone is a name that can be asked for.
        assert Question(f"2.0.0.127.{a_list.zone}", "A")
    # None of them is in this zone, so none can be believed.
    assert dns_checks.listed(["192.0.2.9"], block_lists.look(dns, ["192.0.2.9"], block_lists.block_lists())).ok is None
    assert block_lists.data()["egress"]["domains"]
