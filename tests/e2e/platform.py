"""A whole installation in a temporary folder: Dagster's daemon and web server and two catchers, on free ports."""

from __future__ import annotations

import datetime as dt
import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mail_pipelines import config, home, up
from mail_pipelines.campaigns import progress, scheduling, store, versions, yaml_form
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.progress import Totals
from mail_pipelines.config import Settings
from mail_pipelines.contacts import importing
from mail_pipelines.database import models
from mail_pipelines.database.engine import open_engine, reading, transact
from mail_pipelines.database.models import Claim
from mail_pipelines.demo import campaign as demo_campaign
from mail_pipelines.demo import data
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.messages.tokens import read_delivery
from mail_pipelines.segments import saved, snapshots
from mail_pipelines.supervision import Processes
from tests.parts.processes import wait_for

CONTACTS = 3_000
PER_SECOND = 200.0
SETTINGS = {
    "MAIL_PIPELINES_OPERATION__SENSOR_SECONDS": "2",
    "MAIL_PIPELINES_OPERATION__UI_PORT": "0",
    "MAIL_PIPELINES_SENDING__FIRST_RETRY_SECONDS": "6",
    "MAIL_PIPELINES_SENDING__LINGER_SECONDS": "20",
    "MAIL_PIPELINES_SENDING__LEASE_SECONDS": "30",
    "MAIL_PIPELINES_SENDING__REPLY_TIMEOUT_SECONDS": "15",
}
SENSOR = "query($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) { ... on Sensor { sensorState { id } } } }"
START = "mutation($sensor: SensorSelector!) { done: startSensor(sensorSelector: $sensor) { ... on Sensor { state: sensorState { status } } } }"
STOP = "mutation($id: String!) { done: stopSensor(id: $id) { ... on StopSensorMutationResult { state: instigationState { status } } } }"
CAMPAIGN = """
name: {name}
key: {key}
segments: {{include: [everybody]}}
unsubscribe: all
content:
  from_name: Shop
  from_address: news@shop.test
  subject: "{{{{ first_name | default('Hello') }}}}, news"
  body: |
    <p>Dear {{{{ first_name | default('friend') }}}} {{{{ last_name | default('') }}}}</p>
    <p><a href="https://shop.test/offer">Offer</a> <a href="{{{{ unsubscribe_url }}}}">Unsubscribe</a></p>
"""


@dataclass
class Platform:
    """A running installation; everything below goes through what a user has: the database's own functions, the CLI, the UI."""

    settings: Settings
    engine: sa.Engine
    processes: Processes
    environ: Mapping[str, str]
    address: str = ""

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of this checkout's environment, such as `dagster` or `mail-pipelines`."""
        program = Path(sys.executable).parent / words[0]
        done = subprocess.run([program, *words[1:]], env=dict(self.environ), capture_output=True, text=True, timeout=600, cwd=home.checkout())
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def sensor(self, action: str, name: str) -> None:
        """`start` or `stop` a sensor, as its switch in the UI does."""
        sensor = {"repositoryLocationName": "mail_pipelines", "repositoryName": "__repository__", "sensorName": name}
        found = self.graphql(SENSOR, {"sensor": sensor})["sensorOrError"]["sensorState"]["id"]
        done = self.graphql(*{"start": (START, {"sensor": sensor}), "stop": (STOP, {"id": found})}[action])
        assert done["done"]["state"]["status"] == {"start": "RUNNING", "stop": "STOPPED"}[action]

    def graphql(self, query: str, variables: Mapping[str, Any] | None = None) -> Any:
        body = json.dumps({"query": query, "variables": variables or {}}).encode()
        request = urllib.request.Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def schedule(self, key: str, *, seconds: float = 0) -> None:
        """A campaign to everybody, to start in so many seconds."""
        now = dt.datetime.now(dt.UTC)
        document = yaml_form.parse(CAMPAIGN.format(name=key.title(), key=key))
        transact(self.engine, lambda connection: store.create(connection, document.definition, now))
        assert document.content is not None
        versions.set_content(self.engine, key, document.content, now)
        scheduling.schedule(self.engine, self.settings, key, now, start_at=now + dt.timedelta(seconds=seconds), allow_unverified=True)

    def campaign(self, key: str) -> Campaign:
        with reading(self.engine) as connection:
            return store.load(connection, key)

    def totals(self, key: str) -> Totals:
        with reading(self.engine) as connection:
            return progress.totals(connection, store.load(connection, key)).check()

    def copies(self, key: str) -> Counter[int]:
        """Copies by contact, from what the catchers keep."""
        campaign_id = self.campaign(key).id
        tokens = [read_delivery(message.token, self.settings.token_key()) for message in kept(Path(self.settings.server.mail_folder))]
        return Counter(token.contact_id for token in tokens if token.campaign_id == campaign_id)

    def wait_finished(self, key: str, seconds: float = 400) -> Totals:
        wait_for(lambda: self.campaign(key).state == "finished", seconds=seconds, what=f"campaign {key}")
        return self.totals(key)

    def newest_run(self, partition: str) -> str | None:
        """The id of the newest run of a partition."""
        with sqlite3.connect(self.settings.dagster_home / "history" / "runs.db") as connection:
            row = connection.execute("SELECT run_id FROM runs WHERE partition = ? ORDER BY id DESC LIMIT 1", (partition,)).fetchone()
        return row[0] if row else None

    def working_runs(self, key: str) -> list[str]:
        """Send runs of a campaign that have rows in hand."""
        with reading(self.engine) as connection:
            claims = sa.select(Claim.run_id).join(models.Campaign, models.Campaign.id == Claim.campaign_id)
            found = connection.execute(claims.where(Claim.state == "open", models.Campaign.key == key).distinct()).scalars().all()
        return [run_id for run_id in found if self.status(run_id) == "STARTED"]

    def status(self, run_id: str) -> str | None:
        """What Dagster calls the state of a run."""
        with sqlite3.connect(self.settings.dagster_home / "history" / "runs.db") as connection:
            row = connection.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return row[0] if row else None

    def reported(self, key: str) -> bool:
        """Whether the campaign's final results are there."""
        with sqlite3.connect(self.settings.dagster_home / "history" / "runs.db") as connection:
            tagged = "SELECT COUNT(*) FROM runs JOIN run_tags USING (run_id) WHERE status = 'SUCCESS' AND key = 'dagster/run_key' AND value = ?"
            return bool(connection.execute(tagged, (f"{key}:finished",)).fetchone()[0])

    def limit(self, per_second: float = PER_SECOND) -> None:
        """Let each server send so many messages a second to each provider."""
        for name in self.settings.server.catchers:
            servers.set_limits(self.engine, name, "*", {"connections": 24, "per_second": per_second, "messages_per_connection": 500})

    def start_dagster(self) -> None:
        self.address = up.start_dagster(self.processes, self.settings)


def make(folder: Path, processes: Processes, *, production: bool = False, contacts: int = CONTACTS) -> Platform:
    """A home with contacts, lists, segments and two catchers; Dagster is not started yet."""
    # Seldom, and again soon: on a busy host the daemon may begin after the first time.
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=2)
    os.environ.update(SETTINGS | {"MAIL_PIPELINES_HOME": str(folder), "MAIL_PIPELINES_OPERATION__SNAPSHOT_CRON": f"{soon.minute % 5}-59/5 * * * *"})
    home.make(os.environ, production=production)
    settings = config.load(os.environ)
    engine = open_engine(settings.database)
    now = dt.datetime.now(dt.UTC)
    files = data.write(folder / "files", contacts=contacts)
    for path, list_name in files.imports:
        importing.import_file(engine, path, list_name=list_name, now=now)
    data.engagement(engine, now)
    everybody = "key: everybody\ncriteria: {any: [{in_list: news}, {in_list: shop}]}\n"
    for text in (*demo_campaign.SEGMENTS, everybody):
        saved.save(engine, saved.from_yaml(text), now=now)
    snapshots.refresh_contacts(engine, settings.snapshot_folder, now=now)
    snapshots.refresh_engagement(engine, settings.snapshot_folder, now=now)
    for name in settings.server.catchers:
        up.start_catcher(processes, engine, settings, name)
    platform = Platform(settings, engine, processes, {**os.environ, **home.environment(settings)})
    platform.limit()
    return platform
