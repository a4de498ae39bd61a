"""What Alembic runs around all revisions: :func:`wire.database.migrate` gives it the connection and the transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], version_table=context.config.attributes["version_table"]
)
context.run_migrations()
