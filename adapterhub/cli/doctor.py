"""The command that says whether an installation is sound."""

from __future__ import annotations

from typing import Any

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, out
from adapterhub.errors import HubError, PluginError

LIBRARIES = ("adapterhub", "torch", "transformers", "peft", "safetensors", "huggingface-hub", "sqlalchemy")


def doctor(as_json: Json = False) -> None:
    """Say what this installation consists of, and what is wrong with it.

    Exit status 1 if something is.

    \b
    Example:
      adapterhub doctor
    """
    import platform
    import sqlite3
    from contextlib import suppress
    from importlib.metadata import PackageNotFoundError, version

    from adapterhub.analysis.doctor import brought, unmet

    facts, problems = {}, []
    facts["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):  # `unmet` says so
            facts[library] = version(library)
    problems += unmet()
    facts["sqlite"] = sqlite3.sqlite_version
    facts["devices"] = _devices()
    for group, packages in brought().items():
        facts[group] = [f"{package}{_idle(package)}: {' '.join(names)}" for package, names in packages.items()]
    problems += _broken_parts()
    try:
        facts |= _hub(problems)
    except HubError as error:
        problems.append(f"{error} ({error.hint})")
    if as_json:
        json_out({"facts": facts, "problems": problems})
    else:
        for key, value in facts.items():
            for n, line in enumerate(value if isinstance(value, list) else [value]):
                out(f"{'' if n else key + ':':<17}{line}")
        for problem in problems:
            out(f"{'problem:':<17}{problem}")
    if problems:
        raise typer.Exit(1)


def _idle(package: str) -> str:
    from adapterhub import plugins

    owner = package.partition(" ")[0]
    return "" if owner == "adapterhub" or plugins.is_enabled(owner) else " (not enabled)"


def _devices() -> list[str]:
    import os

    import torch

    found = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"{device.major}.{device.minor}"
        found.append(f"cuda:{i} ({device.name}, {device.total_memory / 1e9:.0f} GB, compute capability {capability})")
    return found


def _broken_parts() -> list[str]:
    from adapterhub import plugins

    broken = []
    for group in plugins.GROUPS:
        try:
            names = plugins.enabled_names(group)
        except PluginError as error:  # two packages bring one name
            broken.append(f"{error} ({error.hint})")
            continue
        for name in names:
            try:
                plugins.load(group, name)
            except PluginError as error:
                broken.append(f"{error} ({error.hint})")
    return broken


def _hub(problems: list[str]) -> dict[str, Any]:
    """Facts about the hub of this folder; what is wrong with it is added to the problems."""
    import sqlite3

    from adapterhub.analysis.doctor import uninstalled

    hub = adapterhub.open()
    problems += [str(problem) for problem in hub.verify()]
    problems += uninstalled(hub)
    with sqlite3.connect(f"{(hub.root / 'hub.db').as_uri()}?mode=ro", uri=True) as connection:
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    rows = hub.releases()
    return {
        "hub": str(hub.root),
        "journal": journal,
        "adapters": len({row.name for row in rows}),
        "releases": len(rows),
    }
