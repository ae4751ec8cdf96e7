"""A package to start from: a form and a method that work, a README and a test (`adapterhub plugins new`)."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from adapterhub.errors import NameInUse, UsageError
from adapterhub.files import durable
from adapterhub.plugins.discovery import distribution, names


def make(name: str, where: Path) -> Path:
    """Make the folder adapterhub-<name> in `where`, all of it or nothing; returns it.

    Raises UsageError for a name that cannot be one, NameInUse for a folder or an installed part of that name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name.startswith("adapterhub") or len(name) > 40:
        raise UsageError(
            f"{name!r} is not a name for a plugin",
            "use small letters, digits and single dashes, for example causal-conv; adapterhub- is put before it",
        )
    part = name.replace("-", "_")  # no dashes: a form's name stands in tensor names, a module's in import lines
    for group in ("forms", "methods"):
        if part in names(group):
            owner = distribution(group, part)
            raise NameInUse(f"{owner} already brings {group} named {part!r}", "take another name")
    form = "".join(word.capitalize() for word in name.split("-"))
    module = f"adapterhub_{part}"
    words = {"name": name, "part": part, "module": module, "form": form, "method": f"{form}Method"}
    made = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": "module.py",
        f"test_{part}.py": "test.py",
    }
    folder = where / f"adapterhub-{name}"
    with durable.new_folder(folder) as draft:
        for target, source in made.items():
            template = (
                files("adapterhub.plugins").joinpath(f"templates/plugin/{source}.txt").read_text(encoding="utf-8")
            )
            durable.write_bytes(draft / target, Template(template).substitute(words).encode())
    return folder
