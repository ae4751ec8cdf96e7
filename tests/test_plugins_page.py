"""docs/authors/plugins.md shows the code that runs, laws.md every law. `python tests/test_plugins_page.py` rewrites what it quotes."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from adapterhub.testing import TRIED, laws
from adapterhub.testing.forms import Declined

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "authors" / "plugins.md"
LAWS = ROOT / "docs" / "authors" / "laws.md"
QUOTE = re.compile(r"<!-- ([^ :]+): class (\w+) -->\n```python\n(.*?)```", re.DOTALL)
PART = re.compile(r"<!-- part: (\w+) (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def source(path: str, name: str) -> str:
    text = (ROOT / path).read_text()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    return ast.get_source_segment(text, node) + "\n"


def test_quoted_classes_are_the_files():
    quotes = QUOTE.findall(PAGE.read_text())
    assert [name for _, name, _ in quotes] == ["Subspace", "LoReFT", "LTSFT", "CausalConv"]
    for path, name, shown in quotes:
        assert shown == source(path, name), f"{name} differs: python tests/test_plugins_page.py"


def test_the_entry_points_are_the_packages():
    shown = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert shown in (ROOT / "plugins" / "adapterhub-loreft" / "pyproject.toml").read_text()


ON_THE_PAGE = [
    ("objectives", "margin"), ("recipes", "shifted"), ("schedules", "upper"), ("mergers", "larger"), ("codecs", "half")
]  # fmt: skip


@pytest.mark.parametrize(("group", "name"), ON_THE_PAGE)
def test_parts_on_the_page_keep_the_laws(group, name):
    code = {(g, n): text for g, n, text in PART.findall(PAGE.read_text())}[group, name]
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    scope = {}
    exec(textwrap.dedent(code), scope)
    declined = []
    for law in laws(group):
        try:
            law(scope[name.capitalize()], "cpu")
        except Declined:
            declined.append(law.__name__)
    # a class made by exec, as here, cannot be imported by another process
    assert declined == {"mergers": ["weighted_sum"], "codecs": ["fresh_process"]}.get(group, [])


@pytest.mark.parametrize("group", TRIED)
def test_every_law_is_explained(group):
    told = re.findall(rf"^\| {group[:-1]} \| `(\w+)` \| \S", LAWS.read_text(), re.MULTILINE)
    assert told == [law.__name__ for law in laws(group)]


if __name__ == "__main__":
    page = QUOTE.sub(lambda m: m[0].replace(f"```python\n{m[3]}", f"```python\n{source(m[1], m[2])}"), PAGE.read_text())
    PAGE.write_text(page)
