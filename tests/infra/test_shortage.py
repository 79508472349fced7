"""A fleet that makes itself, on hosts of kernel namespaces with systemd: from a centre whose campaign nobody can send, by the product's own sensors, jobs and
playbook over SSH, to servers that send it in time, and back to bare hosts.

What belongs here: what only real hosts can show. What does not: the same steps against stand-ins (`tests/provisioning`), and hosts that are unfit
(`test_unfit_hosts`, for which these are bare again).
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter

import pytest

from mail_pipelines.resources import run_tags
from tests.infra.fleet import HOME, SUBJECT, Fleet, left_on, put
from tests.infra.installing import SECRETS, with_any_of
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.xdist_group("machines")]

RECIPIENTS = 300
# From the order of a server to its first message: what issue 5 allows.
COLD_SECONDS = 240
SEGMENT = "{key: visitors, name: Visitors, criteria: {in_list: fair}}"
CAMPAIGN = """
name: Fair
segments: {{include: [visitors]}}
unsubscribe: all
finish_by: {finish_by}
content:
  from_name: Shop
  from_address: news@fair.test
  subject: The fair begins
  body: |
    <p>Dear reader, <a href="{{{{ unsubscribe_url }}}}">Unsubscribe</a></p>
"""


def started(fleet: Fleet, key: str) -> list[str]:
    """When what sends on a server's host, and what asks for it at the centre, was started."""
    units = {fleet.installed.centre: ("daemon", "centre-worker"), fleet.rack[host_of(fleet, key)]: ("exim", "worker", "control")}
    show = ("systemctl", "show", "--property", "ExecMainStartTimestampMonotonic")
    return [on.run(*show, *(f"mail-pipelines-{unit}" for unit in names)).stdout for on, names in units.items()]


def host_of(fleet: Fleet, key: str) -> str:
    address = fleet.value("SELECT host_id FROM provisions WHERE `key` = %s", key).removesuffix(":22")
    return next(name for name, one in fleet.rack.items() if one.host.address == address)


def test_a_campaign_that_nobody_could_send_in_time_is_sent_by_servers_that_were_made_meanwhile(fleet: Fleet) -> None:
    installed, world = fleet.installed, fleet.installed.world
    finish_by = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(minutes=20)
    people = {f"person{number}@people.test" for number in range(RECIPIENTS)}
    put(installed, "/tmp/people.csv", "email\n" + "\n".join(sorted(people)), "0644")
    put(installed, "/tmp/visitors.yaml", SEGMENT, "0644")
    put(installed, "/tmp/fair.yaml", CAMPAIGN.format(finish_by=finish_by.isoformat()), "0644")
    said = fleet.commands("domain add fair.test", "server limits * --per-second 1")
    world.publish(*(line for line in said.splitlines() if " IN " in line))
    fleet.commands(
        "domain check fair.test",
        "contact import /tmp/people.csv --list fair",
        "segment refresh",
        "segment save /tmp/visitors.yaml",
        "campaign import /tmp/fair.yaml",
        "campaign start fair",
    )
    # From an empty fleet.
    wait_for(lambda: fleet.campaign("state") == "sending", seconds=300, what=fleet.log)
    assert fleet.sent() == {}
    fleet.plan()
    (first,) = wait_for(lambda: fleet.servers("warming"), seconds=600, what=fleet.log)

    # Its provider takes far less from it than was planned, and from nobody more than so much a day: now the deadline is in danger.
    fleet.commands(f"server limits * --server {first} --per-second 0.02", "server limits * --per-second 10 --per-day 160")
    wait_for(lambda: fleet.sent()[first], what=fleet.log)
    before = started(fleet, first)
    fleet.plan()
    wait_for(lambda: len(fleet.servers("warming")) == 3, seconds=600, what=fleet.log)
    wait_for(lambda: fleet.campaign("state") == "finished", seconds=300, what=fleet.log)
    assert fleet.campaign("finished_at").replace(tzinfo=dt.UTC) <= finish_by
    assert started(fleet, first) == before

    mails = [message for _, message in world.mail() if SUBJECT in message]
    reached = Counter(found[1].decode() for message in mails for found in re.finditer(rb"(?m)^To: .*?([a-z0-9]+@people\.test)", message))
    assert set(reached) == people
    assert set(reached.values()) == {1}
    made = fleet.servers("warming")
    assert set(fleet.sent()) == made
    caps = fleet.sql("SELECT `key`, curve, step, per_day FROM warm_ups JOIN servers ON servers.id = server_id WHERE provider = '*' ORDER BY `key`")
    assert caps == [(key, "fast", 0, 20_000) for key in sorted(made)]

    provisions = fleet.sql("SELECT `key`, requested_at, ordered_at, state_at FROM provisions ORDER BY id")
    *_, (_, _, second_ordered, second_done), (_, _, third_ordered, third_done) = provisions
    assert max(second_ordered, third_ordered) < min(second_done, third_done), "made one after the other"
    arrived = fleet.first_sent_at()
    cold = {key: round(arrived[key] - asked.replace(tzinfo=dt.UTC).timestamp()) for key, asked, *_ in provisions}
    assert max(cold.values()) < COLD_SECONDS, cold


def test_the_logs_of_their_runs_tell_each_task_and_no_secret(fleet: Fleet) -> None:
    centre, made = fleet.installed.centre, sorted(fleet.servers("warming"))
    words = centre.run("sh", "-c", f"cd {SECRETS}/servers && cat {' '.join(f'{key}.[bpt]*' for key in made)}").stdout.split()
    keys = [centre.run("cat", f"{SECRETS}/{name}").stdout.splitlines() for name in ("ssh", *(f"hosts/{key}" for key in made))]
    # Frame and first line are those of all such keys.
    secrets = {*words, *(line for key in keys for line in key[2:-1])}
    assert len(secrets) > 5 * len(made)
    assert [path for path in with_any_of(centre, secrets) if not path.startswith(f"{SECRETS}/")] == []
    with fleet.database.cursor() as cursor:
        for key in made:
            query = "SELECT event FROM dagster.event_logs JOIN dagster.run_tags USING (run_id) WHERE run_tags.`key` = %s AND value = %s"
            cursor.execute(query, (run_tags.SERVER, key))
            events = [event for (event,) in cursor.fetchall()]
            assert [secret for secret in secrets if any(secret in event for event in events)] == []
            told = "\n".join(json.loads(event)["user_message"] for event in events)
            # Ansible's own words are kept.
            kept = centre.run("cat", f"{HOME}/log/provisioning/{key}.log").stdout
            tasks = re.findall(r"(?m)^TASK \[(?:\w+ : )?(.+)\] \*+\n(?:ok|changed): ", kept)
            assert len(tasks) > 20
            assert [task for task in tasks if f"{key}: {task}: " not in told] == []


def test_they_retire_and_their_hosts_are_bare_again(fleet: Fleet) -> None:
    made = fleet.servers("warming")
    fleet.commands(*(f"server remove {name} --now" for name in made))
    wait_for(lambda: fleet.servers("retired") >= made, seconds=300, what=fleet.log)
    assert fleet.sql("SELECT DISTINCT servers.state, ended_at IS NOT NULL FROM servers JOIN provisions USING (`key`)") == [("retired", 1)]
    for one in fleet.rack.values():
        assert (one.name, left_on(one)) == (one.name, "")
    accounts = fleet.value("SELECT COUNT(*) FROM mysql.user WHERE user REGEXP '^mail-[0-9]'")
    assert accounts == fleet.value("SELECT COUNT(*) FROM servers WHERE account IS NOT NULL")
    kept = fleet.installed.centre.run("ls", f"{SECRETS}/servers", f"{SECRETS}/hosts").stdout
    assert not any(re.search(rf"(?m)^{name}(\.|$)", kept) for name in made)
