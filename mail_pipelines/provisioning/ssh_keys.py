"""Keys of SSH: those of new hosts are made here, so that the first contact with a host is no leap of faith.

A new host gets its SSH server's key from us with its first boot (cloud-init), and the centre compares it from the first connection on.
"""

from __future__ import annotations

import json
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from mail_pipelines.provisioning.interfaces import ProvisioningError


def generate() -> str:
    """A new private key (Ed25519) in the form of OpenSSH."""
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()).decode()


def public_of(private: str) -> str:
    """The public half, as `ssh-ed25519 AAAA…`; "" of no key."""
    if not private:
        return ""
    key = serialization.load_ssh_private_key(private.encode(), password=None)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def public_of_file(path: Path) -> str:
    """The public half of a private key file, in OpenSSH's form or in PEM. Raises `ProvisioningError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProvisioningError(f"the SSH key {path} cannot be read: {error.strerror}") from error
    try:
        return public_of(content.decode("ascii"))
    except (ValueError, TypeError) as error:
        raise ProvisioningError(f"{path} is no private SSH key without a passphrase: make one by `ssh-keygen -t ed25519 -N ''`") from error


def cloud_init(user: str, public_key: str, host_key: str) -> str:
    """User data by which a new host lets us in, and has the SSH key that we expect. (YAML takes JSON.)"""
    document = {
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": host_key, "ed25519_public": public_of(host_key)},
        "disable_root": user != "root",
        "users": [{"name": user, "ssh_authorized_keys": [public_key], **({} if user == "root" else {"sudo": "ALL=(ALL) NOPASSWD:ALL", "shell": "/bin/bash"})}],
    }
    return f"#cloud-config\n{json.dumps(document)}\n"
