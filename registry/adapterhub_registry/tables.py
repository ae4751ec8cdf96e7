"""The tables, as the newest migration leaves them (a test compares)."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    false,
    true,
)

HEAD = "0003"
"""The newest migration."""
READABLE = {"0002", HEAD}
"""Those after which everything that installing reads is there."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

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
    Column("sort", String(27), nullable=False, server_default=""),  # the version in digits that sort as text
    Column("structure", String(71), nullable=False, server_default=""),  # the base's
    Column("yanked", String),
    UniqueConstraint("name", "version"),
    Index(None, "digest"),
    Index(None, "name", "sort"),
    Index(None, "structure"),
)


def _release() -> Column:
    return Column("release", ForeignKey("releases.id", ondelete="CASCADE"), primary_key=True)


# The manifest stands here, and among the blobs only to make a lost index again: the row is what makes a release exist,
# and `show` reads no file.
# Its digest is checked whenever it is read. It has a table of its own so that a list need not read past it.
manifests = Table("manifests", metadata, _release(), Column("data", LargeBinary, nullable=False))

# One row an adapter, for search and its pages: its newest release, and the words to look for.
adapters = Table(
    "adapters",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("newest", ForeignKey("releases.id", ondelete="CASCADE"), nullable=False),
    Column("words", String, nullable=False),
    sqlite_with_rowid=False,
)

tags = Table(
    "tags",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("tag", String(96), primary_key=True),
    Column("version", String(40), nullable=False),
    ForeignKeyConstraint(["name", "version"], ["releases.name", "releases.version"], ondelete="CASCADE"),
)

tag_moves = Table(
    "tag_moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(96), nullable=False),
    Column("tag", String(96), nullable=False),
    Column("version", String(40)),
    Index(None, "name", "tag"),
)

# Parents are named by digest and may have been removed by force, so this is no foreign key to releases.
parents = Table(
    "parents",
    metadata,
    _release(),
    Column("digest", String(71), primary_key=True),
    Column("label", String(140), nullable=False, server_default=""),  # name@version
    Column("needed", Boolean, nullable=False, server_default=true()),
    Index(None, "digest"),
)

blobs = Table(
    "blobs",
    metadata,
    _release(),
    Column("digest", String(71), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("parts", Boolean, nullable=False, server_default=false()),
    Index(None, "digest"),
)

# Versions that were removed: their numbers never come back with other bytes.
gone = Table(
    "gone",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("version", String(40), primary_key=True),
    Column("digest", String(71), nullable=False),
)

signatures = Table(
    "signatures",
    metadata,
    _release(),
    Column("digest", String(71), primary_key=True),
    Column("envelope", LargeBinary, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("until", Float, nullable=False),
)

state = Table(
    "state",
    metadata,
    Column("key", String(40), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

# Who may write to a registry. The token itself is nowhere: it has 256 random bits, so its SHA-256 gives nothing away.
accounts = Table(
    "accounts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("write", String, nullable=False),  # names and namespaces, with spaces between; empty for one that only reads
    Column("until", String(10)),  # the last day, in UTC
    Column("created", String(20), nullable=False),
    UniqueConstraint("hash"),
)
