"""Composing and signing: one process, against nothing but its RSA signatures, and against the standard library with dkimpy."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from mail_pipelines.benchmarks.compose import SENDER, compiled, compose_all, recipients, standard_library
from mail_pipelines.benchmarks.contract import Result, best_of, judge
from mail_pipelines.domains import keys
from mail_pipelines.messages.composing import compose
from mail_pipelines.messages.dkim import Signer

RAW_TARGET = 0.75
# How often dkimpy's own arithmetic fits into one signature of OpenSSL bounds this: 17 where that makes 1,500 a second.
DKIMPY_TARGET = 10.0
# Offers of the content that make a message of about 16 KB.
OFFERS = 4
# What a signature covers besides the digest of the body.
_SIGNED_OCTETS = 1200
# Messages in a turn.
_COUNT, _PLAIN_COUNT = 50, 4


def run(quick: bool) -> list[Result]:
    """Messages of 16 KB, composed and signed, per second of the processor."""
    message = compiled(OFFERS)
    key = keys.generate()
    sender = dataclasses.replace(SENDER, signer=Signer(message.from_domain, "bench", key))
    turns_wanted = 40 if quick else 200
    chosen = list(itertools.islice(recipients(), _COUNT))
    plain = by_dkimpy(compose(message, chosen[0], SENDER).data, message.from_domain, key)
    octets, padding, algorithm = bytes(_SIGNED_OCTETS), PKCS1v15(), SHA256()
    # In many short turns: in some of them no other program disturbs.
    turns = [
        (
            best_of(lambda: compose_all(message, chosen, sender), runs=1, clock=time.process_time),
            best_of(lambda: [key.sign(octets, padding, algorithm) for _ in range(_COUNT)], runs=1, clock=time.process_time),
            best_of(lambda: [plain() for _ in range(_PLAIN_COUNT)], runs=1, clock=time.process_time),
        )
        for _ in range(turns_wanted)
    ]
    seconds, raw_seconds, plain_seconds = (min(times) for times in zip(*turns, strict=True))
    rate = _COUNT / seconds
    return [
        judge("compose and sign", rate, "messages/s", _COUNT / raw_seconds, target=RAW_TARGET, better="higher"),
        judge("compose and sign, standard library and dkimpy", rate, "messages/s", _PLAIN_COUNT / plain_seconds, target=DKIMPY_TARGET, better="higher"),
    ]


def by_dkimpy(data: bytes, domain: str, key: RSAPrivateKey) -> Callable[[], bytes]:
    """A function that builds the same message and signs the same fields with what Python has."""
    import dkim

    build = standard_library(data)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    names = [line.partition(b":")[0] for line in data.partition(b"\r\n\r\n")[0].split(b"\r\n") if not line.startswith(b" ")]

    def sign() -> bytes:
        built = build()
        signature = dkim.sign(built, b"bench", domain.encode(), pem, canonicalize=(b"relaxed", b"relaxed"), include_headers=names)
        return bytes(signature) + built

    return sign
