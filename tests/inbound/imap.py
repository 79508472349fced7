"""A real IMAP server: Debian's Dovecot, as an ordinary user, on a free port of the loopback, with folders of its own."""

from __future__ import annotations

import getpass
import imaplib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.parts.processes import free_port, listens, stop, wait_for

USER, PASSWORD = "bounces@shop.test", "s3cret"


class Dovecot:
    """Serves one mailbox. Not as root, which it would use to become others."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
        self.port = free_port()
        self.user = "nobody" if os.geteuid() == 0 else getpass.getuser()
        account = pwd.getpwnam(self.user)
        (self.base / "home").mkdir()
        if os.geteuid() == 0:
            for path in (self.base, self.base / "home"):
                os.chown(path, account.pw_uid, account.pw_gid)
        group = account.pw_gid
        program = shutil.which("dovecot") or "/usr/sbin/dovecot"
        first, login, mailbox = _words(program, f"{self.base}/home", account.pw_uid, group)
        configuration = self.base / "dovecot.conf"
        configuration.write_text(
            f"""
            {first}
            base_dir = {self.base}/run
            state_dir = {self.base}/state
            log_path = {self.base}/log
            protocols = imap
            listen = 127.0.0.1
            ssl = no
            {login}
            default_internal_user = {self.user}
            default_internal_group = {_group(group)}
            default_login_user = {self.user}
            first_valid_uid = {account.pw_uid}
            last_valid_uid = {account.pw_uid}
            first_valid_gid = {group}
            {mailbox}
            service imap-login {{
              chroot =
              inet_listener imap {{
                port = {self.port}
              }}
              inet_listener imaps {{
                port = 0
              }}
            }}
            service anvil {{
              chroot =
            }}
            """,
            encoding="utf-8",
        )
        with (self.base / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [program, "-F", "-c", configuration],
                stdout=output,
                stderr=output,
                user=account.pw_uid,
                group=group,
                extra_groups=[],
            )
        wait_for(lambda: listens(self.port) or self.process.poll() is not None, what="Dovecot")
        assert self.process.poll() is None, (self.base / "output").read_text()

    @property
    def url(self) -> str:
        return f"imap://{USER.replace('@', '%40')}@127.0.0.1:{self.port}/INBOX"

    def client(self) -> imaplib.IMAP4:
        client = imaplib.IMAP4("127.0.0.1", self.port, timeout=120)
        client.login(USER, PASSWORD)
        return client

    def add(self, *messages: bytes, folder: str = "INBOX") -> None:
        client = self.client()
        for message in messages:
            assert client.append(folder, None, None, message)[0] == "OK"
        client.logout()

    def count(self, folder: str) -> int:
        client = self.client()
        status, data = client.select(folder, readonly=True)
        client.logout()
        return int(data[0] or 0) if status == "OK" else 0

    def end(self) -> None:
        stop(self.process, 120)
        shutil.rmtree(self.base)


def _words(program: str, home: str, uid: int, gid: int) -> tuple[str, str, str]:
    """What 2.3 (Debian 12) and 2.4 (Debian 13) say in other words: the first lines, that a login needs no TLS, and whose mailbox is where."""
    if subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.startswith("2.3"):
        users = f"passdb {{\n driver = static\n args = password={PASSWORD}\n}}\nuserdb {{\n driver = static\n args = uid={uid} gid={gid} home={home}\n}}"
        return "", "disable_plaintext_auth = no", f"mail_location = maildir:{home}/Maildir\n{users}"
    users = f"passdb static {{\n password = {PASSWORD}\n}}\nuserdb static {{\n fields {{\n uid = {uid}\n gid = {gid}\n home = {home}\n }}\n}}"
    versions = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0"
    return versions, "auth_allow_cleartext = yes", f"mail_driver = maildir\nmail_path = {home}/Maildir\n{users}"


def _group(gid: int) -> str:
    import grp

    return grp.getgrgid(gid).gr_name
