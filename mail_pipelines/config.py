"""Settings: defaults, `config.toml` in the home folder, environment variables, in rising precedence.

What belongs here: every knob of the platform, with its unit and meaning, and where its value came from.
What does not: anything that belongs to one campaign, server or contact (the central database holds those).

A key `[section] name` of `config.toml` is also `MAIL_PIPELINES_<SECTION>__<NAME>`. A secret may be given as `name_file` or
`MAIL_PIPELINES_<SECTION>__<NAME>_FILE`, the path of a file that holds it ({home} is the home folder).

What a process does for one dispatch server is done by that server's settings: `servers/<server>.toml` in the home folder, if it is there, changes
both again, for this server alone. So a host may speak for several.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pydantic

from mail_pipelines.errors import MailPipelinesError, nearest

PREFIX = "MAIL_PIPELINES_"
# A claim is offered for four seconds, then waits for its last reply, then is recorded.
LEASE_SLACK_SECONDS = 8
CONFIG_FILE = "config.toml"
# (section, name) of each key that was given: its value and the place that gave it.
Given: TypeAlias = dict[tuple[str, str], tuple[Any, str]]
# The dispatch server that a process speaks for, or several, with commas between them.
SERVER_VARIABLE = "MAIL_PIPELINES_SERVER"
# Names of the prefix that are no `SECTION__NAME` settings.
PLAIN_VARIABLES = frozenset({"MAIL_PIPELINES_HOME", SERVER_VARIABLE})


class ConfigError(MailPipelinesError):
    """The configuration cannot be used; the message names the key, its origin and the remedy."""


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def secret(description: str) -> Any:
    return pydantic.Field(default=None, description=description, json_schema_extra={"secret": True})


class DatabaseSettings(Section):
    url: str = pydantic.Field(
        default="sqlite:///{home}/central.sqlite3",
        description="SQLAlchemy URL of the central database; {home} is the home folder; ?ssl_ca=FILE at its end encrypts, and trusts nobody else",
        json_schema_extra={"url": True},
    )
    password: str | None = secret("password for the URL, so that the URL itself can be shown")


class SnapshotSettings(Section):
    folder: str = pydantic.Field(default="{home}/snapshots", description="folder of the columnar snapshots and audience manifests")
    min_free_mb: int = pydantic.Field(default=200, ge=0, description="refresh and freeze refuse to start with less free disk (MB)")


class SendingSettings(Section):
    token_key: str | None = secret(
        "key of the tokens in return paths and links, also seals DKIM keys; `mail-pipelines init` makes one, for a dispatch server `server account` does"
    )
    return_path_domain: str = pydantic.Field(default="bounces.example.test", description="domain of the envelope sender (VERP); sending domains have their own")
    public_url: str = pydantic.Field(
        default="https://mail.example.test", description="base URL of unsubscribe and tracking links; sending domains have their own host"
    )
    bounce_host: str = pydantic.Field(default="mail.example.test", description="host that takes the mail of return-path domains: what their MX names")
    allow_unverified: bool = pydantic.Field(default=False, description="campaigns start whatever the DNS has of their From domain; for test installations")
    sender_id: str = pydantic.Field(default="mail-pipelines", description="constant last part of the Feedback-ID header, 5 to 15 characters")
    lease_seconds: int = pydantic.Field(default=120, ge=10, description="a claim not finished after this long is settled (s)")
    reply_timeout_seconds: float = pydantic.Field(default=60, gt=0, description="longest wait for one SMTP reply (s)")
    linger_seconds: float = pydantic.Field(default=600, ge=0, description="a session with nothing due ends unless a row falls due within this (s)")
    session_seconds: float = pydantic.Field(default=2700, gt=0, description="a session ends after this long (s)")
    first_retry_seconds: int = pydantic.Field(default=600, ge=1, description="wait before the first retry of a deferral (s); doubles per attempt")
    last_retry_seconds: int = pydantic.Field(default=14400, ge=1, description="longest wait between two attempts (s)")
    unknown_hours: float = pydantic.Field(default=72, gt=0, description="an unknown outcome becomes unresolved after this (h)")


class CampaignSettings(Section):
    archive: str = pydantic.Field(
        default="{home}/archive",
        description="folder or fsspec URL to which ledgers of old campaigns are moved, as Parquet files that `why` reads; nothing is moved if empty",
        json_schema_extra={"url": True},
    )
    archive_after_days: float = pydantic.Field(
        default=180, ge=60, description="a campaign is archived when it has been over for so long (days); refusals of the last 60 days count against addresses"
    )


class RetentionSettings(Section):
    """In whole calendar months that are over; 0 keeps for ever."""

    engagement_months: int = pydantic.Field(
        default=13,
        ge=0,
        description="single opens, clicks, unsubscribes and complaints are kept for so many whole months; then only how often, and when first and last, each "
        "recipient did it, and the campaign's sum of each hour: segments find the same contacts; 0: for ever",
    )
    deferral_months: int = pydantic.Field(
        default=12,
        ge=0,
        description="temporary refusals of campaigns that are over and not archived are kept for so many whole months, at least 3, then dropped; 0: for ever",
    )

    @pydantic.field_validator("deferral_months")
    @classmethod
    def _counted_refusals_stay(cls, months: int) -> int:
        # Refusals of the last 60 days count against addresses (`delivery/suppression.toml`).
        if 0 < months < 3:
            raise ValueError("refusals of the last 60 days count against addresses: give 3 or more, or 0 to keep them for ever")
        return months


class DnsSettings(Section):
    servers: list[str] = pydantic.Field(
        default=[], description="addresses of the DNS servers to ask, with :PORT if it is not 53; none means this machine's own"
    )
    timeout_seconds: float = pydantic.Field(default=5, gt=0, description="longest wait for the answers about one domain (s)")
    publisher: Literal["none", "rfc2136", "command"] = pydantic.Field(
        default="none", description="how the records of servers are published: `none` (by hand), `rfc2136` (dynamic updates) or `command`"
    )
    update_server: str = pydantic.Field(default="", description="address of the zones' primary, which takes dynamic updates, with :PORT if it is not 53")
    update_key: str | None = secret("TSIG key of these updates as [ALGORITHM:]NAME:SECRET, the secret in base64; without an algorithm hmac-sha256")
    command: list[str] = pydantic.Field(
        default=[], description="words of the command that publishes and withdraws records, which it gets as JSON (docs/domains.md)"
    )
    block_list_hours: float = pydantic.Field(
        default=6, ge=0, description="block lists are asked about the public addresses of active servers every so often (h); 0: never"
    )
    spf_include: str = pydantic.Field(
        default="", description="name of the one SPF record that lists the addresses of all servers, for return paths to include; empty: each lists them itself"
    )


class ServerSettings(Section):
    run_folder: str = pydantic.Field(
        default="{home}/run",
        description="permits, pacers, gates, sockets, and Exim's spool and configuration, one folder a server; on a real host below /run, so that a reboot "
        "clears it; a short path, since that of a socket in it may have at most 107 bytes",
    )
    log_folder: str = pydantic.Field(default="{home}/log", description="journals, one folder a server; on a real disk")
    log_archive: str = pydantic.Field(
        default="",
        description="folder or fsspec URL outside this host to which each server ships its log in pieces, and from which `recover` reads those of servers that "
        "are gone; the same for all servers and the centre; it has addresses in it; none if empty",
        json_schema_extra={"url": True},
    )
    log_archive_days: float = pydantic.Field(default=40, gt=0, description="pieces are kept this long (days): longer than any backup that may be restored")
    mail_folder: str = pydantic.Field(default="{home}/mail", description="what the built-in mail catchers keep, one folder a server")
    play: str = pydantic.Field(
        default="",
        description="TOML file with the behaviour of the destinations that the built-in mail catchers play; empty: mail_pipelines/dispatch/catcher/play.toml",
    )
    catchers: list[str] = pydantic.Field(default=["catcher-1", "catcher-2"], description="built-in mail catchers that `up` starts when no server is registered")
    slots: int = pydantic.Field(
        default=2, ge=1, description="send runs at once on one server; above 2, raise the limits in `dagster/dagster.yaml` as well: `doctor` compares them"
    )
    heartbeat_seconds: float = pydantic.Field(default=10, gt=0, description="interval of a server's heartbeat (s)")
    hostname: str = pydantic.Field(
        default="", description="name that it greets destinations with, as the reverse DNS of its sending address has it; empty: this host's own"
    )
    address: str = pydantic.Field(default="", description="address of this host that it sends from; empty: whichever the system takes")
    exim: str = pydantic.Field(
        default="", description="the server of this host whose Exim, and so whose journal, it shares: for a host with several addresses; empty: it has its own"
    )


class BrokerSettings(Section):
    """Only for a centre with workers on other hosts; without, runs are processes of this one."""

    url: str | None = secret(
        "broker that carries runs to workers: amqps://USER:PASSWORD@HOST:5671/VHOST, on its own host amqp:// and 5672, or filesystem:///FOLDER"
    )
    ca: str = pydantic.Field(default="", description="file of the authority that signed the certificate of an amqps:// broker; empty: those this host trusts")
    management_url: str | None = secret(
        "RabbitMQ's management API, by which the centre makes and ends the accounts of servers: http://USER:PASSWORD@127.0.0.1:15672, or https:// on another "
        "host; of an account with the tag administrator; nowhere else"
    )
    results: str | None = secret("where workers say that a run has begun or ended: db+mysql+pymysql://USER:PASSWORD@HOST/SCHEMA?ssl_ca=FILE, or file:///FOLDER")
    signing_key: str | None = secret("key by which the centre signs orders to workers; nowhere else; `mail-pipelines init --production` makes one")
    verify_key: str = pydantic.Field(
        default="", pattern="^([0-9a-f]{64})?$", description="key by which workers tell the centre's orders from others; the same everywhere, and no secret"
    )


class MetricsSettings(Section):
    listen: str = pydantic.Field(
        default="127.0.0.1", description="address at which metrics are told, without a login: the loopback, or one of a private network"
    )
    port: int = pydantic.Field(
        default=0, ge=0, le=65535, description="port at which `metrics`, or a server's own process, tells Prometheus; one for each process of a host; 0: none"
    )


class InboundSettings(Section):
    folder: str = pydantic.Field(default="{home}/inbound", description="mail that came back: maildirs, and spool and log of the Exim that receives it")
    listen: list[str] = pydantic.Field(default=["127.0.0.1"], description="addresses that `inbound run` listens on; 0.0.0.0 and ::0 are all")
    port: int = pydantic.Field(default=2525, ge=1, le=65535, description="port that `inbound run` listens on; other hosts send to port 25")
    certificate: str = pydantic.Field(
        default="", description="file with the certificate (and its chain) of `sending.bounce_host`: mail is then taken by STARTTLS too; none if empty"
    )
    certificate_key: str = pydantic.Field(default="", description="file with its key, which the user that Exim runs as can read")
    complaints: str = pydantic.Field(default="fbl", pattern=r"^[A-Za-z0-9._-]+$", description="local part of the address given to feedback loops")
    keep_days: float = pydantic.Field(default=14, ge=0, description="read messages are kept this long (days)")
    imap_url: str = pydantic.Field(
        default="",
        description="mailbox to poll as well: imaps://USER@HOST/FOLDER, or imap:// for STARTTLS; USER with %40 for @",
        json_schema_extra={"url": True},
    )
    imap_password: str | None = secret("password for imap_url")
    imap_done: str = pydantic.Field(default="Processed", min_length=1, description="folder of that mailbox that fetched messages are moved to")


class ReputationSettings(Section):
    """What mailbox providers tell of our domains and addresses (docs/reputation.md). A provider without credentials here is not asked."""

    google_credentials: str | None = secret(
        "Google's JSON with the credentials by which Postmaster Tools are asked, of the type authorized_user (with a refresh token) or service_account"
    )
    google_user: str = pydantic.Field(default="", description="user of Postmaster Tools for whom a service account asks (domain-wide delegation)")
    google_url: str = pydantic.Field(default="https://gmailpostmastertools.googleapis.com/v2", description="where the API of Postmaster Tools is")
    microsoft_token_file: str = pydantic.Field(
        default="{home}/secrets/microsoft_snds_token",
        description="file of Microsoft's login to SNDS, which `mail-pipelines reputation sign-in` writes and each run renews",
    )
    microsoft_url: str = pydantic.Field(default="https://substrate.office.com/ip-domain-management-snds", description="where the API of SNDS is")
    microsoft_login_url: str = pydantic.Field(
        default="https://login.microsoftonline.com/consumers/oauth2/v2.0", description="where Microsoft accounts sign in, and tokens are given"
    )
    cron: str = pydantic.Field(default="25 18 * * *", description="when both are asked; warm-ups judge a day after midnight UTC")


class AlertSettings(Section):
    """Without a relay or a webhook nobody is told. The relay is outside the fleet: it has to work when the fleet does not."""

    relay_host: str = pydantic.Field(default="", description="SMTP relay outside the fleet that takes alerts by mail; none if empty")
    relay_port: int = pydantic.Field(default=587, ge=1, le=65535, description="its port; with 465 TLS from the start, else STARTTLS where it is offered")
    user: str = pydantic.Field(default="", description="login at the relay, then only with TLS; none if empty")
    password: str | None = secret("password of this login")
    from_address: str = pydantic.Field(default="", description="sender of alerts")
    to: list[str] = pydantic.Field(default=[], description="addresses that alerts go to")
    webhook_url: str | None = secret('URL that gets alerts as JSON, {"text": …}, as Slack and Mattermost take it')
    reminder_hours: float = pydantic.Field(default=24, gt=0, description="what still lasts is told again after this (h)")


class ProvisioningSettings(Section):
    mode: Literal["off", "propose", "auto"] = pydantic.Field(
        default="propose",
        description="when capacity runs short: do nothing (off), make a proposal for `server provision` (propose), order servers (auto)",
    )
    hosts: str = pydantic.Field(default="{home}/hosts.toml", description="file of the host sources, in the order in which they are used (docs/provisioning.md)")
    domain: str = pydantic.Field(default="", description="domain of the servers' own names: mx1 is then mx1.DOMAIN, in A and PTR records")
    prefix: str = pydantic.Field(default="mx", pattern=r"^[a-z][a-z0-9-]{0,40}$", description="servers are called this and a number")
    budget: float = pydantic.Field(default=0, ge=0, description="most that servers made here may cost in a calendar month, in the currency of their sources")
    most: int = pydantic.Field(default=20, ge=0, description="never more than so many servers made here")
    at_once: int = pydantic.Field(default=2, ge=1, description="so many are being made at once")
    minimum_hours: float = pydantic.Field(default=168, ge=0, description="a server is kept for at least so long (h)")
    cool_down_minutes: float = pydantic.Field(default=60, ge=0, description="after a proposal or an order, so long no other is made (min)")
    attempts: int = pydantic.Field(default=3, ge=1, description="a step that fails so often ends the making of a server")
    retry_seconds: float = pydantic.Field(default=60, ge=0, description="wait before a step is tried again, or what it waits for is looked at again (s)")
    boot_seconds: float = pydantic.Field(default=300, gt=0, description="longest wait for a new host to answer by SSH (s)")
    play_minutes: float = pydantic.Field(default=30, gt=0, description="longest time that the playbook may take (min)")
    dns_hours: float = pydantic.Field(default=72, gt=0, description="longest wait for the DNS records of a server (h)")


class OperationSettings(Section):
    time_zone: str = pydantic.Field(default="UTC", description="time zone of the schedules")
    snapshot_cron: str = pydantic.Field(default="*/15 * * * *", description="when `refresh_snapshots` runs")
    maintenance_cron: str = pydantic.Field(default="40 3 * * *", description="when `maintenance` runs")
    inbox: str = pydantic.Field(default="{home}/inbox", description="folder watched by `dropped_files`: LIST/FILE.csv or LIST/FILE.parquet")
    sensor_seconds: int = pydantic.Field(
        default=10, ge=1, description="shortest interval between two ticks of a sensor; of those that no campaign waits for three times that (s)"
    )
    ui_host: str = pydantic.Field(default="127.0.0.1", description="address the Dagster UI listens on")
    ui_port: int = pydantic.Field(default=3000, ge=0, le=65535, description="port of the Dagster UI; 0 takes a free one")
    min_free_mb: int = pydantic.Field(default=500, ge=0, description="`doctor` warns below this much free disk (MB)")


class Settings(Section):
    """All settings, with `{home}` already replaced by the home folder."""

    home: Path
    # The dispatch server that this process speaks for (the first of MAIL_PIPELINES_SERVER); None at the centre, which on one host speaks for all.
    this_server: str | None = None
    database: DatabaseSettings = DatabaseSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    sending: SendingSettings = SendingSettings()
    campaigns: CampaignSettings = CampaignSettings()
    retention: RetentionSettings = RetentionSettings()
    dns: DnsSettings = DnsSettings()
    server: ServerSettings = ServerSettings()
    broker: BrokerSettings = BrokerSettings()
    metrics: MetricsSettings = MetricsSettings()
    inbound: InboundSettings = InboundSettings()
    reputation: ReputationSettings = ReputationSettings()
    alerts: AlertSettings = AlertSettings()
    provisioning: ProvisioningSettings = ProvisioningSettings()
    operation: OperationSettings = OperationSettings()

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def snapshot_folder(self) -> Path:
        return Path(self.snapshots.folder)

    def token_key(self) -> bytes:
        if not self.sending.token_key:
            raise ConfigError(
                "sending.token_key is not set: run `mail-pipelines init`, or give MAIL_PIPELINES_SENDING__TOKEN_KEY_FILE the path of a file with a key"
            )
        return self.sending.token_key.encode()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in Settings.model_fields.items() if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


@dataclass(frozen=True)
class Origin:
    """One setting: `key` is `section.name`, `value` is masked if `secret`, `origin` names the place it came from."""

    key: str
    value: Any
    origin: str
    description: str


def project_folder() -> Path | None:
    """The folder with `workspace.yaml`: above this package in a checkout, else above the current folder."""
    for start in (Path(__file__).resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "workspace.yaml").is_file() and (folder / "mail_pipelines").is_dir():
                return folder
    return None


def home_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`MAIL_PIPELINES_HOME`, by default `.mail_pipelines/` beside `workspace.yaml`."""
    if given := environ.get("MAIL_PIPELINES_HOME"):
        return Path(given).expanduser().resolve()
    return (project_folder() or Path.cwd()) / ".mail_pipelines"


def _read_secret(path: str, home: Path, named_by: str) -> str:
    try:
        return Path(path.replace("{home}", str(home))).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named_by} names {path}, which cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_file(path: Path, home: Path) -> Given:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    found: Given = {}
    for section, values in document.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise ConfigError(f"{path}: unknown section [{section}]; {nearest(section, list(SECTIONS))}")
        known = {name: (name, False) for name in SECTIONS[section].model_fields}
        known |= {f"{name}_file": (name, True) for name in SECTIONS[section].model_fields if is_secret(section, name)}
        for given, value in values.items():
            if given not in known:
                raise ConfigError(f"{path}: unknown key {section}.{given}; {nearest(given, list(known))}")
            name, by_file = known[given]
            if (section, name) in found:
                raise ConfigError(f"{path}: {section}.{name} and {section}.{name}_file are both given; keep one")
            if by_file:
                value = _read_secret(str(value), home, f"{path}: {section}.{given}")
            found[section, name] = (value, str(path))
    return found


def _from_environment(environ: Mapping[str, str], home: Path) -> Given:
    variables = {variable(section, name): (section, name) for section, model in SECTIONS.items() for name in model.model_fields}
    files = {f"{name}_FILE": key for name, key in variables.items() if is_secret(*key)}
    found: Given = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in PLAIN_VARIABLES:
            continue
        if name in variables:
            key = variables[name]
            is_list = SECTIONS[key[0]].model_fields[key[1]].annotation == list[str]
            value: Any = [item.strip() for item in text.split(",")] if is_list else text
        elif name in files:
            key, value = files[name], _read_secret(text, home, name)
        else:
            raise ConfigError(f"unknown environment variable {name}; {nearest(name, [*variables, *files])}")
        if key in found:
            raise ConfigError(f"{variable(*key)} and {variable(*key)}_FILE are both set; keep one")
        found[key] = (value, name)
    return found


def variable(section: str, name: str) -> str:
    """The environment variable of a key."""
    return f"{PREFIX}{section}__{name}".upper()


def is_secret(section: str, name: str) -> bool:
    return bool(_extra(section, name).get("secret"))


def _extra(section: str, name: str) -> dict[str, Any]:
    extra = SECTIONS[section].model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _collect(home: Path, environ: Mapping[str, str]) -> Given:
    own = _from_file(home / "servers" / f"{servers[0]}.toml", home) if (servers := servers_of_this_host(environ)) else {}
    return {**_from_file(home / CONFIG_FILE, home), **_from_environment(environ, home), **own}


def servers_of_this_host(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The dispatch servers this process speaks for, that with the Exim first; none at the centre."""
    return tuple(name.strip() for name in environ.get(SERVER_VARIABLE, "").split(",") if name.strip())


def load_for(server: str, environ: Mapping[str, str] = os.environ) -> Settings:
    """The configuration by which one of the servers of this host is spoken for. Raises as `load` does."""
    return load({**environ, SERVER_VARIABLE: server})


def members(environ: Mapping[str, str] = os.environ) -> dict[str, Settings]:
    """The dispatch servers this process speaks for, that with the Exim first, each with its configuration; none at the centre. Raises as `load` does."""
    return {server: load_for(server, environ) for server in servers_of_this_host(environ)}


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check the whole configuration; where a process speaks for several servers, that of the first.

    Raises `ConfigError` for an unknown key (naming the nearest), an unreadable file or a value of the wrong type.
    """
    home = home_folder(environ)
    given = _collect(home, environ)
    document: dict[str, Any] = {}
    for section, model in SECTIONS.items():
        values = {name: field.default for name, field in model.model_fields.items()}
        values |= {name: value for (where, name), (value, _) in given.items() if where == section}
        document[section] = {name: value.replace("{home}", str(home)) if isinstance(value, str) else value for name, value in values.items()}
    try:
        settings = Settings(home=home, this_server=next(iter(servers_of_this_host(environ)), None), **document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        section, name = str(first["loc"][0]), str(first["loc"][1])
        origin = given.get((section, name), (None, "default"))[1]
        # Neither a secret nor a URL with a password may end up on a screen or in a log.
        shown = "" if _extra(section, name) else f", not {first['input']!r}"
        raise ConfigError(f"{section}.{name} (from {origin}): {first['msg']}{shown}") from None
    sending = settings.sending
    if sending.lease_seconds < sending.reply_timeout_seconds + LEASE_SLACK_SECONDS:
        raise ConfigError(
            f"sending.lease_seconds is {sending.lease_seconds}: it must be at least sending.reply_timeout_seconds ({sending.reply_timeout_seconds:g}) plus "
            f"{LEASE_SLACK_SECONDS}, or claims would be taken from senders that only wait for a reply"
        )
    return settings


def describe(environ: Mapping[str, str] = os.environ) -> list[Origin]:
    """Every setting with its value and origin; secrets and passwords in URLs are masked."""
    settings = load(environ)
    given = _collect(settings.home, environ)
    home_origin = "MAIL_PIPELINES_HOME" if environ.get("MAIL_PIPELINES_HOME") else "default"
    rows = [Origin("home", str(settings.home), home_origin, "folder of configuration, database, snapshots and Dagster")]
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            value = getattr(getattr(settings, section), name)
            if is_secret(section, name):
                value = "********" if value else None
            elif value and _extra(section, name).get("url"):
                value = mask_url(str(value))
            origin = given.get((section, name), (None, "default"))[1]
            rows.append(Origin(f"{section}.{name}", value, origin, field.description or ""))
    return rows


def mask_url(url: str) -> str:
    """The URL without its password, for screens and logs."""
    import sqlalchemy

    if url.startswith("/"):
        return url
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "(not a URL)"
