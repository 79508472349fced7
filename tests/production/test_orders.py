"""Orders: only what the centre signed, for this queue and this time, is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.config import ConfigError
from mail_pipelines.resources import orders
from mail_pipelines.resources.orders import Order, OrderRefused

KEY = orders.new_signing_key()
VERIFY = orders.verify_key_of(KEY)


@given(st.builds(Order, st.uuids().map(str), st.text(max_size=64), st.floats(1, 2e9)))
def test_an_order_is_read_as_it_was_written(order: Order) -> None:
    assert orders.read(*orders.sign(order, KEY), VERIFY, now=order.until) == order


@given(st.data())
def test_a_changed_order_is_refused(data: st.DataObject) -> None:
    text, signature = orders.sign(Order("run", "centre", 1e9), KEY)
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters().filter(lambda letter: letter != text[place])) + text[place + 1 :]
    with pytest.raises(OrderRefused, match="signature is not the centre's"):
        orders.read(changed, signature, VERIFY, now=0)


@pytest.mark.parametrize(
    "signature",
    ["", "00", "no digits", "00" * 64, orders.sign(Order("run", "centre", 1e9), orders.new_signing_key())[1]],
    # The last is another one each time.
    ids=["none", "short", "no digits", "zeros", "another key"],
)
def test_a_signature_of_nobody_or_of_another_is_refused(signature: str) -> None:
    text, _ = orders.sign(Order("run", "centre", 1e9), KEY)
    with pytest.raises(OrderRefused, match="signature is not the centre's"):
        orders.read(text, signature, VERIFY, now=0)


@pytest.mark.parametrize("given", [(None, None), ("{}", None), ({"run_id": "run"}, "00"), (b"{}", b"00")])
def test_what_is_no_order_is_refused(given: tuple[object, object]) -> None:
    with pytest.raises(OrderRefused):
        orders.read(*given, VERIFY)


def test_an_order_is_void_after_its_time() -> None:
    order = orders.sign(Order("run", "centre", 100), KEY)
    orders.read(*order, VERIFY, now=100)
    with pytest.raises(OrderRefused, match="out of date"):
        orders.read(*order, VERIFY, now=100.5)


def test_a_damaged_key_says_so_and_does_not_show_itself() -> None:
    with pytest.raises(ConfigError, match=r"broker\.signing_key is no key") as raised:
        orders.sign(Order("run", "centre", 1), "5ec2e7")
    assert "5ec2e7" not in str(raised.value)
