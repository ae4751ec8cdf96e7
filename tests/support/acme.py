"""A package "adapterhub-acme 0.1" with parts of a test's own, importable and listed as an installed one is."""

import importlib
import sys
from textwrap import dedent

from adapterhub import plugins


def install(monkeypatch, folder, source, **parts):
    """Write the module adapterhub_acme and its metadata; parts: group="name = Class"."""
    (folder / "adapterhub_acme.py").write_text(dedent(source).lstrip("\n"))
    info = folder / "adapterhub_acme-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapterhub-acme\nVersion: 0.1\n")
    lines = []
    for group, entry in parts.items():
        name, _, attribute = entry.partition(" = ")
        lines += [f"[adapterhub.{group}]", f"{name} = adapterhub_acme:{attribute}"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "adapterhub_acme", raising=False)
    importlib.invalidate_caches()
    forget()


def forget():
    """Look for installed parts anew."""
    plugins.metadata.entry_points_of.cache_clear()
    plugins.load.cache_clear()
