"""Column types that mean the same on SQLite and on MySQL/MariaDB."""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

# Autoincrement works on SQLite only for the type INTEGER, which is 64 bits wide there.
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TinyInt = sa.SmallInteger().with_variant(mysql.TINYINT(), "mysql", "mariadb")
# 16 bytes of BLAKE2b over a normalised address (`contacts.addresses.address_hash`).
Hash16 = sa.BINARY(16).with_variant(sa.LargeBinary(16), "sqlite")
Blob = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def ascii_string(length: int) -> sa.types.TypeEngine[str]:
    """A string of ASCII letters compared byte by byte: keys, states, codes. One byte a character in an index."""
    return sa.String(length).with_variant(mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An aware time in UTC with microseconds; naive values are refused rather than guessed."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(mysql.DATETIME(fsp=6) if dialect.name in ("mysql", "mariadb") else sa.DateTime())

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without zone cannot be stored: {value!r}")
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        return None if value is None else value.replace(tzinfo=dt.UTC)
