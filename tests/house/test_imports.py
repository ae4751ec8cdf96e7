"""The house of ARCHITECTURE.md, held against the source: every module in a room, every import allowed, no circle."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import adapterhub

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder, package in ((ROOT, "adapterhub"), (ROOT / "registry", "adapterhub_registry"))
    for path in (folder / package).rglob("*.py")
    if "templates" not in path.parts
}
ROW = re.compile(r"^\| (\d) \| `(\w+)` \| (manager|runtime) \| (.+) \| ([a-z *]*)\|$", re.MULTILINE)
ROOMS = {
    room: (int(floor), half, may.split())
    for floor, room, half, _, may in ROW.findall((ROOT / "ARCHITECTURE.md").read_text())
}
NO_ROOM = {"adapterhub"}
"""What hands public names on; nothing of ours may import it, so it needs no floor."""


def room_of(module):
    if module.startswith("adapterhub_registry"):
        return "registry"
    return "cli" if module == "adapterhub.__main__" else module.split(".")[1]


def imported(path):
    """The names of modules that a file imports anywhere: at its top, in functions, for type checkers, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


GRAPH = {name: {other for other in imported(path) if other in FILES} - {name} for name, path in FILES.items()}


def test_no_module_is_in_a_circle():
    order = list(TopologicalSorter(GRAPH).static_order())  # a CycleError names the loop
    assert len(order) == len(FILES) > 150
    print("0 circles")


def test_every_module_has_a_room_and_every_room_a_module():
    assert {room_of(name) for name in FILES if name not in NO_ROOM} == set(ROOMS)


def test_the_packages_say_the_floor_the_half_and_the_sentence_of_the_table():
    for floor, room, half, sentence, _ in ROW.findall((ROOT / "ARCHITECTURE.md").read_text()):
        if f"adapterhub.{room}" in FILES and FILES[f"adapterhub.{room}"].name == "__init__.py":
            text = ast.get_docstring(ast.parse(FILES[f"adapterhub.{room}"].read_text())) or ""
            assert f"Floor {floor}, {half}" in text, f"{room}: its docstring does not say 'Floor {floor}, {half}'"
            assert sentence.split(":")[0].replace("`", "").lower() in text.replace("`", "").lower(), room


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_the_table_allows(room):
    floor, _, may = ROOMS[room]
    assert may == ["*"] or all(ROOMS[other][0] <= floor for other in may), "the table itself runs upwards"
    used = set()
    for name in FILES:
        if name in NO_ROOM or room_of(name) != room:
            continue
        for other in GRAPH[name]:
            if other in NO_ROOM:
                assert room == "cli", f"{name} imports {other}"
                continue
            used.add(room_of(other))
            assert may == ["*"] or room_of(other) in (room, *may), f"{name} imports {other}"
    assert may == ["*"] or set(may) <= used, f"not used any more: {set(may) - used}"


def test_nothing_below_imports_a_face_and_only_two_places_the_registry():
    for name in FILES:
        for other in {room_of(other) for other in GRAPH[name] if other not in NO_ROOM}:
            if name not in NO_ROOM and ROOMS[room_of(name)][0] < 6:
                assert ROOMS[other][0] < 6, f"{name} imports {other}"
            if other == "registry" and room_of(name) != "registry":
                assert name == "adapterhub.opening" or name.startswith("adapterhub.cli."), name


def test_the_package_manager_never_imports_torch():
    """Some of `analysis` and `formats` is asked for by commands that are quick, too."""
    manager = [name for name in FILES if name not in NO_ROOM and ROOMS[room_of(name)][1] == "manager"]
    light = [f"adapterhub.analysis.{name}" for name in ("explain", "program", "sites", "doctor", "bom")]
    modules = [name for name in [*manager, *light] if "migrations" not in name and name != "adapterhub.__main__"]
    code = f"import sys\nfor name in {['adapterhub', *modules]!r}: __import__(name)\nprint('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_public_names_exist():
    assert adapterhub.__all__ == sorted(adapterhub.__all__)
    assert all(getattr(adapterhub, name) for name in adapterhub.__all__)


def test_no_module_is_long():
    assert not {name: lines for name, path in FILES.items() if (lines := len(path.read_text().splitlines())) > 300}


def test_no_function_is_long():
    long = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in FILES.items()
        if ".migrations." not in name  # lists of tables, and published: they never change
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long
