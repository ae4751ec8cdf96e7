"""The tables, as the newest migration leaves them (a test compares)."""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

HEAD = "0001"
"""The newest migration."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# The manifest stands here and not among the blobs: the row is what makes a release exist, and `show` reads no file.
# Its digest is checked whenever it is read.
releases = Table(
    "releases",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(96), nullable=False),
    Column("version", String(40), nullable=False),
    Column("digest", String(71), nullable=False),
    Column("method", String, nullable=False),
    Column("base", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", String(20), nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    UniqueConstraint("name", "version"),
)


def _release() -> Column:
    return Column("release", ForeignKey("releases.id", ondelete="CASCADE"), primary_key=True)


tags = Table(
    "tags",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("tag", String(96), primary_key=True),
    Column("version", String(40), nullable=False),
    ForeignKeyConstraint(["name", "version"], ["releases.name", "releases.version"], ondelete="CASCADE"),
)

# Parents are named by digest and may have been removed by force, so this is no foreign key to releases.
parents = Table(
    "parents",
    metadata,
    _release(),
    Column("digest", String(71), primary_key=True),
    Index(None, "digest"),
)

blobs = Table(
    "blobs",
    metadata,
    _release(),
    Column("digest", String(71), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Index(None, "digest"),
)
