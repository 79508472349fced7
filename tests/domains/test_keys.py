"""A private key leaves this package sealed only, and only the right secret opens it, at its own place."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import DkimKey
from mail_pipelines.domains import keys, signing, store
from mail_pipelines.domains.domain import DomainError, Names, SendingDomain
from mail_pipelines.messages.dkim import Signer
from tests.domains.conftest import NOW

SECRET = b"a secret of the tests"


@pytest.fixture(scope="module")
def private() -> rsa.RSAPrivateKey:
    return keys.generate()


def test_what_was_sealed_opens_with_the_same_secret_for_the_same_selector_only(private: rsa.RSAPrivateKey) -> None:
    sealed = keys.seal(private, SECRET, "shop.example", "mp1")
    assert keys.unseal(sealed, SECRET, "shop.example", "mp1").private_numbers() == private.private_numbers()
    assert keys.seal(private, SECRET, "shop.example", "mp1") != sealed
    changed = bytes([sealed[0] ^ 1]) + sealed[1:]
    for attempt in (
        (sealed, b"another secret", "shop.example", "mp1"),
        (sealed, SECRET, "other.example", "mp1"),
        (sealed, SECRET, "shop.example", "mp2"),
        (changed, SECRET, "shop.example", "mp1"),
        (sealed[:-1], SECRET, "shop.example", "mp1"),
        (b"", SECRET, "shop.example", "mp1"),
    ):
        with pytest.raises(keys.KeyNotOpened, match="does not open with this token key: bring back"):
            keys.unseal(*attempt)


def traces_of(private: rsa.RSAPrivateKey) -> list[bytes]:
    """Every form in which a careless program could leave the key: its secret numbers, DER, PEM, in pieces that survive a page break."""
    numbers = private.private_numbers()
    secret = [number.to_bytes((number.bit_length() + 7) // 8) for number in (numbers.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp)]
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    forms = [form for number in secret for form in (number, number.hex().encode(), str(int.from_bytes(number)).encode())] + pem.split(b"\n")[1:-2]
    return [form[start : start + 24] for form in forms for start in range(0, len(form) - 23, 24)]


def test_the_key_is_nowhere_in_the_database(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    with reading(engine) as connection:
        sealed = connection.execute(sa.select(DkimKey.private_key)).scalar_one()
        everything = repr(connection.execute(sa.select(DkimKey.__table__)).all()).encode()
    assert sealed is not None
    private = keys.unseal(sealed, settings.token_key(), "shop.example", domain.keys[0].selector)
    if engine.dialect.name == "sqlite":
        files = [Path(f"{engine.url.database}{suffix}") for suffix in ("", "-wal")]
        everything = b"".join(file.read_bytes() for file in files if file.exists())
        assert b"shop.example" in everything
        assert sealed[-20:] in everything
    everything += sealed
    assert [trace for trace in traces_of(private) if trace in everything] == []


def test_no_representation_and_no_error_shows_a_key(private: rsa.RSAPrivateKey, settings: Settings, engine: sa.Engine, domain: SendingDomain) -> None:
    with reading(engine) as connection:
        found = signing.sending_as(connection, "shop.example", 0, settings.token_key())
    assert found is not None
    sealed = keys.seal(private, SECRET, "shop.example", "mp1")
    try:
        keys.unseal(sealed, b"wrong", "shop.example", "mp1")
    except keys.KeyNotOpened:
        said = traceback.format_exc()
    said += repr((found, found.signer, Signer("shop.example", "mp1", private), domain))
    shown = said.encode()
    assert "mp1" in said
    assert [trace for key in (private, found.signer.key) for trace in traces_of(key) if trace in shown] == []


def test_another_token_key_is_named_when_mail_is_to_be_signed(engine: sa.Engine, domain: SendingDomain) -> None:
    with reading(engine) as connection, pytest.raises(keys.KeyNotOpened, match=r"the DKIM key mp20260302 of shop\.example"):
        signing.sending_as(connection, "shop.example", 0, b"another")
    with reading(engine) as connection:
        assert signing.sending_as(connection, "other.example", 0, b"another") is None


def test_a_domain_is_there_once_and_its_names_are_three(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    with pytest.raises(DomainError, match="is there already"):
        store.add(engine, Names.of("Shop.Example."), settings.token_key(), NOW)
    assert Names.of("bücher.example") == Names("xn--bcher-kva.example", "bounces.xn--bcher-kva.example", "links.xn--bcher-kva.example")
    with pytest.raises(DomainError, match="must be three names"):
        Names.of("shop.example", "shop.example")
    with pytest.raises(DomainError, match=r"return-path domain 'a_b\.example' cannot be used"):
        Names.of("shop.example", "a_b.example")
    with reading(engine) as connection, pytest.raises(DomainError, match=r"did you mean 'shop\.example'"):
        store.load(connection, "shops.example")
