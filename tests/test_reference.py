"""docs/reference: commands.md is what `--help` says (`python tests/test_reference.py` rewrites it), python.md has every public name."""

import re
from pathlib import Path

import typer

import adapterhub
from adapterhub.cli.app import app

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
COMMANDS = REFERENCE / "commands.md"
HEAD = """# Commands

What `adapterhub COMMAND --help` says, on one page (`python tests/test_reference.py` writes it). Every command also takes `--help`.
"""
TAKES = {"int": "NUMBER", "float": "NUMBER", "Path": "PATH", "str": "TEXT", "list[str]": "TEXT"}


def text(words):
    """Help text as Markdown: nothing in it is markup but its `code`."""
    pieces = re.split(r"(`[^`]*`)", " ".join(words.split()))
    pieces[::2] = [re.sub(r"([\\*_|\[\]])", r"\\\1", plain).replace("<", "&lt;") for plain in pieces[::2]]
    return "".join(pieces)


def parameter(given):
    """How an argument or option is written, with what it takes."""
    annotation = given.type_descriptor.annotation
    takes = given.metavar or TAKES.get(getattr(annotation, "__name__", ""), TAKES.get(str(annotation), "TEXT"))
    if not given.opts[0].startswith("-"):
        return takes
    return ", ".join(given.opts) + ("" if given.is_flag else f" {takes}")


def rows(command):
    shown = [given for given in command.params if not getattr(given, "hidden", False)]
    if not shown:
        return []
    table = [f"| `{parameter(given)}` | {text(given.help or '')}{' (required)' * given.required} |" for given in shown]
    return ["| | |", "|---|---|", *table, ""]


def explanation(command):
    """A command's help: its paragraphs, and its example as a console block."""
    lines = []
    for paragraph in command.help.split("\n\n"):
        if not paragraph.startswith("\b\n"):
            lines += [text(paragraph), ""]
            continue
        _, title, *example = paragraph.splitlines()
        assert title in ("Example:", "Examples:"), title
        code = [re.sub("^  ", "", line) for line in example]
        lines += ["```console", *[f"$ {line}" if line.startswith("adapterhub") else line for line in code], "```", ""]
    return lines


def section(name, command):
    nested = getattr(command, "commands", {})
    lines = [f"### {name}", "", *explanation(command), *rows(command)]
    for word, inner in nested.items():
        lines += section(f"{name} {word}", inner)
    return lines


def page():
    """Each command below its panel, in the order of `adapterhub --help`."""
    everything = typer.main.get_command(app)
    panels = {}
    for name, command in everything.commands.items():
        if not command.hidden:
            panels.setdefault(command.rich_help_panel, []).extend(section(f"adapterhub {name}", command))
    lines = [HEAD]
    for panel, commands in panels.items():
        lines += [f"## {panel}", "", *commands]
    status = everything.epilog.removeprefix("\b\n").partition(":\n")[2].rstrip()
    return "\n".join([*lines, "## Exit status", "", "```text", status, "```", ""])


def test_the_commands_page_is_what_help_says():
    assert COMMANDS.read_text() == page(), "stale: python tests/test_reference.py"


def test_the_python_page_has_every_public_name():
    shown = re.findall(r"^::: adapterhub\.(\w+)$", (REFERENCE / "python.md").read_text(), re.MULTILINE)
    assert set(shown) - {"errors"} == set(adapterhub.__all__)


if __name__ == "__main__":
    COMMANDS.write_text(page())
