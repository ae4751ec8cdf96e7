"""The commands that crash tests run, and the folder that they run on."""

import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import adapterhub
from adapterhub.errors import HubError
from adapterhub.install import options
from adapterhub.install import project as sync
from adapterhub.recovery import repair
from adapterhub.recovery.backup import backup, restore
from adapterhub.recovery.rebuild import rebuild
from adapterhub.sources.disk import Disk
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent
from adapterhub.store import gc
from adapterhub.store.history import yank

HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
TENSORS = len(HEADER).to_bytes(8, "little") + HEADER + b"\1\2\3\4"


def large(seed):
    """A tensor file in parts: a large tensor that all of them share, and a small one of its own."""
    header = b'{"a":{"dtype":"U8","shape":[70000],"data_offsets":[0,70000]},"b":{"dtype":"U8","shape":[9],"data_offsets":[70000,70009]}}'
    return len(header).to_bytes(8, "little") + header + bytes(70000) + bytes([seed]) * 9


_WIDE = b'{"a":{"dtype":"U8","shape":[400000],"data_offsets":[0,400000]}}'
LARGE = len(_WIDE).to_bytes(8, "little") + _WIDE + random.Random(0).randbytes(400_000)


def publish(hub, name="me/x", tensors=TENSORS, parents=()):
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    parents = [Parent(name=p.name, version=p.version, digest=p.digest, relation="on") for p in parents]
    manifest = Manifest(name=name, version="0.0.0", base=base, method=Made(name="lora"), parents=parents)
    return hub.publish(manifest, {"tensors": tensors, "log": b"log" + name.encode()}, b"rows")[0]


def make_before(folder):
    """A hub to work on, one to install from, a bundle, and a hub of the first schema."""
    hub = adapterhub.open(folder / "hub", create=True)
    publish(hub, "me/old")
    publish(hub, "me/going", TENSORS[:-1] + b"\5")
    hub.tag("me/going", "stable")
    hub.store.put(b"stray")
    low_ranks(hub)
    other = adapterhub.open(folder / "other", create=True)
    parent = publish(other, "me/parent", large(1))
    publish(other, "me/child", large(2), [parent])
    other.export_bundle("me/child", folder / "bundle")
    first_schema(folder / "fresh")
    return folder


WIDE = ("sync", "repair", "rebuild", "backup", "restore")
"""Commands that need what `make_wide` adds."""


def make_wide(folder):
    """That, and a hub whose index is damaged, one whose blobs are, a backup, and a project."""
    make_before(folder)
    other = adapterhub.open(folder / "other")
    parent = other.resolve("me/parent")
    shutil.copytree(folder / "other", folder / "lost")
    (folder / "lost" / "hub.db").write_bytes(b"no database" * 100)
    shutil.copytree(folder / "other", folder / "torn")
    torn = adapterhub.open(folder / "torn")
    for blob in torn.store.blobs(parent.manifest.files["tensors"])[1:]:
        torn.store.path(blob.digest).write_bytes(b"torn")
    torn.store.path(parent.digest).unlink()
    backup(other, folder / "kept.tar")
    (folder / "project").mkdir()
    (folder / "project" / "adapterhub.toml").write_text(
        '[adapters]\n"me/child" = "*"\n[sources.other]\npath = "../other"\n'
    )
    return folder


def low_ranks(hub):
    """me/l1 and me/l2, to merge and to compress."""
    import torch

    from adapterhub.adapters.publish import publish_tensors
    from adapterhub.forms.low_rank import LowRank

    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    for i in (1, 2):
        dice = torch.Generator().manual_seed(i)
        down, up = torch.randn(4, 6000, generator=dice), torch.randn(50, 4, generator=dice)
        part = LowRank(down=down, up=up, scale=torch.tensor(1.0))
        publish_tensors(hub, {"m.q": [part]}, name=f"me/l{i}", base=base, sketch=b"rows", method=Made(name="lora"))


def first_schema(folder):
    """A hub as the first migration made it, with one release."""
    import sqlite3

    from adapterhub_registry import migrate
    from alembic import command
    from sqlalchemy import create_engine

    folder.mkdir()
    (folder / "blobs").mkdir()
    engine = create_engine(f"sqlite:///{folder / 'hub.db'}")
    configuration = migrate.config()
    with engine.begin() as connection:
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, "0001")
    engine.dispose()
    sketch = digest_of(b"")
    base = Base(name="t", architecture="llama", structure=digest_of(b"s"), sketch=File(digest=sketch, size=0))
    data = Manifest(name="me/first", version="0.1.0", base=base, method=Made(name="lora")).encode()
    with sqlite3.connect(folder / "hub.db") as database:
        row = ("me/first", "0.1.0", digest_of(data), "lora", "t", 0, "2026-01-01T00:00:00Z", data)
        database.execute(
            "INSERT INTO releases (name, version, digest, method, base, size, created, manifest) VALUES (?,?,?,?,?,?,?,?)",
            row,
        )
        database.execute("INSERT INTO blobs VALUES (1, ?, 0)", (sketch,))
    database.close()
    path = folder / "blobs" / "sha256" / sketch[7:9] / sketch[7:]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")


def _hub(folder):
    return adapterhub.open(folder / "hub")


def _sync(folder):
    hub, project = _hub(folder), folder / "project"
    sync.sync(hub, project, sync.lock(hub, project, options.Options())[0], options.Options())


COMMANDS = {
    "publish": lambda folder: publish(_hub(folder), "me/new", TENSORS[:-1] + b"\x08"),
    "publish parts": lambda folder: publish(_hub(folder), "me/new", large(8)),
    "install a bundle": lambda folder: _hub(folder).install(folder / "bundle"),
    "install from a hub": lambda folder: _hub(folder).install(f"{folder / 'other'}:me/child"),
    "sync": _sync,
    "merge": lambda folder: _hub(folder).merge(["me/l1", "me/l2"], name="me/merged"),
    "compress": lambda folder: _hub(folder).compress("me/l1", codec="svd", options={"rank": 1}, name="me/compressed"),
    "remove": lambda folder: _hub(folder).remove("me/going"),
    "tag": lambda folder: _hub(folder).tag("me/old", "stable"),
    "yank": lambda folder: yank(_hub(folder), "me/old@0.1.0", "bad"),
    "gc": lambda folder: gc.gc(_hub(folder)),
    "export": lambda folder: _hub(folder).export_bundle("me/old", folder / "out"),
    "migrate": lambda folder: adapterhub.open(folder / "fresh").releases(),
    "repair": lambda folder: repair.repair(adapterhub.open(folder / "torn"), [Disk(folder / "other")]),
    "rebuild": lambda folder: rebuild(folder / "lost"),
    "backup": lambda folder: backup(_hub(folder), folder / "out.tar"),
    "restore": lambda folder: restore(folder / "kept.tar", folder / "restored"),
    "init": lambda folder: publish(adapterhub.open(folder / "begun", create=True)),
}


def loop(folder, seed):
    """Whatever commands, for ever, in an order of its own."""
    dice, folder = random.Random(seed), Path(folder)
    print("running", flush=True)
    while True:
        with suppress(HubError):
            name = dice.choice(
                ["publish", "publish parts", "install a bundle", "install from a hub", "remove", "tag", "gc"]
            )
            if name.startswith("publish"):
                publish(_hub(folder), f"me/n{dice.randrange(5)}", large(dice.randrange(250)))
            elif name == "remove":
                _hub(folder).remove(f"me/n{dice.randrange(5)}")
            else:
                COMMANDS[name](folder)


if __name__ == "__main__":
    loop(sys.argv[1], int(sys.argv[2]))
