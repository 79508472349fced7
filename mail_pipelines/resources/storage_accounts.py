"""The account of a dispatch server in the schemas where Dagster keeps runs and workers keep results, which has the server's name (docs/production.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database.engine import explained
from mail_pipelines.errors import MailPipelinesError


class StorageAccountError(MailPipelinesError):
    """The centre's account of the database may not do this; the message says what it needs."""


@dataclass(frozen=True)
class StorageAccounts:
    """`engine`: of the central database, on whose host these `schemas` are."""

    engine: Engine
    schemas: Sequence[str]

    def put(self, account: str, password: str) -> None:
        statements = ["CREATE USER IF NOT EXISTS %s@'%%' IDENTIFIED BY %s", "ALTER USER %s@'%%' IDENTIFIED BY %s"]
        self._execute([(statement, (account, password)) for statement in statements])
        quote = self.engine.dialect.identifier_preparer.quote_identifier
        self._execute([(f"GRANT SELECT, INSERT, UPDATE, DELETE, EXECUTE ON {quote(schema)}.* TO %s@'%%'", (account,)) for schema in self.schemas])

    def delete(self, account: str) -> None:
        self._execute([("DROP USER IF EXISTS %s@'%%'", (account,))])

    def _execute(self, statements: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        with explained(self.engine), self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            try:
                # As the centre's own connection is.
                demand = "REQUIRE SSL" if connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Ssl_cipher'").one()[1] else "REQUIRE NONE"
                for statement, values in statements:
                    connection.exec_driver_sql(f"{statement} {demand}" if statement.startswith("ALTER") else statement, values)
            except sa.exc.DBAPIError as error:
                raise StorageAccountError(
                    f"the centre's account of the database may not make or end accounts for {', '.join(self.schemas)} ({_words(error)}): it needs CREATE USER, "
                    "and all rights on these schemas with grant option (docs/provisioning.md)"
                ) from None


def _words(error: sa.exc.DBAPIError) -> str:
    arguments: tuple[object, ...] = getattr(error.orig, "args", ())
    return str(arguments[1] if len(arguments) > 1 else error.orig)
