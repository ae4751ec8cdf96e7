"""The command line: which commands there are, and the one place that prints errors."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from adapterhub.cli import (
    backup,
    doctor,
    inspect,
    lock,
    login,
    maintenance,
    make,
    packages,
    plugins,
    project,
    registry,
    run,
    share,
    trust,
    versions,
)
from adapterhub.cli.output import SCHEMA_VERSION, note, shown
from adapterhub.errors import REFUSALS, DiskFull, HubError, NotTrusted
from adapterhub.files import locks

EPILOG = """\b
Exit status:
    0  done                       4  bytes are not what they should be
    1  failed                     5  refused as unsafe
    2  wrong use                130  interrupted
    3  not found, not reached   141  nobody reads the output
                                143  ended by SIGTERM
"""

# typer reads a flag with a default by itself, and imports pydantic (a fifth of the time that `list` takes) to read any
# other parameter; its own --help has no default.
_LIGHT = {"help": False}
_UNASKED = {**_LIGHT, "list": _LIGHT, "ls": _LIGHT, "plugins": {**_LIGHT, "list": _LIGHT}}

app = typer.Typer(
    name="adapterhub",
    epilog=EPILOG,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "default_map": _UNASKED},
    pretty_exceptions_enable=False,
    add_completion=False,
)

PANELS = {
    "Adapters in the hub": {
        "init": packages.init,
        "install": packages.install,
        "list": packages.list_,
        "search": versions.search,
        "show": packages.show,
        "inspect": inspect.inspect,
        "diff": versions.diff,
        "rm": packages.rm,
        "import": packages.import_,
        "export": packages.export,
    },
    "Versions": {
        "log": versions.log,
        "tag": versions.tag,
        "rollback": versions.rollback,
        "yank": versions.yank,
        "unyank": versions.unyank,
        "lineage": versions.lineage,
    },
    "Project": {
        "add": project.add,
        "remove": project.remove,
        "lock": project.lock,
        "sync": project.sync,
        "update": project.update,
        "tree": lock.tree,
        "why": lock.why,
        "outdated": lock.outdated,
    },
    "Make adapters": {
        "train": make.train,
        "merge": make.merge,
        "compress": make.compress,
        "compose": make.compose,
    },
    "Use them": {"run": run.run, "chat": run.chat, "eval": run.eval_, "explain": inspect.explain, "demo": run.demo},
    "Share": {"push": share.push, "serve": registry.old_serve, "login": login.login, "logout": login.logout},
    "Trust": {"sign": trust.sign, "bom": trust.bom, "scan": inspect.scan},
    "Look after the hub": {
        "verify": maintenance.verify,
        "repair": maintenance.repair,
        "gc": maintenance.gc,
        "backup": backup.backup,
        "restore": backup.restore,
        "cache": maintenance.cache,
        "dirs": maintenance.dirs,
        "doctor": doctor.doctor,
    },
}
for panel, commands in PANELS.items():
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel)(function)
app.command("ls", hidden=True)(packages.list_)
app.add_typer(trust.keys, name="key", rich_help_panel="Trust")
app.add_typer(trust.trust, name="trust", rich_help_panel="Trust")
app.add_typer(registry.app, name="registry", rich_help_panel="Share")
app.add_typer(plugins.app, name="plugins", rich_help_panel="Look after the hub")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"adapterhub {version('adapterhub')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The package manager and runtime for adapters.

    \b
    Example:
      adapterhub demo
    """
    if context.invoked_subcommand is None:
        context.get_help()


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit with its status."""
    for name in ("stdout", "stderr"):  # Python has None for one that was closed (`>&-`)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that what is half done is undone
    sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no reason to fail
    warnings.simplefilter("ignore", FutureWarning)  # of a library to its callers, not of ours to a user
    locks.tell = note
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; what a user can cause is printed, a bug is raised."""

    def failed(kind: str, message: str, hint: str, code: int) -> int:
        if "--json" in arguments:
            error = {"kind": kind, "message": message, "hint": hint, "code": code}
            print(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}), file=sys.stderr)
        else:
            print(f"error: {shown(message)}" + (f"\nhint: {shown(hint)}" if hint else ""), file=sys.stderr)
        return code

    try:
        status = typer.main.get_command(app).main(list(arguments), prog_name="adapterhub", standalone_mode=False)
        sys.stdout.flush()
        return status or 0
    except NotTrusted as error:
        if not _asked(error):
            return failed(type(error).__name__, str(error), error.hint, error.code)
        return execute(arguments)
    except HubError as error:
        hint = maintenance.room() if isinstance(error, DiskFull) else error.hint
        return failed(type(error).__name__, str(error), hint, error.code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "adapterhub"
        message, hint = error.format_message(), f"see {path} --help"
        if re.match(r"No such option: -[\d.]", message):
            hint = "an expression that begins with a minus goes in parentheses, or after -- at the end"
        return failed("UsageError", message, hint, error.exit_code)
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return 141
    except SystemExit as error:
        if error.code != 1:
            raise
        _drop_output()  # typer's answer to a broken pipe; its other exits come back as a status
        return 141
    except (KeyboardInterrupt, typer.Abort):  # at a question, typer makes one of the other
        return 130
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _drop_output()
        where = f": {error.filename}" if error.filename else ""
        return failed("OSError", f"{error.strerror}{where}", REFUSALS[error.errno], 1)
    except Exception as error:
        error.add_note("This is a bug in adapterhub, not a mistake of yours: please report it with the lines above.")
        raise


def _asked(error: NotTrusted) -> bool:
    """Ask a person once whether a folder is theirs. Commands open their hub before they do anything, so they can begin again."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    note(str(error))
    question = "Use it, now and later?" if error.kind == "hubs" else "Let them run, now and later?"
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        return False
    from adapterhub.config import folders

    folders.add(error.kind, error.folder)
    return True


def _drop_output() -> None:
    """What stdout could not take goes nowhere: the interpreter's last flush would fail on it again, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
