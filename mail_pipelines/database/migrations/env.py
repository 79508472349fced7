"""Alembic environment: the engine comes from the caller (`database.migrate`, pytest-alembic)."""

from alembic import context
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.models import Base


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("engine") or context.config.attributes["connection"]
if isinstance(given, Engine):
    with given.connect().execution_options(writing=True) as connection:
        _run(connection)
        connection.commit()
else:
    _run(given)
