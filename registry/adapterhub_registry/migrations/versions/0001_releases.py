"""Releases, their tags, parents and blobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "releases",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("method", sa.String, nullable=False),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", sa.String(20), nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_releases"),
        sa.UniqueConstraint("name", "version", name="uq_releases_name_version"),
    )
    op.create_table(
        "tags",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("tag", sa.String(96), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("name", "tag", name="pk_tags"),
        sa.ForeignKeyConstraint(
            ["name", "version"],
            ["releases.name", "releases.version"],
            name="fk_tags_releases",
            ondelete="CASCADE",
        ),
    )
    for table, more in (("parents", []), ("blobs", [sa.Column("size", sa.BigInteger, nullable=False)])):
        op.create_table(
            table,
            sa.Column("release", sa.Integer, nullable=False),
            sa.Column("digest", sa.String(71), nullable=False),
            *more,
            sa.PrimaryKeyConstraint("release", "digest", name=f"pk_{table}"),
            sa.ForeignKeyConstraint(["release"], ["releases.id"], name=f"fk_{table}_releases", ondelete="CASCADE"),
        )
        op.create_index(f"ix_{table}_digest", table, ["digest"])
