"""Every error a user can cause. One line what is wrong, one line what to do; the CLI prints both, exit status `code`."""

from __future__ import annotations

import errno
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


AGAIN = "get the adapter again from its source"
"""What to do about bytes that are not what they should be."""
REFUSALS = {
    errno.ENOSPC: "make room on the disk; nothing half-written is left behind",
    errno.EDQUOT: "make room in your quota; nothing half-written is left behind",
    errno.EROFS: "use a folder that can be written to",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What the machine refuses, not what code does wrong, and what to do about it."""


class HubError(Exception):
    """What is wrong (`str(error)`, one line; lists may follow on further lines) and what to do about it (`hint`)."""

    code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class UsageError(HubError):
    """Arguments that contradict each other or name no known option."""

    code = 2


class NotFound(HubError):
    """No such adapter, version, tag, base, file or hub."""

    code = 3


class Unreachable(HubError):
    """A source that does not answer, or not in time, or that refuses us."""

    code = 3


class IntegrityError(HubError):
    """Bytes that are not what their digest or their header says."""

    code = 4


class DiskFull(HubError):
    """There is no room for what was to be written; nothing of it is left."""


class UnsafeFile(HubError):
    """A file that we refuse to open: pickle, a hostile header, non-finite weights."""

    code = 5


class NotTrusted(UnsafeFile):
    """A hub or a project that was found from the working directory, and that the user has not called their own."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        what = {
            "hubs": f"the hub in {folder} is not one that you made: it may be a stranger's",
            "projects": f"{folder}/adapterhub.toml enables plugins, which are code, and you have not allowed it to",
        }[kind]
        super().__init__(what, f"if you trust it: adapterhub trust folder {shlex.quote(str(folder))}")


class ManifestError(HubError):
    """A manifest that is not one."""


class NameInUse(HubError):
    """A version that exists already with other bytes."""


class TagMoved(HubError):
    """A tag that no longer means what its mover expected."""


class IncompatibleBase(HubError):
    """The adapter was made for another base model, or its tensors match no site of this one."""


class NoEffect(HubError):
    """An adapter that changes nothing."""


class PluginError(HubError):
    """A part that is not installed, that does not load, or whose code raises or returns what it must not."""

    code = 3
    fault: Fault | None = None
    """What its code did wrong and where, if it ran."""


class NotFoldable(HubError):
    """The modification is no change of a weight (it is not linear in the module's input)."""


class NotMergeable(HubError):
    """These adapters have no common merge; stack or mix them instead."""


class CodecError(HubError):
    """Tensors that a codec cannot encode or decode."""


class ExpressionError(HubError):
    """A composition that does not parse, with a caret under the place."""

    code = 2

    def __init__(self, text: str, position: int, problem: str, hint: str = ""):
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^", hint)
        self.position = position


class BatchError(HubError):
    """A batch, cache or generation option that does not fit the adapters given for its rows."""


class DataError(HubError):
    """Training or evaluation data that is malformed; names the file and line."""


class ParentsWarning(UserWarning):
    """An adapter that was trained over others is used without them."""


class YankedWarning(UserWarning):
    """A version is used that its publisher has taken out of choice."""


class NameWarning(UserWarning):
    """A name that readers take for another one."""


class ContextWarning(UserWarning):
    """Rows, or what is generated, are longer than the base was trained for."""


class ScanWarning(UserWarning):
    """An adapter's weights are unlike those of others."""


@dataclass(frozen=True)
class Fault:
    """What plugin code did wrong, and where."""

    part: str
    hook: str
    site: str
    what: str
    line: str
    """The author's line, "adapterhub_acme/forms.py:31"; "" where none is known."""

    def error(self) -> PluginError:
        """Return the error that says so."""
        package = self.part.partition(" ")[0].rstrip(":")
        error = PluginError(
            ", ".join(filter(None, (self.part, self.hook, self.site))) + f": {self.what}",
            f"report it to the author of {package}" + (f": {self.line}" if self.line else ""),
        )
        error.fault = self
        return error


def plain(text: object, length: int = 300) -> str:
    """Foreign words for an error of ours: one line, control characters escaped, cut."""
    words = " ".join(str(text)[: 2 * length].split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in words)
    return escaped if len(escaped) <= length else escaped[:length] + "..."
