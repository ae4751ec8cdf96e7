"""Who may import whom: the table of ARCHITECTURE.md, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT, ROOT / "registry")
    for package in ("adapterhub", "adapterhub_registry")
    for path in (folder / package).rglob("*.py")
}
LIGHT = [
    "bounded",
    "claims",
    "errors",
    "manifest",
    "expression",
    "boundary",
    "plugins",
    "platforms",
    "durable",
    "folders",
    "store",
    "index",
    "parts",
    "sources",
    "packages",
    "hub",
    "compose",
    "look.checkup",
    "look.explain",
    "look.touched",
    "care",
    "conflict",
    "huggingface",
    "incoming",
    "lock",
    "locks",
    "names",
    "records",
    "rebuild",
    "backup",
    "project",
    "requirement",
    "resolve",
    "sync",
    "progress",
    "scaffold",
    "settings",
    "train_request",
    "trust",
    "formats.safetensors_header",
    "cli",
]
"""These never import torch, not even through others: `--help`, `list` and `install` are made of them."""
MAY = {
    "bounded": "",
    "claims": "",
    "errors": "",
    "manifest": "bounded claims errors",
    "expression": "errors manifest",
    "platforms": "",
    "locks": "errors platforms",
    "durable": "errors locks platforms",
    "boundary": "errors",
    "plugins": "boundary errors folders lock project settings",
    "form_contracts": "boundary modification",
    "index": "errors manifest",
    "parts": "bounded errors manifest formats",
    "pool": "",
    "store": "errors manifest durable parts pool formats",
    "settings": "bounded durable errors",
    "folders": "durable errors settings",
    "trust": "bounded compose durable errors expression index manifest packages settings store trust",
    "sources": "bounded claims compose durable errors huggingface hub incoming index manifest packages parts progress requirement settings store sources trust versions",
    "train_request": "errors manifest",
    "weights": "errors",
    "sites": "errors weights",
    "magnitude": "",
    "mergers": "errors magnitude mergers",
    "codecs": "errors codecs factors magnitude",
    "forms": "errors lanes modification sites forms",
    "methods": "errors method forms gate sites modification methods",
    "gate": "composers errors lanes modification sites weight_change",
    "lanes": "errors",
    "weight_change": "",
    "modification": "errors lanes sites weight_change composers",
    "composers": "errors form_contracts lanes modification sites weight_change",
}
"""What a module (or package) may import of ours, inside functions too."""


def imported(path, everywhere):
    """Names of modules that a file imports at its top, or anywhere. What only type checkers see does not count."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        or (not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def ours(path, everywhere=True):
    return {
        name.partition(".")[2] if name.startswith("adapterhub.") else name
        for name in imported(path, everywhere)
        if name.startswith("adapterhub")
    }


@pytest.mark.parametrize("part", sorted(MAY))
def test_the_table(part):
    for name, path in FILES.items():
        if name == f"adapterhub.{part}" or name.startswith(f"adapterhub.{part}."):
            foreign = {n for n in ours(path) if n.split(".")[0] not in MAY[part].split()}
            assert not foreign, f"{name} imports {foreign}"


def test_nothing_but_the_cli_imports_the_cli_and_only_open_the_registry():
    for name, path in FILES.items():
        for other in ours(path):
            assert not other.startswith("cli") or name.startswith("adapterhub.cli") or name == "adapterhub.__main__"
            if other.startswith("adapterhub_registry") and not name.startswith("adapterhub_registry"):
                assert name in ("adapterhub.hub", "adapterhub.cli.registry")
        if name.startswith("adapterhub_registry"):
            assert {n.split(".")[0] for n in ours(path)} <= {
                "bounded", "errors", "manifest", "index", "durable", "store", "adapterhub_registry",
                "packages", "names", "incoming", "compose", "formats", "trust",  # the server
            }  # fmt: skip


def test_the_upper_half_never_imports_torch():
    modules = [n for n in FILES if any(n == f"adapterhub.{x}" or n.startswith(f"adapterhub.{x}.") for x in LIGHT)]
    code = f"import sys\nfor name in {[*modules, 'adapterhub']!r}: __import__(name)\nprint('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_public_names_exist():
    import adapterhub

    assert adapterhub.__all__ == sorted(adapterhub.__all__)
    assert all(getattr(adapterhub, name) for name in adapterhub.__all__)


def test_no_module_is_long():
    long = {n: lines for n, p in FILES.items() if (lines := len(p.read_text().splitlines())) > 300}
    assert not long
