"""What Alembic runs around the revisions: it takes the connection, and the transaction, from :func:`migrate`."""

from alembic import context

from server_side.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
