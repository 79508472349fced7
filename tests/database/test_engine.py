"""A database that is locked, away, or wrong is named, with what to do; nothing is half written."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import engine as engines
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseUnreachable, create_engine, database_now, is_mysql, reading, transact
from mail_pipelines.database.models import Brand, CampaignCounter, Suppression
from mail_pipelines.database.upsert import add_to


def brand(key: str) -> dict[str, object]:
    return {"key": key, "name": key, "postal_address": "", "created_at": dt.datetime.now(dt.UTC)}


def test_a_failed_transaction_leaves_nothing(engine: sa.Engine) -> None:
    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Brand).values(brand("one")))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        transact(engine, work)
    with reading(engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(Brand)).scalar_one() == 1


def test_a_database_that_stays_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(engines, "RETRIES", 2)
    path = f"sqlite:///{tmp_path / 'central.sqlite3'}"
    migrate.upgrade(create_engine(path))
    with create_engine(path).connect().execution_options(writing=True) as holder, holder.begin():
        holder.execute(sa.insert(Brand).values(brand("held")))
        with pytest.raises(DatabaseUnreachable, match=r"central.sqlite3 stayed locked .* another program holds a write transaction"):
            transact(create_engine(path), lambda connection: connection.execute(sa.insert(Brand).values(brand("other"))))


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'central.sqlite3'}")
    migrate.upgrade(engine)
    with engine.connect().execution_options(writing=True) as holder, holder.begin():
        holder.execute(sa.insert(Brand).values(brand("held")))
        with reading(engine) as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(Brand)).scalar_one() == 1


@pytest.mark.server
@pytest.mark.parametrize("with_driver", [True, False])
def test_a_connection_that_comes_back_within_a_transaction_holds_no_lock(mariadb: MariaDB, with_driver: bool) -> None:
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    query = "SELECT * FROM brands FOR UPDATE"
    if with_driver:
        raw = engine.raw_connection()
        raw.cursor().execute(query)
        raw.close()
    else:
        with engine.connect() as connection:
            connection.exec_driver_sql(query)
    assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    with create_engine(str(engine.url)).connect() as other:
        assert len(other.exec_driver_sql(f"{query} NOWAIT").all()) == 1


@pytest.mark.server
def test_a_database_server_that_is_away_is_named_without_its_password() -> None:
    with pytest.raises(DatabaseUnreachable) as caught, reading(create_engine("mysql+pymysql://root@127.0.0.1:1/nothing", "topsecret")) as connection:
        connection.execute(sa.text("SELECT 1"))
    assert "check database.url" in str(caught.value)
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("mysql+pymysql://mail@127.0.0.1:3306/mail", True),
        ("mysql+pymysql://mail@localhost/mail", True),
        ("mysql+pymysql://mail@127.0.0.1/mail?ssl_ca=/etc/ca.pem", False),
        ("mysql+pymysql://mail@10.0.0.1/mail", False),
    ],
)
def test_only_a_database_on_the_same_host_is_spoken_to_without_tls(url: str, without: bool) -> None:
    asked: dict[str, object] = {}
    engine = create_engine(url)

    @sa.event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, _words: object, options: dict[str, object]) -> None:
        asked.update(options)
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    assert asked.get("ssl_disabled", False) is without
    assert ("ssl" in asked) is ("ssl_ca" in url)


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "central.sqlite3"
    folder.mkdir()
    with pytest.raises(DatabaseUnreachable, match="cannot be opened"), reading(create_engine(f"sqlite:///{folder}")) as connection:
        connection.execute(sa.text("SELECT 1"))


@pytest.mark.server
def test_a_restarted_database_server_is_used_again(tmp_path: Path) -> None:
    server = MariaDB(tmp_path).start()
    try:
        engine = create_engine(server.database())
        migrate.upgrade(engine)
        server.kill()
        with pytest.raises(DatabaseUnreachable):
            transact(engine, lambda connection: connection.execute(sa.insert(Brand).values(brand("lost"))))
        server.start()
        transact(engine, lambda connection: connection.execute(sa.insert(Brand).values(brand("kept"))))
        with reading(engine) as connection:
            assert connection.execute(sa.select(Brand.key).order_by(Brand.id)).scalars().all() == ["default", "kept"]
    finally:
        server.stop()


@pytest.mark.server
def test_a_deadlock_is_tried_again(mariadb: MariaDB) -> None:
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Brand), [brand("a"), brand("b")])
    both_hold_one = threading.Barrier(2)
    runs: list[str] = []

    def swap(first: str, second: str) -> None:
        met = False

        def work(connection: sa.Connection) -> None:
            nonlocal met
            runs.append(first)
            connection.execute(sa.update(Brand).where(Brand.key == first).values(name=first + second))
            if not met:
                met = True
                both_hold_one.wait(60)
            connection.execute(sa.update(Brand).where(Brand.key == second).values(name=first + second))

        transact(engine, work)

    threads = [threading.Thread(target=swap, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 3, "one of the two was a deadlock's victim and ran again"


@pytest.mark.server
@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_a_process_that_is_stopped_within_a_transaction_holds_up_nobody_for_long(engine: sa.Engine) -> None:
    """As `kill -STOP` or a frozen virtual machine does it: the connection stays, and so would its locks."""
    url = engine.url.render_as_string(hide_password=False)
    program = f"""
import os, signal
from mail_pipelines.database import engine
engine.IDLE_TRANSACTION_SECONDS = 2
def work(connection):
    connection.exec_driver_sql("UPDATE brands SET name = 'stopped'")
    os.kill(os.getpid(), signal.SIGSTOP)
engine.transact(engine.create_engine({url!r}), work)
"""
    stopped = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        renamed = sa.update(Brand).values(name="another")
        begin = time.monotonic()
        transact(engine, lambda connection: connection.execute(renamed))
        assert time.monotonic() - begin < 25
    finally:
        stopped.send_signal(signal.SIGCONT)
        _, said = stopped.communicate(timeout=60)
    assert "DatabaseUnreachable" in said
    with reading(engine) as connection:
        assert connection.execute(sa.select(Brand.name)).scalar_one() == "another"


def test_the_databases_clock_is_near_ours(engine: sa.Engine) -> None:
    before = dt.datetime.now(dt.UTC)
    with reading(engine) as connection:
        now = database_now(connection)
    assert before - dt.timedelta(seconds=5) < now < dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)


def test_times_keep_zone_and_microseconds(engine: sa.Engine) -> None:
    moment = dt.datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    row = {"address_hash": b"x" * 16, "scope_kind": "all", "scope_id": 0, "reason": "manual", "created_at": moment}
    transact(engine, lambda connection: connection.execute(sa.insert(Suppression).values(row)))
    with reading(engine) as connection:
        stored = connection.execute(sa.select(Suppression.created_at, Suppression.address_hash)).one()
    assert stored == (moment.astimezone(dt.UTC), b"x" * 16)


def test_a_time_without_zone_is_refused(engine: sa.Engine) -> None:
    row = {"address_hash": b"x" * 16, "scope_kind": "all", "scope_id": 0, "reason": "manual", "created_at": dt.datetime(2026, 1, 1)}
    with pytest.raises(sa.exc.StatementError, match="without zone"):
        transact(engine, lambda connection: connection.execute(sa.insert(Suppression).values(row)))


def test_counted_rows_add_up(engine: sa.Engine) -> None:
    key = {"campaign_id": 1, "shard": 0, "provider": "google", "server_id": 1}
    for counts in ((3, 5), (4, -7)):
        rows = [key | {"state": state, "count": count} for state, count in zip((0, 1), counts, strict=True)]
        transact(engine, lambda connection, rows=rows: add_to(connection, CampaignCounter, rows, column="count"))
    with reading(engine) as connection:
        assert connection.execute(sa.select(CampaignCounter.count).order_by(CampaignCounter.state)).scalars().all() == [7, -2]
    assert is_mysql(engine) == (engine.dialect.name == "mysql")
