"""`mysql+views://…`: SQLAlchemy's dialect for PyMySQL, to which views are tables.

Dagster's storage looks for its tables by name and makes those that it does not find. The account of a dispatch server finds views in their place
(`server_storage`), and may make nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql
from sqlalchemy.engine import URL, Connection

DRIVER = "mysql+views"


class ViewsDialect(MySQLDialect_pymysql):
    supports_statement_cache = True

    def get_table_names(self, connection: Connection, schema: str | None = None, **options: Any) -> list[str]:
        return [*super().get_table_names(connection, schema, **options), *self.get_view_names(connection, schema, **options)]

    def create_connect_args(self, url: URL, _translate_args: dict[str, Any] | None = None) -> Any:
        # Addresses of older accounts have it, from when mysql-connector was the driver. PyMySQL verifies by `ssl_ca`, and would forget that file over it.
        return super().create_connect_args(url.difference_update_query(["ssl_verify_cert"]), _translate_args)


registry.register(DRIVER.replace("+", "."), __name__, ViewsDialect.__name__)
