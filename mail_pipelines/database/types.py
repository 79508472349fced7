"""Column types that mean the same on SQLite and on MySQL/MariaDB."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import expression

# Autoincrement works on SQLite only for the type INTEGER, which is 64 bits wide there.
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TinyInt = sa.SmallInteger().with_variant(mysql.TINYINT(), "mysql", "mariadb")
# 16 bytes of BLAKE2b over a normalised address (`contacts.addresses.address_hash`).
Hash16 = sa.BINARY(16).with_variant(sa.LargeBinary(16), "sqlite")
Blob = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})", re.ASCII)
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def ascii_string(length: int) -> sa.types.TypeEngine[str]:
    """A string of ASCII letters compared byte by byte: keys, states, codes. One byte a character in an index."""
    return sa.String(length).with_variant(mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")


def byte_string(length: int) -> sa.types.TypeEngine[str]:
    """A string of any characters that is compared as it is written: ids that others gave."""
    return sa.String(length).with_variant(mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


class OrZero(sa.types.TypeDecorator[int]):
    """A positive integer that may be absent, which is stored as 0.

    For columns that are empty at first and filled in later: InnoDB keeps no room for NULL, so the row would grow and pages would
    split (a third of the time of claiming and recording rows).
    """

    impl = sa.Integer
    cache_ok = True

    def __init__(self, kind: type[sa.Integer] = sa.Integer) -> None:
        super().__init__()
        self.kind = kind

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(self.kind())

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> int:
        return value or 0

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> int | None:
        return value or None


class EnhancedCode(sa.types.TypeDecorator[str]):
    """An enhanced status code (RFC 3463) as a number, see `enhanced_number`; absent is 0, as in `OrZero`."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> int:
        return enhanced_number(value)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> str | None:
        return f"{value // 1_000_000}.{value // 1_000 % 1_000}.{value % 1_000}" if value else None


def enhanced_number(code: str | None) -> int:
    """`5.7.26` → 5007026. What no destination should say, and None, is 0."""
    match = _ENHANCED.fullmatch(code or "")
    return int(match[1]) * 1_000_000 + int(match[2]) * 1_000 + int(match[3]) if match else 0


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


class utc_now(expression.FunctionElement[dt.datetime]):
    """The database's clock as an SQL expression, to be read together with the rows it is needed for."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(utc_now, "mysql", "mariadb")
def _mysql_now(_element: utc_now, _compiler: sa.Compiled, **_options: object) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(utc_now, "sqlite")
def _sqlite_now(_element: utc_now, _compiler: sa.Compiled, **_options: object) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"
