"""Who waits for a lock is told so, and whose it is; a file system without locks is refused in words."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
from crashed import publish

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import HubError
from adapterhub.files import locks

HOLD = """
import sys, time
from pathlib import Path
from adapterhub.files import durable
with durable.lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hub(tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub)
    return hub


def holder(hub, how, *more):
    running = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(hub.root / "hub.lock"), how, *more], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "held\n"
    return running


@pytest.mark.parametrize("how", ["alone", "shared"])
def test_a_command_that_waits_says_for_whom(hub, how):
    """On stderr though it is no terminal; then it does its work. What another program was given stays its own."""
    holding = holder(hub, how, "--token", "planted-secret")
    try:
        waiting = subprocess.Popen(
            [sys.executable, "-m", "adapterhub", "gc"],
            cwd=hub.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = waiting.stderr.readline()
        assert f"waiting for {hub.root / 'hub.lock'}" in said and f"process {holding.pid} (python" in said
    finally:
        holding.kill()
        holding.wait()
    _, rest = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "planted-secret" not in said + rest and "waiting" not in rest


def test_an_interrupt_ends_the_waiting(hub):
    holding = holder(hub, "alone")
    try:
        waiting = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
             "import sys; from adapterhub.cli.app import main; sys.argv = ['adapterhub', 'gc']; main()"],
            cwd=hub.root, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "waiting" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=60)
        assert waiting.returncode == 130 and "Traceback" not in told
    finally:
        holding.kill()
        holding.wait()


def test_a_library_says_nothing_unless_it_is_asked(hub, monkeypatch, capfd):
    monkeypatch.setattr(locks, "PATIENCE", 0.01)
    said, entered = [], threading.Event()

    def enter():
        with hub.store.alone():
            entered.set()

    for tell in (None, said.append):
        monkeypatch.setattr(locks, "tell", tell)
        entered.clear()
        with hub.store.alone():
            thread = threading.Thread(target=enter)
            thread.start()
            assert not entered.wait(0.3)
        thread.join(10)
        assert entered.is_set()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0]
    assert capfd.readouterr() == ("", "")


def test_who_does_not_wait_long_is_told_nothing(hub, monkeypatch):
    said = []
    monkeypatch.setattr(locks, "tell", said.append)
    for _ in range(3):
        with hub.store.shared(), hub.store.shared(), hub.store.alone(wait=False) as held:
            assert not held
        with hub.store.alone():
            pass
    assert said == [] and threading.active_count() == 1 + sum(t.daemon for t in threading.enumerate())


def test_a_program_that_names_itself_with_escapes_is_shown_without(monkeypatch):
    program = "import time; print('x', flush=True); time.sleep(60)"
    running = subprocess.Popen(["\x1b[2Jadapterhub\nok: nothing", "-c", program], executable=sys.executable, stdout=subprocess.PIPE)  # fmt: skip
    try:
        running.stdout.readline()
        assert locks._command(running.pid) == ""
    finally:
        running.kill()
        running.wait()
    assert locks._command(2**22 + 5) == ""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_B12_a_file_system_without_locks_is_refused_and_doctor_says_so(hub, monkeypatch, capsys, code):
    """What writes or counts on nothing going away refuses; what only looks goes on."""

    def refuse(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.platforms.fcntl, "flock", refuse)
    before = [path for path in hub.root.rglob("*")]
    for write in (lambda: publish(hub, "me/y"), lambda: hub.remove("me/x"), hub.verify):
        with pytest.raises(HubError, match="has no locks") as caught:
            write()
        assert "local disk" in caught.value.hint
    assert [path for path in hub.root.rglob("*")] == before and [str(row) for row in hub.releases()] == ["me/x@0.1.0"]
    monkeypatch.chdir(hub.root)
    assert execute(["list"]) == 0 and execute(["show", "me/x"]) == 0
    capsys.readouterr()
    assert execute(["doctor"]) == 1 and "has no locks" in capsys.readouterr().out
