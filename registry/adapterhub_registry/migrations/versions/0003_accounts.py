"""Accounts of a registry: what is kept of a token is its hash."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("write", sa.String, nullable=False),
        sa.Column("until", sa.String(10)),
        sa.Column("created", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_accounts"),
        sa.UniqueConstraint("hash", name="uq_accounts_hash"),
    )
