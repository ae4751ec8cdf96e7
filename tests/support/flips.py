"""Bytes of hub.db that change by themselves: each is noticed by `verify`, or every row reads as before."""

import random
import sqlite3

import adapterhub
from adapterhub.errors import HubError

EXCEPTED = ("leases",)
"""Tables without a seal: a lease ends by itself."""


def rows(path):
    """Every row of every table, as SQLite reads them."""
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        tables = sorted(name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
        found = {t: sorted(map(repr, database.execute(f'SELECT * FROM "{t}"'))) for t in tables if t not in EXCEPTED}
        return found
    finally:
        database.close()


def noticed(root):
    """What `verify` says of a hub, or what opening it does; None for a sound one."""
    try:
        found = adapterhub.open(root).verify("full")
        return str(found[0]) if found else None
    except HubError as error:
        return str(error)


def unnoticed(root, count, seed=0):
    """(flips that were noticed, flips after which rows read otherwise and nobody says so). The hub is left as it was."""
    path, dice = root / "hub.db", random.Random(seed)
    data, before, missed, seen = path.read_bytes(), rows(path), [], 0
    written = [
        place for place, byte in enumerate(data) if byte
    ]  # most of a page is empty: half of the flips go elsewhere
    for _ in range(count):
        place, bit = dice.choice([dice.choice(written), dice.randrange(len(data))]), 1 << dice.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        if noticed(root) is not None:
            seen += 1
            continue
        try:
            same = rows(path) == before
        except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError):
            same = False
        if not same:
            missed.append((place, bit))
    path.write_bytes(data)
    for left in root.glob("hub.db-*"):
        left.unlink()
    return seen, missed
