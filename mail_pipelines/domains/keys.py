"""RSA keys for DKIM: made, written as the DNS wants them, sealed for the database and opened again.

A private key is at rest only as AES-256-GCM under a key derived from a token key (HKDF), bound to its domain and selector: the installation's, or for a
key of one server that server's own, which is all that the server may have. What does not belong here: where sealed keys are kept (`store`).
"""

from __future__ import annotations

import secrets
from base64 import b64encode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mail_pipelines.domains.domain import DomainError
from mail_pipelines.messages.keyring import derive

# 2048 bits: what large providers ask for, and the longest that every resolver and control panel copes with (RFC 8301 §3.2).
BITS = 2048
_INFO = b"mail-pipelines: DKIM private keys at rest"
_NONCE_BYTES = 12


class KeyNotOpened(DomainError):
    """A sealed key that this installation cannot open."""


def generate() -> rsa.RSAPrivateKey:
    """A new private key; takes some 0.1 s."""
    return rsa.generate_private_key(public_exponent=65537, key_size=BITS)


def public_text(key: rsa.RSAPrivateKey) -> str:
    """The public half as the p= of a DKIM record (RFC 6376 §3.6.1): base64 of its SubjectPublicKeyInfo."""
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b64encode(der).decode("ascii")


def seal(key: rsa.RSAPrivateKey, secret: bytes, domain: str, selector: str) -> bytes:
    """The key as it is kept: nonce and ciphertext."""
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + _cipher(secret).encrypt(nonce, der, _label(domain, selector))


def unseal(sealed: bytes, secret: bytes, domain: str, selector: str) -> rsa.RSAPrivateKey:
    """The key that `seal` was given. Raises `KeyNotOpened` if secret, domain or selector are others, or a bit was changed."""
    try:
        der = _cipher(secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _label(domain, selector))
    except (InvalidTag, ValueError):
        # Without the cause: its traceback would be of no use, and nothing near a key belongs into a log.
        raise KeyNotOpened(
            f"the DKIM key {selector} of {domain} does not open with this token key: bring back the token key it was made with, "
            f"make another key with `mail-pipelines domain rotate {domain}`, or, on a server with a token key of its own, give it DKIM keys of its own with "
            "`mail-pipelines server dkim NAME` at the centre"
        ) from None
    key = serialization.load_der_private_key(der, password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def seal_own(key: rsa.RSAPrivateKey, token_key: bytes, server: str | None, domain: str, selector: str) -> bytes:
    """`seal` at the centre for a server of this name, under the token key that is derived for it; for all servers (None) under `token_key`."""
    return seal(key, token_key if server is None else derive(token_key, server), domain, selector)


def unseal_own(sealed: bytes, token_key: bytes, server: str | None, domain: str, selector: str) -> rsa.RSAPrivateKey:
    """What `seal_own` or, before servers had token keys, `seal` has made, by the installation's token key or the server's own. Raises `KeyNotOpened`."""
    try:
        return unseal(sealed, token_key, domain, selector)
    except KeyNotOpened:
        if server is None:
            raise
        return unseal(sealed, derive(token_key, server), domain, selector)


def _cipher(secret: bytes) -> AESGCM:
    return AESGCM(HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO).derive(secret))


def _label(domain: str, selector: str) -> bytes:
    return f"{selector}._domainkey.{domain}".encode("ascii")
