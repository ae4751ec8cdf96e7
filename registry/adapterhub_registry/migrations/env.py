"""Alembic's entry: the connection, and with it the transaction, is the caller's."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
