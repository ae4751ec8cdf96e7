"""Bring a database up to the newest schema. Imports Alembic, so it is imported only when there is something to do."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from adapterhub.errors import HubError


def upgrade(connection: Connection, path: Path) -> None:
    """Run what is missing, inside the connection's transaction: all of it, or nothing.

    Raises HubError when the database at path is newer than this adapterhub."""
    configuration = config()
    configuration.attributes["connection"] = connection
    try:
        command.upgrade(configuration, "head")
    except CommandError:
        raise HubError(f"{path} was made by a newer adapterhub", "update adapterhub") from None


def config() -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return configuration


def head() -> str | None:
    """The newest migration's name."""
    return ScriptDirectory.from_config(config()).get_current_head()
