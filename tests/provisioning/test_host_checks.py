"""The checks that a host makes itself, against servers that answer well and badly."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from mail_pipelines.config import DnsSettings
from mail_pipelines.provisioning import host_checks
from tests.parts.dns import Zone
from tests.parts.processes import free_port
from tests.provisioning.smtp import Says, saying

# This host, by an address that other hosts could have given: not the loopback's.
OPEN = "0.0.0.0"


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's side with a certificate for `OPEN`, which this process trusts."""
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=mx.test", "-addext", f"subjectAltName=IP:{OPEN}"]
    subprocess.run([*words, "-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem"], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    return context


def test_a_mail_server_that_answers_is_told_from_one_that_does_not() -> None:
    with saying(Says()) as port:
        assert host_checks.smtp("127.0.0.1", port).ok
    with saying(Says(ehlo=550)) as port:
        refusing = host_checks.smtp("127.0.0.1", port)
    assert (refusing.ok, "refuses EHLO: 550" in refusing.text) == (False, True)
    with saying(Says("554 not now")) as port:
        assert "554 not now" in host_checks.smtp("127.0.0.1", port).text
    silent = host_checks.smtp("127.0.0.1", free_port())
    assert (silent.ok, "Connection refused" in silent.text, "exim run" in silent.text) == (False, True, True)


def test_on_the_loopback_neither_tls_nor_a_login_is_needed() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert host_checks.tls(host, 1).ok
        assert host_checks.auth(host, 1).ok


def test_what_is_open_to_other_hosts_needs_both(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    with saying(Says(before=("STARTTLS",), after=("AUTH PLAIN",), context=tls)) as port:
        assert host_checks.tls(OPEN, port).ok
        assert host_checks.auth(OPEN, port).ok
        monkeypatch.delenv("SSL_CERT_FILE")
        untrusted = host_checks.tls(OPEN, port)
        assert (untrusted.ok, "of a known authority" in untrusted.text) == (False, True)
    with saying(Says()) as port:
        assert "without STARTTLS" in host_checks.tls(OPEN, port).text
        assert "offers no AUTH" in host_checks.auth(OPEN, port).text
    with saying(Says(before=("AUTH PLAIN", "STARTTLS"), context=tls)) as port:
        assert "in clear text" in host_checks.auth(OPEN, port).text
    assert "does not get as far" in host_checks.auth(OPEN, free_port()).text


def test_the_way_out_is_open_when_one_exchanger_answers(zone: Zone, dns: DnsSettings, tls: ssl.SSLContext) -> None:
    zone.publish("big.test. 60 IN MX 10 away.big.test.", "big.test. 60 IN MX 20 mx.big.test.", "mx.big.test. 60 IN A 127.0.0.1")
    with saying(Says(before=("STARTTLS",), context=tls)) as port:
        found = host_checks.egress(dns, "mx9.test", domains=["big.test"], port=port)
        assert (found.ok, found.text) == (True, "mx.big.test answers, and takes STARTTLS")
        assert host_checks.egress(dns, "mx9.test", "127.0.0.3", ["big.test"], port).ok
        # An address that this host does not have.
        assert host_checks.egress(dns, "mx9.test", "192.0.2.9", ["big.test"], port).ok is False
    with saying(Says()) as port:
        assert "it offers no STARTTLS" in host_checks.egress(dns, "mx9.test", domains=["big.test"], port=port).text


def test_a_closed_way_out_is_told_from_an_address_that_is_refused(zone: Zone, dns: DnsSettings) -> None:
    zone.publish("big.test. 60 IN MX 10 mx.big.test.", "mx.big.test. 60 IN A 127.0.0.1")
    closed = host_checks.egress(dns, "mx9.test", domains=["big.test"], port=free_port())
    assert (closed.ok, "ask the hoster to open it" in closed.text, "mx.big.test (Connection refused)" in closed.text) == (False, True, True)
    for says in (Says("554 5.7.1 your address is listed"), Says(ehlo=550)):
        with saying(says) as port:
            refused = host_checks.egress(dns, "mx9.test", domains=["big.test"], port=port)
        assert (refused.ok, "takes no mail from this host: 55" in refused.text) == (False, True)


def test_without_any_exchanger_nothing_can_be_told(zone: Zone, dns: DnsSettings) -> None:
    assert host_checks.egress(dns, "mx9.test", domains=["nowhere.test"]).ok is None
    zone.failing.add("big.test")
    assert "the name servers fail" in host_checks.egress(dns, "mx9.test", domains=["big.test"]).text
