"""D10: a base's chat template is rendered by our own code in a process of its own, and ends within its limits."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from transformers import AutoTokenizer

from adapterhub import data
from adapterhub.data import chat_template
from adapterhub.data.chat_template import render
from adapterhub.data.encoding import encode
from adapterhub.errors import DataError

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "é\u2028 hi"}, {"role": "assistant", "content": "yes"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TALK}))
    return data.read(tmp_path / "rows.jsonl")


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)


def test_what_comes_out_is_what_transformers_renders(tokenizer):
    talks = [(TALK[:1], True), (TALK, False), ([{**TALK[0], "name": None}], False)]
    wanted = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=p) for t, p in talks]
    assert render(tokenizer, talks) == wanted
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "no"}
    assert render(tokenizer, talks[:1]) == [TALK[0]["content"]]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|modify|immutable|access"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('\x1b[2J boo\\n\x07') }}", r"\\x1b\[2J boo"),
        ("{% for", "unexpected"),
        ("{{ a.b.c }}", "undefined"),
        ("{% set x = namespace(t='x' * 1000) %}{% for i in range(9999) %}{{ x.t }}{% endfor %}", "characters"),
        ("{{ 'x' * 3000000000 }}", "refuses it|takes more"),
        ("{{ (('x' * 99999) ~ messages[0]['role']) * 99999 }}", "refuses it|takes more"),
        (LOOP, "takes more than 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 1 s|refuses"),
        (PLAIN + " " * (1 << 20), "characters"),
    ],
)
def test_D10_a_template_that_does_harm_is_refused_in_seconds_and_the_next_one_is_rendered(
    template, says, tokenizer, rows, soon
):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=says) as caught:
        encode(rows, tokenizer, 64)
    told = str(caught.value)
    assert told.isprintable() and len(told) < 700 and "line 1" in told and caught.value.hint
    tokenizer.chat_template = PLAIN
    assert encode(rows, tokenizer, 64)[1] == 0


def test_D10_nothing_of_it_runs_in_this_process(tokenizer, rows, monkeypatch):
    """A sandbox that let it out would let it out into a process without our secrets."""
    monkeypatch.setenv("ADAPTERHUB_TOKEN", "planted")
    chat_template._worker.end()
    import jinja2.sandbox

    monkeypatch.setattr(jinja2.sandbox.ImmutableSandboxedEnvironment, "from_string", None)
    encode(rows, tokenizer, 64)
    process = chat_template._worker._process
    if sys.platform == "linux":
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            assert b"planted" not in file.read()
        with open(f"/proc/{process.pid}/maps") as file:
            assert "libtorch" not in file.read()


def test_one_process_serves_all_rows_and_threads(tokenizer):
    render(tokenizer, [(TALK, False)])
    first = chat_template._worker._process
    found = []
    threads = [
        threading.Thread(
            target=lambda n=n: found.append((n, render(tokenizer, [([{"role": "u", "content": str(n)}], False)])))
        )
        for n in range(8)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == [(n, [f"<u>{n}{tokenizer.eos_token}"]) for n in range(8)]
    assert chat_template._worker._process is first


def test_an_interrupt_leaves_no_answer_for_the_next_call(tokenizer, monkeypatch):
    render(tokenizer, [(TALK, False)])

    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat_template._worker, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(tokenizer, [(TALK[:1], True)])
    assert render(tokenizer, [(TALK, False)]) == [tokenizer.apply_chat_template(TALK, tokenize=False)]


def test_a_script_without_a_guard_is_not_run_again(tmp_path, tiny_folder):
    """And the process ends with the one that asked."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('run')\n"
        "from transformers import AutoTokenizer\n"
        "from adapterhub.data import chat_template\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tiny_folder)!r})\n"
        f"tokenizer.chat_template = {PLAIN!r}\n"
        "print(chat_template.render(tokenizer, [([{'role': 'a', 'content': 'b'}], False)]))\n"
        "print(chat_template._worker._process.pid)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    run, text, pid = done.stdout.splitlines()
    assert run == "run" and "<a>b" in text, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_loop_ends_also_where_whoever_waits_is_killed(tmp_path, tiny_folder):
    """By the limit on its computing."""
    script = (
        "from transformers import AutoTokenizer\n"
        "from adapterhub.data import chat_template as c\n"
        "c.SECONDS = 600\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tiny_folder)!r})\n"
        f"tokenizer.chat_template = {PLAIN!r}\n"
        "talk = [([{'role': 'a', 'content': 'b'}], False)]\n"
        "c.render(tokenizer, talk)\n"
        "print(c._worker._process.pid, flush=True)\n"
        f"tokenizer.chat_template = {LOOP!r}\n"
        "c.render(tokenizer, talk)\n"
    )
    waiting = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(waiting.stdout.readline())
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    waiting.stdout.close()
    with open(f"/proc/{child}/limits") as file:
        limit = next(line for line in file if line.startswith("Max cpu time")).split()[3]
    assert int(limit) < 60
    os.kill(child, signal.SIGKILL)
    time.sleep(0)
