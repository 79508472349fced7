"""The Exim that receives: which folders and values `infra/exim/inbound.conf` gets. Running it is `dispatch.exim.instance`'s."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.dispatch.exim.instance import Account
from mail_pipelines.inbound.folders import InboundFolders


@dataclass(frozen=True)
class Receiver:
    """`addresses` to listen on, `complaints` the local part of the address for feedback loops; without a certificate, no STARTTLS."""

    binary: str
    account: Account
    folders: InboundFolders
    addresses: tuple[str, ...]
    port: int
    hostname: str
    complaints: str
    certificate: str = ""
    certificate_key: str = ""

    options = ("-q1m",)
    template = "inbound.conf"
    remedy = "set inbound.folder"

    @property
    def macros(self) -> dict[str, str]:
        certificate = {"MP_CERTIFICATE": self.certificate, "MP_KEY": self.certificate_key} if self.certificate else {}
        return certificate | {
            "MP_HOSTNAME": self.hostname,
            "MP_USER": self.account.user,
            "MP_GROUP": self.account.group,
            "MP_ADDRESSES": " ; ".join(self.addresses),
            "MP_PORT": str(self.port),
            "MP_SPOOL": str(self.spool),
            "MP_LOGS": str(self.log_folder),
            "MP_MAIL": str(self.folders.mail),
            "MP_VERIFIER": str(self.folders.verifier),
            "MP_COMPLAINTS": self.complaints,
        }

    @property
    def spool(self) -> Path:
        return self.folders.spool

    @property
    def log_folder(self) -> Path:
        return self.folders.log

    @property
    def configuration(self) -> Path:
        return self.folders.run / "exim.conf"

    @property
    def needs(self) -> dict[Path, int]:
        return {self.folders.run: os.X_OK, **dict.fromkeys((self.spool, self.log_folder, self.folders.mail), os.W_OK | os.X_OK)}

    def make(self) -> None:
        for folder in (self.folders.run, self.spool, self.log_folder, self.folders.mail):
            folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self.folders.mail, self.account.uid, self.account.gid)
