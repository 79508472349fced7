"""`mysql+views://…`: SQLAlchemy's dialect for mysql-connector, to which views are tables.

Dagster's storage looks for its tables by name and makes those that it does not find. The account of a dispatch server finds views in their place
(`server_storage`), and may make nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.mysql.mysqlconnector import MySQLDialect_mysqlconnector
from sqlalchemy.engine import Connection

DRIVER = "mysql+views"


class ViewsDialect(MySQLDialect_mysqlconnector):
    supports_statement_cache = True

    def get_table_names(self, connection: Connection, schema: str | None = None, **options: Any) -> list[str]:
        return [*super().get_table_names(connection, schema, **options), *self.get_view_names(connection, schema, **options)]


registry.register(DRIVER.replace("+", "."), __name__, ViewsDialect.__name__)
