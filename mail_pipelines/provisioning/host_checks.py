"""Checks that only the server's own host can make: its mail server, and the way out.

Each is a small function that returns a finding. What does not belong here: what anybody can look up (`dns_checks`).
"""

from __future__ import annotations

import ipaddress
import smtplib
import ssl
from collections.abc import Sequence

from mail_pipelines.config import DnsSettings
from mail_pipelines.domains.resolver import Question, ask
from mail_pipelines.provisioning import block_lists
from mail_pipelines.provisioning.finding import Finding

SECONDS = 10.0
_MOST_EXCHANGERS = 6
_CLOSED = (
    "the way out over port 25 is closed: ask the hoster to open it (most close it until asked, some for good), and look at this host's firewall; "
    "a server that cannot reach port 25 sends nothing"
)


def smtp(host: str, port: int) -> Finding:
    """The mail server answers where sessions hand mail to it."""
    try:
        with smtplib.SMTP(host, port, local_hostname="localhost", timeout=SECONDS) as client:
            code, words = client.ehlo()
    except (OSError, smtplib.SMTPException) as error:
        return Finding("SMTP", False, f"{host}:{port} does not answer ({_words(error)}): is `mail-pipelines exim run` (mail-pipelines-exim) running?")
    if code != 250:
        return Finding("SMTP", False, f"{host}:{port} refuses EHLO: {code} {_text(words)}; see main.log of the server")
    return Finding("SMTP", True, f"{host}:{port} answers")


def tls(host: str, port: int) -> Finding:
    """What other hosts may hand over is encrypted; on the loopback nothing has to be."""
    if _is_loopback(host):
        return Finding("TLS", True, "mail is handed over on the loopback of its host, which needs none")
    try:
        with smtplib.SMTP(host, port, local_hostname="localhost", timeout=SECONDS) as client:
            client.ehlo()
            if not client.has_extn("starttls"):
                return Finding(
                    "TLS", False, f"{host}:{port} takes mail from other hosts without STARTTLS: give it a certificate, or let it listen on 127.0.0.1 only"
                )
            client.starttls(context=ssl.create_default_context())
    except (OSError, smtplib.SMTPException) as error:
        return Finding(
            "TLS", False, f"STARTTLS with {host}:{port} fails ({_words(error)}): its certificate has to be for this name, valid, and of a known authority"
        )
    return Finding("TLS", True, f"STARTTLS with {host}:{port} holds")


def auth(host: str, port: int) -> Finding:
    """Who hands over from another host has to log in; on the loopback the permit is what counts."""
    if _is_loopback(host):
        return Finding("AUTH", True, "only sessions of its own host reach it, and each needs a permit")
    try:
        with smtplib.SMTP(host, port, local_hostname="localhost", timeout=SECONDS) as client:
            client.ehlo()
            if client.has_extn("auth"):
                return Finding("AUTH", False, f"{host}:{port} takes passwords in clear text: offer AUTH only after STARTTLS")
            if client.has_extn("starttls"):
                client.starttls(context=_unverified())
                client.ehlo()
            if client.has_extn("auth"):
                return Finding("AUTH", True, f"{host}:{port} asks for a login after STARTTLS")
    except (OSError, smtplib.SMTPException) as error:
        return Finding("AUTH", False, f"{host}:{port} does not get as far as AUTH ({_words(error)})")
    return Finding("AUTH", False, f"{host}:{port} is open to other hosts and offers no AUTH: let it listen on 127.0.0.1 only")


def egress(dns: DnsSettings, hostname: str, source: str = "", domains: Sequence[str] | None = None, port: int = 25) -> Finding:
    """A real mail exchanger answers on port 25, from the address that mail leaves from, and takes STARTTLS. Nothing is mailed."""
    asked = domains or block_lists.data()["egress"]["domains"]
    mx = ask(dns, [Question(domain, "MX") for domain in asked])
    # The best of each domain first: one provider that refuses is not the whole way out.
    by_domain = [sorted(answer.values, key=lambda value: int(value.partition(" ")[0])) for answer in mx.values()]
    hosts = [values[rank].partition(" ")[2] for rank in range(2) for values in by_domain if rank < len(values)][:_MOST_EXCHANGERS]
    if not hosts:
        failures = {answer.failure for answer in mx.values()} - {""}
        return Finding("port 25", None, f"no mail exchanger of {', '.join(asked)} was found{f' ({failures.pop()})' if failures else ''}: see dns.servers")
    refused, silent = [], []
    for host in hosts:
        try:
            return _greeted(host, port, dns, hostname, source)
        except smtplib.SMTPResponseException as error:
            refused.append(f"{host} answers, and takes no mail from this host: {_words(error)}; see what it says of the address")
        except (OSError, smtplib.SMTPException) as error:
            silent.append(f"{host} ({_words(error)})")
    return Finding("port 25", False, refused[0] if refused else f"{_CLOSED}. Tried: {', '.join(silent)}")


def _greeted(host: str, port: int, dns: DnsSettings, hostname: str, source: str) -> Finding:
    kind = "AAAA" if ":" in source else "A"
    question = Question(host, kind)
    addresses = ask(dns, [question])[question].values
    if not addresses:
        raise OSError(f"it has no {kind} record")
    with smtplib.SMTP(addresses[0], port, hostname, SECONDS, (source, 0) if source else None) as client:
        code, words = client.ehlo()
        if code != 250:
            raise smtplib.SMTPHeloError(code, words)
        if not client.has_extn("starttls"):
            return Finding("port 25", True, f"{host} answers; it offers no STARTTLS")
        client.starttls(context=_unverified())
        return Finding("port 25", True, f"{host} answers, and takes STARTTLS")


def _unverified() -> ssl.SSLContext:
    """As mail servers do it among each other: encrypted, whoever it is."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {_text(error.smtp_error)}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _text(words: bytes | str) -> str:
    return (words.decode("utf-8", "replace") if isinstance(words, bytes) else words)[:200].replace("\n", " ")
