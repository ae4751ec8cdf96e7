"""A base's chat template, rendered where it can do no harm: by transformers, in a process of its own, within limits.

A template is a program of whoever made the base. transformers' sandbox keeps it from Python and from files, not from looping for ever
or from writing gigabytes, and nothing can interrupt such a loop from inside. So one process, which this file is too, renders
for all calls of ours: it is ended when a conversation takes too long (everywhere), or too much memory or computing (where the
system limits a process), and refuses texts out of proportion to what they were made of. It loads no torch, and it never imports
the user's script again.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError, plain
from adapterhub.files import platforms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""For one call, the template's first reading included."""
START = 120
"""Seconds for the process to begin: it imports transformers."""
MEMORY = 1 << 30
"""Bytes that rendering may take."""
TEMPLATE = 1 << 20
"""Characters of a template."""
TEXT, TIMES = 1 << 20, 64
"""Characters of a rendered conversation: so many, and so many times what is in it."""
HINT = "check roles and their order, or write rows of prompt and completion; if the base is not yours, look at its template"
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")


Conversation = tuple[Sequence[Mapping[str, Any]], bool]
"""Messages, and whether the answer shall begin after them."""


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """What a tokenizer's chat template makes of conversations, as `apply_chat_template(tokenize=False)` has it.

    Raises DataError for a conversation that the template refuses, and for a template that takes more than the limits above."""
    from transformers import PreTrainedTokenizerBase

    if (
        type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    ):  # its own code, no template
        own = tokenizer.apply_chat_template
        return [own(list(given), tokenize=False, add_generation_prompt=begins) for given, begins in conversations]
    if not all(messages for messages, _ in conversations):
        raise DataError("the chat template has nothing to render: no message stands before the answer", HINT)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"the chat template refuses it: {plain(error)}", HINT) from None
    if len(template) > TEMPLATE:
        raise DataError(f"the chat template has {len(template)} characters (at most {TEMPLATE})", HINT)
    plainly = [
        ([{key: value for key, value in message.items() if value is not None} for message in messages], begins)
        for messages, begins in conversations
    ]
    return _worker.ask(template, [plainly, dict(tokenizer.special_tokens_map)])


class _Worker:
    """The process, started when it is first asked, and again after it was ended or this one has forked."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen | None = None
        self._owner, self._template = 0, ""
        self._answers: Queue[bytes] = Queue()

    def ask(self, template: str, request: list[Any]) -> list[str]:
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            line = json.dumps([None if template == self._template else template, *request]).encode()
            self._template = template
            try:
                with suppress(OSError):  # it ended: no answer says so
                    self._process.stdin.write(line + b"\n")
                    self._process.stdin.flush()
                answer = self._read(SECONDS)
            except BaseException:  # interrupted: its answer, when it comes, would be taken for the next one's
                self.end()
                raise
        if answer is None:
            raise DataError(f"the chat template takes more than {SECONDS} s, or more memory than it may have", HINT)
        texts, problem = json.loads(answer)
        if problem is not None:
            raise DataError(f"the chat template refuses it: {plain(problem)}", HINT)
        return texts

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not any(s in key.upper() for s in _SECRET)}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._owner, self._template, self._answers = os.getpid(), "", Queue()
        Thread(target=_drain, args=(self._process.stdout, self._answers), daemon=True).start()
        if self._read(START) is None:
            raise DataError(
                "the process that renders chat templates does not start", "check the installation: adapterhub doctor"
            )

    def _read(self, seconds: float) -> bytes | None:
        """The next answer; None, and the process is ended, where none comes."""
        with suppress(Empty):
            if answer := self._answers.get(timeout=seconds):
                return answer
        self.end()
        return None

    def end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe.close()
        self._process = None


def _drain(pipe: Any, answers: Queue[bytes]) -> None:
    with suppress(OSError, ValueError):
        for line in pipe:
            answers.put(line)
    answers.put(b"")


_worker = _Worker()
atexit.register(_worker.end)


# --- the process ---------------------------------------------------------------------------------------------------


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits
    from transformers.utils.chat_template_utils import render_jinja_template

    platforms.limit_memory(MEMORY)
    answers.write(b"ready\n")
    answers.flush()
    template = ""
    for line in sys.stdin.buffer:
        platforms.limit_computing(2 * SECONDS)  # so that a loop ends also where whoever waits for it was killed
        try:
            given, conversations, special = json.loads(line)
            template, texts, most = template if given is None else given, [], TEXT + TIMES * len(line)
            for messages, begins in conversations:
                [text], _ = render_jinja_template(
                    conversations=[messages], chat_template=template, add_generation_prompt=begins, **special
                )
                if len(text) > most:
                    raise ValueError(f"it writes {len(text)} characters (at most {most})")
                texts.append(text)
            answer = json.dumps([texts, None])
        except Exception as error:  # a template raises what it likes
            answer = json.dumps([None, (str(error) or type(error).__name__)[:2000]])
        answers.write(answer.encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
