"""The package manager: manifests apart, yanks, tag history, removed versions, signatures, leases, search."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "manifests",
        sa.Column("release", sa.Integer, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("release", name="pk_manifests"),
        _to_release("manifests", "release"),
    )
    op.execute("INSERT INTO manifests (release, data) SELECT id, manifest FROM releases")
    op.add_column("releases", sa.Column("sort", sa.String(27), nullable=False, server_default=""))
    op.add_column("releases", sa.Column("structure", sa.String(71), nullable=False, server_default=""))
    op.add_column("releases", sa.Column("yanked", sa.String))
    op.add_column("blobs", sa.Column("parts", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("parents", sa.Column("label", sa.String(140), nullable=False, server_default=""))
    op.add_column("parents", sa.Column("needed", sa.Boolean, nullable=False, server_default=sa.true()))
    _fill(op.get_bind())
    op.drop_column("releases", "manifest")
    op.create_index("ix_releases_digest", "releases", ["digest"])
    op.create_index("ix_releases_name_sort", "releases", ["name", "sort"])
    op.create_index("ix_releases_structure", "releases", ["structure"])
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("newest", sa.Integer, nullable=False),
        sa.Column("words", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_adapters"),
        _to_release("adapters", "newest"),
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO adapters (name, newest, words) SELECT name, id, lower(name || ' ' || method || ' ' || base)"
        " FROM releases WHERE sort = (SELECT max(r.sort) FROM releases r WHERE r.name = releases.name)"
    )
    op.create_table(
        "tag_moves",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("tag", sa.String(96), nullable=False),
        sa.Column("version", sa.String(40)),
        sa.PrimaryKeyConstraint("id", name="pk_tag_moves"),
    )
    op.create_index("ix_tag_moves_name_tag", "tag_moves", ["name", "tag"])
    op.execute("INSERT INTO tag_moves (name, tag, version) SELECT name, tag, version FROM tags")
    op.create_table(
        "gone",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name="pk_gone"),
    )
    op.create_table(
        "signatures",
        sa.Column("release", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("release", "digest", name="pk_signatures"),
        _to_release("signatures", "release"),
    )
    op.create_table(
        "leases",
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_leases"),
    )
    op.create_table(
        "state",
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_state"),
    )


def _to_release(table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], ["releases.id"], name=f"fk_{table}_releases", ondelete="CASCADE")


def _fill(connection: sa.Connection) -> None:
    """What the new columns say stands in the manifests. A damaged one leaves them empty; `verify` tells of it."""
    for key, version, data in connection.execute(sa.text("SELECT id, version, manifest FROM releases")).all():
        sort = "".join(piece.zfill(9) for piece in version.split("."))
        try:
            manifest = json.loads(data)
            structure = manifest["base"]["structure"]
            parents = manifest.get("parents", ())
            labels = {p["digest"]: f"{p['name']}@{p['version']}" for p in parents}
            needs = {p["digest"] for p in parents if p["relation"] in ("on", "gate", "compose")}
        except (ValueError, TypeError, KeyError):
            structure, labels, needs = "", {}, set()
        connection.execute(
            sa.text("UPDATE releases SET sort = :sort, structure = :structure WHERE id = :id"),
            {"sort": sort, "structure": structure, "id": key},
        )
        for (digest,) in connection.execute(sa.text("SELECT digest FROM parents WHERE release = :id"), {"id": key}):
            connection.execute(
                sa.text("UPDATE parents SET needed = :needed, label = :label WHERE release = :id AND digest = :digest"),
                {"needed": digest in needs, "label": labels.get(digest, ""), "id": key, "digest": digest},
            )
