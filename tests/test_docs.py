"""What the pages and docstrings point to is there: files, links, headings, commands."""

import re
from pathlib import Path

import pytest
import typer

from adapterhub.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md")])
SOURCES = sorted(
    path
    for folder in ("adapterhub", "registry", "plugins", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAMED = re.compile(r"\bdocs/[\w./-]+\.md\b")
FILE = re.compile(r"`((?:adapterhub|registry|plugins|examples|benchmarks|tests)/[\w./-]+)`")
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`(?:uv run )?(adapterhub [a-z][^`]*)`")


def anchors(page):
    """The names that headings have on the web: lower case, spaces as dashes, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target, anchor in LINK.findall(page.read_text()):
        there = (page.parent / target).resolve() if target else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert not broken


def test_pages_that_are_named_exist():
    lost = {
        (name, str(path.relative_to(ROOT)))
        for path in [*PAGES, *SOURCES]
        for name in NAMED.findall(path.read_text())
        if not (ROOT / name).is_file()
    }
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    named = set(FILE.findall(page.read_text())) - {"plugins/adapterhub-NAME"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def command_lines(page):
    """What follows "adapterhub" on the lines of a page's console blocks and in its `code`."""
    text = page.read_text()
    shown = [
        re.sub(r"^\$ (uv run )?", "", line)
        for block in CONSOLE.findall(text)
        for line in re.sub(r"\\\n\s*", " ", block).splitlines()
        if line.startswith("$ ")
    ]
    for line in [*shown, *INLINE.findall(CONSOLE.sub("", text))]:
        words = line.split("#")[0].replace('"', " ").replace("'", " ").split()
        if words[:1] == ["adapterhub"]:
            yield words[1:]


def command(words):
    """The command that begins with these words, and the words after its name; None if there is none."""
    at, words = typer.main.get_command(app), list(words)
    while hasattr(at, "commands"):
        if not words or words[0] not in at.commands:
            return None if words and not words[0].startswith("-") else (at, words)
        at = at.commands[words.pop(0)]
    return at, words


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_exist(page):
    wrong = []
    for words in command_lines(page):
        found = command(words)
        known = (
            {name for parameter in found[0].params for name in parameter.opts} | {"--help", "--version"}
            if found
            else set()
        )
        given = {word.partition("=")[0] for word in found[1] if re.match(r"--[a-z]", word)} if found else set()
        if found is None or given - known:
            wrong.append(" ".join(words))
    assert not wrong


def test_the_readme_shows_commands():
    shown = {words[0] for words in command_lines(ROOT / "README.md") if words}
    assert shown >= {"init", "train", "eval", "import", "export", "compress", "merge", "run", "compose", "install"}


def test_every_promise_of_security_names_tests_that_are_there():
    """`file::test`, or `::test` of the file named before it; `...` and `*` stand for the rest of a name."""
    page = (ROOT / "docs" / "guide" / "security.md").read_text()
    source, named = "", 0
    for file, test in re.findall(r"`(test_\w+)?(?:::(\w+?)(?:_?\.\.\.|\*)?)?`", page):
        if file:
            source = (ROOT / "tests" / f"{file}.py").read_text()
        if test:
            assert f"def {test}" in source, test
        named += bool(file or test)
    assert named > 50
