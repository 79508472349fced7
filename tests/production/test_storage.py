"""Dagster's storage in a database that speaks TLS: whom it is told to, who else could be in its place, and who makes its tables."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml

from mail_pipelines import home
from mail_pipelines.benchmarks import certificates
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.doctor import daemon
from mail_pipelines.resources import views_dialect

pytestmark = pytest.mark.server

# An address of this host that is no name in the certificate.
OTHER_NAME = "127.1"


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two, the first of which has given the database its certificate."""
    folders = [tmp_path_factory.mktemp("authority") for _ in range(2)]
    for folder in folders:
        certificates.contexts(folder)
    own, other = (str(folder / "certificate.pem") for folder in folders)
    return own, other


@pytest.fixture(scope="module")
def database(authorities: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    own = Path(authorities[0])
    options = (f"--ssl-cert={own}", f"--ssl-key={own.with_name('key.pem')}")
    server = MariaDB(tmp_path_factory.mktemp("database"), options=options).start()
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE dagster CHARACTER SET utf8mb4")
    yield server
    server.stop()


def instance(folder: Path, server: MariaDB, host: str = "localhost", driver: str = "mysql+pymysql", **query: str) -> dg.DagsterInstance:
    url = f"{driver}://root@{host}:{server.port}/dagster?{urlencode(query)}"
    (folder / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"mysql": {"mysql_url": url}}}), encoding="utf-8")
    return dg.DagsterInstance.from_config(str(folder))


# As the centre has it, as a server has it, and as a server has it from a centre with the driver before this one.
@pytest.mark.parametrize(("driver", "more"), [("mysql+pymysql", {}), (views_dialect.DRIVER, {}), (views_dialect.DRIVER, {"ssl_verify_cert": "true"})])
def test_it_is_encrypted_and_trusts_the_authority_that_it_is_given_and_no_other(
    driver: str, more: dict[str, str], database: MariaDB, authorities: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = authorities
    with instance(tmp_path, database, driver=driver, ssl_ca=own, **more) as opened, opened.run_storage.connect() as connection:
        assert connection.dialect.driver == "pymysql"
        assert connection.execute(sa.text("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).one()[1]
    # What public authorities are on other hosts.
    monkeypatch.setenv("SSL_CERT_FILE", own)
    with pytest.raises(sa.exc.OperationalError) as refused:
        instance(tmp_path, database, driver=driver, ssl_ca=other, **more)
    assert "certificate verify failed" in str(refused.value.orig)
    with pytest.raises(sa.exc.OperationalError) as refused:
        instance(tmp_path, database, host=OTHER_NAME, driver=driver, ssl_ca=own, **more)
    assert f"certificate is not valid for '{OTHER_NAME}'" in str(refused.value.orig)


def test_it_is_not_told_to_a_database_without_tls(mariadb: MariaDB, authorities: tuple[str, str], tmp_path: Path) -> None:
    """As somebody between the two would have it."""
    with pytest.raises(sa.exc.OperationalError) as refused:
        instance(tmp_path, mariadb, ssl_ca=authorities[0])
    assert "SSL is required" in str(refused.value.orig)


def test_doctor_names_a_centre_with_the_driver_of_dagsters_documents() -> None:
    def found(driver: str) -> list[str]:
        return [finding.problem for finding in daemon.check_storage_url({}, {"DAGSTER_MYSQL_URL": f"{driver}://dagster:hunter2@db/dagster?ssl_ca=ca.pem"})]

    (problem,) = found("mysql+mysqlconnector")
    assert "trusts all authorities of this host" in problem
    assert "hunter2" not in problem
    assert found("mysql+pymysql") == []


def test_several_that_make_the_home_at_once_make_its_tables_once(mariadb: MariaDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", mariadb.database())
    monkeypatch.setenv("DAGSTER_MYSQL_URL", f"{mariadb.database()}?ssl_disabled=true")
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__URL", f"filesystem://{tmp_path}/broker")
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__RESULTS", f"file://{tmp_path}")
    # Not a `Pool`, which ends its processes by SIGTERM, of which Dagster makes an exception.
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as several:
        done = [future.result() for future in [several.submit(made) for _ in range(3)]]
    assert sorted(map(len, done)) == [0, 0, 3]


def made() -> list[str]:
    return home.make(production=True)
