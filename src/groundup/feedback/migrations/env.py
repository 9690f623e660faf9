"""What Alembic runs: migrations on the connection that `migrate.py` has opened and will commit.

A new migration is a file versions/vNNNN_what.py. The tests say whether it leads to what tables.py describes, and want
a dump of the schema it leads to (tests/apps/fixtures/dump_schema.py), from which all later ones must migrate.
"""

from alembic import context

from groundup.feedback.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
