"""On MariaDB: a server that is made has real accounts, which end with it; and two that are made at once do not spend the same money."""

from __future__ import annotations

import datetime as dt
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import DatabaseUnreachable, create_engine, reading, transact
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch.accounts import Account
from mail_pipelines.provisioning import budget, reserving, steps, store
from mail_pipelines.provisioning.credentials import Accounts, folder
from mail_pipelines.provisioning.states import State
from tests.provisioning.world import World

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture
def given(world: World, engine: sa.Engine) -> list[str]:
    """Accounts for which Dagster's storage was asked for. (tests/production has what they may do there.)"""
    asked: list[str] = []

    class Storage:
        def prepare(self) -> None:
            pass

        def environment(self, account: Account) -> dict[str, str]:
            asked.append(account.server)
            return {"DAGSTER_MYSQL_URL": account.url, "MAIL_PIPELINES_BROKER__RESULTS": f"db+mysql://{account.password}@db"}

    settings = world.settings.model_copy(update={"sending": world.settings.sending.model_copy(update={"token_key": "a key for tests"})})
    world.parts = replace(world.parts, settings=settings, credentials=Accounts(engine, settings, Storage()))
    return asked


def test_its_account_works_while_it_serves_and_ends_with_it(world: World, given: list[str]) -> None:
    world.ansible()
    key = world.request()
    assert world.advance(key).state is State.ACTIVE
    kept = folder(world.settings)
    files = {path.name.removeprefix(f"{key}."): path.read_text().strip() for path in kept.iterdir()}
    assert set(files) == {"url", "password", "token_key", "environment"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.iterdir())
    assert given == [key]
    assert [line.partition("=")[0] for line in files["environment"].splitlines()] == ["DAGSTER_MYSQL_URL", "MAIL_PIPELINES_BROKER__RESULTS"]
    # What it was given is what its host has.
    assert (world.place / key / "token_key").read_text().strip() == files["token_key"]
    own = create_engine(files["url"], files["password"])
    with reading(own) as connection:
        assert connection.execute(sa.select(Server.key)).scalars().all() == [key]
    # None of it was told or kept.
    log = (world.settings.home / "log" / "provisioning" / f"{key}.log").read_text()
    for what in ("password", "token_key"):
        assert files[what] not in log
        assert all(files[what] not in line for line in world.said)

    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    assert world.advance(key).state is State.RETIRED
    world.nothing_is_left(key)
    assert list(kept.iterdir()) == []
    own.dispose()
    with pytest.raises(DatabaseUnreachable, match="Access denied"), reading(own) as connection:
        connection.exec_driver_sql("SELECT 1")


def test_two_that_are_made_at_once_do_not_spend_the_same_money(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    north, _ = world.hosters
    world.use(north.source(cost_per_hour=1.0))
    # The money of what is left of a month is little at its end, and that of another one after it.
    now = dt.datetime.now(dt.UTC).replace(day=15)
    for module in (reserving, steps):
        monkeypatch.setattr(module, "database_now", lambda connection: now)
    # Enough for one of them until the end of the month, and not for two.
    world.set(budget=budget.cost_of_one_more(1.0, now) * 1.5, at_once=2)
    keys = [world.request(), world.request()]
    threads = [threading.Thread(target=world.to_the_end, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(one.state for one in world.all().values()) == [State.ACTIVE, State.FAILED]
    assert len(north.hosts) == 1
