"""Orders: what the centre sends to a worker, signed so that a worker can tell who wrote it.

A dispatch server may be stolen, and with it an account of the broker. Only the centre has the signing key (Ed25519), and everybody has the
key that verifies: nobody else can write an order that a worker executes, nor one for another queue or a later time.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mail_pipelines.config import ConfigError
from mail_pipelines.errors import MailPipelinesError

# Signed in front of each order, so that the signature is good for nothing else.
_PURPOSE = b"mail-pipelines order 1\n"


class OrderRefused(MailPipelinesError):
    """This worker does not do what it was asked to."""


@dataclass(frozen=True)
class Order:
    """Execute a run, if it was fetched from this queue, until this time (epoch seconds)."""

    run_id: str
    queue: str
    until: float


def new_signing_key() -> str:
    """Keys are written in hexadecimal digits."""
    return Ed25519PrivateKey.generate().private_bytes_raw().hex()


def verify_key_of(signing_key: str) -> str:
    return _private(signing_key).public_key().public_bytes_raw().hex()


def _private(signing_key: str) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(signing_key))
    except ValueError:
        raise ConfigError("broker.signing_key is no key: expected 64 hexadecimal digits, as `mail-pipelines init --production` writes them") from None


def sign(order: Order, signing_key: str) -> tuple[str, str]:
    """The order as text, and its signature in hexadecimal digits."""
    text = json.dumps(asdict(order), sort_keys=True)
    return text, _private(signing_key).sign(_PURPOSE + text.encode()).hex()


def read(text: object, signature: object, verify_key: str, now: float | None = None) -> Order:
    """The order, if the centre has signed it and its time is not over. Raises `OrderRefused`."""
    if not isinstance(text, str) or not isinstance(signature, str):
        raise OrderRefused("an order without a signature is refused: it is not the centre's")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(verify_key)).verify(bytes.fromhex(signature), _PURPOSE + text.encode())
    except (InvalidSignature, ValueError):
        raise OrderRefused("an order whose signature is not the centre's is refused: compare broker.verify_key with the centre's") from None
    order = Order(**json.loads(text))
    if order.until < (time.time() if now is None else now):
        raise OrderRefused(f"the order for run {order.run_id} is out of date: it has waited for too long, or this host's clock is wrong")
    return order
