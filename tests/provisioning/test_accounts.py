"""On MariaDB: a server that is made has real accounts, which end with it; and two that are made at once do not spend the same money."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import DatabaseUnreachable, create_engine, database_now, reading, transact
from mail_pipelines.database.models import Server
from mail_pipelines.provisioning import budget, store
from mail_pipelines.provisioning.credentials import Accounts, folder
from mail_pipelines.provisioning.states import State
from mail_pipelines.resources.storage_accounts import StorageAccounts
from tests.provisioning.world import World

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture
def runs(world: World, engine: sa.Engine) -> Iterator[str]:
    """A schema beside the central database, as Dagster's; the world's servers get accounts of both."""
    name = f"{engine.url.database}_runs"
    settings = world.settings.model_copy(update={"sending": world.settings.sending.model_copy(update={"token_key": "a key for tests"})})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE `{name}`")
        connection.exec_driver_sql(f"CREATE TABLE `{name}`.runs (id INT)")
        world.parts = replace(world.parts, settings=settings, credentials=Accounts(engine, settings, [("storage", StorageAccounts(engine, [name]))]))
        yield name
        connection.exec_driver_sql(f"DROP DATABASE `{name}`")
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS `{engine.url.database}_servers`")


def test_its_accounts_work_while_it_serves_and_end_with_it(world: World, runs: str) -> None:
    world.ansible()
    key = world.request()
    assert world.advance(key).state is State.ACTIVE
    kept = folder(world.settings)
    files = {path.name.removeprefix(f"{key}."): path.read_text().strip() for path in kept.iterdir()}
    assert set(files) == {"url", "password", "token_key", "storage"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.iterdir())
    # What it was given is what its host has.
    assert (world.place / key / "token_key").read_text().strip() == files["token_key"]
    own = create_engine(files["url"], files["password"])
    with reading(own) as connection:
        assert connection.execute(sa.select(Server.key)).scalars().all() == [key]
    storage = create_engine(world.engine.url.set(username=key, password=files["storage"], database=runs).render_as_string(hide_password=False))
    transact(storage, lambda connection: connection.exec_driver_sql("INSERT INTO runs VALUES (1)"))
    with pytest.raises(sa.exc.DBAPIError, match="denied"), reading(storage) as connection:
        connection.exec_driver_sql(f"SELECT 1 FROM `{world.engine.url.database}`.contacts")
    # None of it was told or kept.
    log = (world.settings.home / "log" / "provisioning" / f"{key}.log").read_text()
    for what in ("password", "token_key", "storage"):
        assert files[what] not in log
        assert all(files[what] not in line for line in world.said)

    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    assert world.advance(key).state is State.RETIRED
    world.nothing_is_left(key)
    assert list(kept.iterdir()) == []
    for engine in (own, storage):
        engine.dispose()
        with pytest.raises(DatabaseUnreachable, match="Access denied"), reading(engine) as connection:
            connection.exec_driver_sql("SELECT 1")


def test_two_that_are_made_at_once_do_not_spend_the_same_money(world: World) -> None:
    north, _ = world.hosters
    world.use(north.source(cost_per_hour=1.0))
    with reading(world.engine) as connection:
        now = database_now(connection)
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
