"""Tokens of registries: where they are kept, and to which addresses they go."""

import json
import os
import pty
import select
import stat
import sys
import time

import pytest
from crashed import TENSORS, publish
from fault_server import Faults, faulty
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.config import project as projects
from adapterhub.config import user
from adapterhub.errors import UsageError
from adapterhub.sources import tokens
from adapterhub.sources.registry import Registry
from adapterhub.spec.address import address, shown

TOKEN = "PLANTED-TOKEN"
ELSEWHERE = "http://adapters.example"
"""Plain HTTP beyond this machine. Nothing here gets as far as asking it."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = adapterhub.open(tmp_path / "mine", create=True)
    monkeypatch.chdir(hub.root)
    monkeypatch.setenv("ADAPTERHUB_HOME", str(hub.root))  # the tests write config.toml anew, which lists one's hubs
    monkeypatch.delenv("ADAPTERHUB_TOKEN", raising=False)
    monkeypatch.delenv("ADAPTERHUB_REGISTRY", raising=False)
    return hub


@pytest.fixture
def typed(monkeypatch):
    """Gives what standard input holds."""

    def give(text):
        reading, writing = os.pipe()
        os.write(writing, text if isinstance(text, bytes) else text.encode())
        os.close(writing)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reading, encoding="utf-8"))

    return give


def login(url, token=TOKEN):
    tokens.keep(address(url), token)


def config(text):
    user.config_folder().mkdir(parents=True, exist_ok=True)
    user.config_file().write_text(text)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_token_is_kept_where_only_its_owner_reads(hub, typed, capsys):
    user.config_folder().mkdir(exist_ok=True)
    user.config_folder().chmod(0o755)
    before = os.umask(0)
    try:
        typed(f"{TOKEN}\n")
        assert execute(["login", "https://Adapters.Example:443/"]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(tokens.path().stat().st_mode) == 0o600
    assert stat.S_IMODE(user.config_folder().stat().st_mode) == 0o700
    assert json.loads(tokens.path().read_text()) == {"https://adapters.example": TOKEN}
    assert execute(["login", "--list"]) == 0
    told = capsys.readouterr()
    assert told.out == "https://adapters.example\n" * 2 and TOKEN not in told.err
    assert execute(["login", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["registries"] == ["https://adapters.example"]
    assert execute(["logout", "https://adapters.example."]) == 0 and tokens.origins() == []
    assert execute(["logout", "https://adapters.example"]) == 3


def test_another_login_takes_the_place_of_the_first(hub, tmp_path):
    file = tmp_path / "token"
    for token in ("first", "second"):
        file.write_text(f"  {token}\r\n")
        assert execute(["login", "https://a.example", "--token-file", str(file)]) == 0
        assert tokens.token_for(address("https://a.example")) == token
    assert execute(["login", "https://b.example", "--token-file", str(file)]) == 0
    assert tokens.origins() == ["https://a.example", "https://b.example"]


def test_the_token_is_asked_for_and_not_echoed(hub):
    """On a real terminal, in a process of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "adapterhub", "login", "https://a.example"])
    seen, sent, end = b"", False, time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the other end has gone
                break
            seen += data
            if not data:
                break
        if not sent and b"Token for https://a.example" in seen:
            time.sleep(0.3)  # until the echo is off
            os.write(terminal, TOKEN.encode() + b"\n")
            sent = True
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    assert sent and TOKEN.encode() not in seen
    assert tokens.token_for(address("https://a.example")) == TOKEN


@pytest.mark.parametrize("more", [[TOKEN], ["--token", TOKEN], [f"--token={TOKEN}"], [f"-t{TOKEN}"], ["--list", TOKEN]])
def test_a_token_is_never_an_argument_and_not_repeated(hub, more, capsys):
    assert execute(["login", "https://a.example", *more]) == 2
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err and tokens.origins() == []


@pytest.mark.parametrize(
    "bad",
    ["", " \n", f"{TOKEN} x", f"{TOKEN}\x1b", f"{TOKEN}é", f"x\n{TOKEN}", f"{TOKEN}\x00", TOKEN * 1000, f"﻿{TOKEN}"],
)
def test_what_is_no_token_is_refused_without_being_repeated(hub, bad, typed, tmp_path, capsys):
    typed(bad)
    assert execute(["login", "https://a.example"]) == 2
    (tmp_path / "file").write_text(bad)
    assert execute(["login", "https://a.example", "--token-file", str(tmp_path / "file")]) == 2
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err and tokens.origins() == []


def test_files_that_are_no_text_or_have_no_end(hub, typed, capsys):
    typed(TOKEN.encode() + b"\xff")
    assert execute(["login", "https://a.example"]) == 2
    assert execute(["login", "https://a.example", "--token-file", "/dev/zero"]) == 2
    assert execute(["login", "https://a.example", "--token-file", "nowhere"]) == 3
    assert TOKEN not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", f'["{TOKEN}"]', f'{{"https://a.example": ["{TOKEN}"]}}', "[" * 100_000,
                                     f'{{"https://a.example": "{TOKEN}\\n"}}'])  # fmt: skip
def test_a_damaged_file_is_named_and_not_repeated(hub, content, capsys):
    user.config_folder().mkdir(parents=True, exist_ok=True)
    tokens.path().write_text(content)
    assert execute(["login", "--list"]) == 2
    told = capsys.readouterr()
    assert str(tokens.path()) in told.err and TOKEN not in told.err + told.out


# --- origins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Adapters.Example", "https://adapters.example"),
        ("HTTPS://adapters.example:443/some/path/", "https://adapters.example"),
        ("https://adapters.example.:8443", "https://adapters.example:8443"),
        ("http://adapters.example:80", "http://adapters.example"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://BÜCHER。example", "https://xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("http://[0:0::1]:80", "http://[::1]"),
    ],
)
def test_one_origin_in_all_its_spellings(text, origin):
    assert address(text).origin == origin


def test_another_scheme_host_or_port_is_another_origin(hub):
    login("https://a.example")
    same = ["https://A.example.:443/x", "https://a.example"]
    others = [
        "http://a.example",
        "https://a.example:444",
        "https://b.example",
        "https://a.example.org",
        "https://www.a.example",
    ]
    assert {tokens.token_for(address(text)) for text in same} == {TOKEN}
    assert {tokens.token_for(address(text)) for text in others} == {""}


@pytest.mark.parametrize(
    ("text", "here"),
    [("http://localhost", True), ("http://127.3.4.5:80", True), ("http://[::1]", True), ("http://[::ffff:127.0.0.1]", True),
     ("http://127.1", False), ("http://127.0.0.1.example", False), ("http://localhost.example", False), ("http://0.0.0.0", False),
     ("http://2130706433", False), ("http://127.0.0.01", False)],
)  # fmt: skip
def test_loopback_is_what_says_so_by_its_very_name(text, here):
    assert address(text).private is here


SECRET = "planted-secret"
WRONG = [f"https://user:{SECRET}@a.example", f"https://:{SECRET}@a.example", f"https://{SECRET}@a.example/x", f"https://a.example/?token={SECRET}",
         f"https://a.example/#{SECRET}", f"https://a.example\\@{SECRET}", f"https://a.example {SECRET}", f"https:/user:{SECRET}@a.example",
         f"https://user:{SECRET}@a.example:x", f"HTTPS://u:{SECRET}@a.example", f"https://a.example/\n{SECRET}", f"https://u:{SECRET}@[::1"]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_no_address_with_a_secret_is_taken_or_repeated(hub, wrong, capsys, monkeypatch, typed):
    publish(hub, "me/x", TENSORS)
    typed(TOKEN)
    for command in (
        ["push", "me/x", wrong],
        ["tag", "me/x", "stable", "--at", wrong],
        ["yank", "me/x@0.1.0", "--reason", "r", "--at", wrong],
        ["unyank", "me/x@0.1.0", "--at", wrong],
        ["repair", "--from", wrong],
        ["install", wrong],
        ["install", wrong, "--json"],
        ["add", wrong],
        ["login", wrong],
        ["logout", wrong],
        ["trust", "forget", wrong, "--yes"],
    ):
        assert execute(command) in (2, 3), command
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", wrong)
    assert execute(["install", "me/other"]) == 2
    monkeypatch.delenv("ADAPTERHUB_REGISTRY")
    told = json.dumps(wrong)
    (hub.root / "adapterhub.toml").write_text(f'[adapters]\n"me/y" = "*"\n[sources.s]\nurl = {told}\n')
    assert execute(["lock"]) == 2 and execute(["lock", "--json"]) == 2
    with pytest.raises(UsageError):  # before anything asks for that source
        projects.read(hub.root)
    (hub.root / "adapterhub.toml").write_text(f'[adapters]\n"me/y" = "*"\n[sources.s]\npath = {told}\n')
    assert execute(["lock"]) == 2
    (hub.root / "adapterhub.toml").unlink()
    config(f"[sources.s]\nurl = {told}\n")
    assert execute(["install", "me/other"]) == 2
    seen = capsys.readouterr()
    assert SECRET not in seen.out + seen.err and "Traceback" not in seen.err and tokens.origins() == []


def test_what_only_looks_like_an_address_is_shown_without_its_secret(hub, capsys):
    assert shown(f"ttps://user:{SECRET}@a.example/x?y") == "ttps://***@a.example/x"
    assert shown("acme/sql@1.0.0") == "acme/sql@1.0.0" and shown("team") == "team"
    publish(hub, "me/x", TENSORS)
    assert execute(["push", "me/x", f"ttps://user:{SECRET}@a.example"]) == 3
    assert execute(["repair", "--from", f"ttps//user:{SECRET}@a.example"]) == 3
    assert SECRET not in capsys.readouterr().err


# --- to whom it goes ------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(hub, tmp_path):
    """A registry with me/x, and what it was sent."""
    there = adapterhub.open(tmp_path / "there", create=True)
    publish(there, "me/x", TENSORS)
    faults = Faults()
    with serving(there, token=TOKEN) as origin, faulty(origin, faults) as url:
        faults.url = url
        yield faults


def shown_tokens(faults):
    seen = {headers.get("authorization") or headers.get("Authorization") for headers in faults.headers}
    assert faults.headers
    faults.headers.clear()
    return seen


def project(hub, url, more=""):
    (hub.root / "adapterhub.toml").write_text(f'[adapters]\n"me/x" = "*"\n[sources.team]\nurl = "{url}"\n{more}')


def test_the_token_of_the_environment_never_goes_where_a_file_points(hub, stranger, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    project(hub, stranger.url)
    for command in (["lock"], ["sync"], ["repair"], ["outdated"], ["update"], ["install", "team:me/x"]):
        assert execute(command) == 0, command
        execute(["rm", "me/x"])
    assert execute(["push", "me/x", "team"]) in (2, 3)
    assert shown_tokens(stranger) == {None}
    (hub.root / "adapterhub.toml").unlink()
    (hub.root / "adapterhub.lock").unlink()
    config(f'[sources.mine]\nurl = "{stranger.url}"\n')
    assert execute(["install", "me/x"]) == 0
    assert shown_tokens(stranger) == {None}


def test_it_goes_to_the_origin_of_adapterhub_registry(hub, stranger, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", stranger.url)
    assert execute(["install", "me/x"]) == 0
    assert shown_tokens(stranger) == {f"Bearer {TOKEN}"}
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", "https://elsewhere.example")
    project(hub, stranger.url)
    execute(["rm", "me/x"])
    assert execute(["install", "team:me/x"]) == 0
    assert shown_tokens(stranger) == {None}


def test_it_goes_to_an_address_that_is_typed_in_the_call(hub, stranger, monkeypatch, capsys):
    publish(hub, "me/y", TENSORS)
    assert execute(["push", "me/y", stranger.url]) == 2
    assert f"adapterhub login {stranger.url}" in capsys.readouterr().err
    monkeypatch.setenv("ADAPTERHUB_TOKEN", f" {TOKEN}\n")
    for command in (
        ["push", "me/y", stranger.url],
        ["tag", "me/y", "s", "--at", stranger.url],
        ["repair", "--from", stranger.url],
    ):
        stranger.headers.clear()
        assert execute(command) == 0
        if stranger.headers:
            assert shown_tokens(stranger) == {f"Bearer {TOKEN}"}


def test_a_token_that_is_kept_goes_to_its_origin_however_that_is_named(hub, stranger):
    publish(hub, "me/y", TENSORS)
    login(stranger.url)
    project(hub, stranger.url)
    for command in (["sync"], ["push", "me/y", "team"], ["push", "me/y", stranger.url]):
        assert execute(command) == 0
        assert shown_tokens(stranger) == {f"Bearer {TOKEN}"}
    tokens.forget(address(stranger.url))
    login("http://127.0.0.1:1")  # another port of the same machine
    execute(["rm", "me/x"])
    assert execute(["sync"]) == 0
    assert shown_tokens(stranger) == {None}


def test_the_one_of_the_environment_goes_before_the_one_that_is_kept(hub, monkeypatch):
    login("https://a.example", "kept")
    monkeypatch.setenv("ADAPTERHUB_TOKEN", "given")
    there = address("https://a.example")
    assert (tokens.token_for(there), tokens.token_for(there, typed=True)) == ("kept", "given")


# --- plain HTTP -----------------------------------------------------------------------------------------------------


def test_plain_http_beyond_this_machine_needs_a_word_in_its_table(hub, typed, capsys, monkeypatch):
    publish(hub, "me/x", TENSORS)
    login(ELSEWHERE)
    typed(TOKEN)
    commands = (["push", "me/x", ELSEWHERE], ["login", ELSEWHERE], ["tag", "me/x", "s", "--at", ELSEWHERE])
    for command in commands:
        assert execute(command) == 2
        assert "insecure = true" in capsys.readouterr().err
    project(hub, ELSEWHERE)
    assert execute(["sync"]) == 2
    assert "insecure = true" in capsys.readouterr().err
    project(hub, ELSEWHERE, "insecure = true\n")  # a project's word is for its own table, not for what a user types
    assert execute(["push", "me/x", ELSEWHERE]) == 2
    (hub.root / "adapterhub.toml").unlink()
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", ELSEWHERE)
    assert execute(["install", "me/other"]) == 2


def test_with_that_word_it_is_spoken(hub, typed):
    from adapterhub.install.options import sources
    from adapterhub.sources.opening import named

    project(hub, ELSEWHERE, "insecure = true\n")
    source = sources(hub, hub.root, projects.read(hub.root)).get("team")
    assert isinstance(source, Registry) and source.http.url == ELSEWHERE
    config(f'[sources.mine]\nurl = "{ELSEWHERE}/"\ninsecure = true\n')
    typed(TOKEN)
    assert named(ELSEWHERE).http.url == ELSEWHERE
    assert execute(["login", ELSEWHERE]) == 0 and tokens.origins() == [ELSEWHERE]
    with pytest.raises(UsageError, match="plain HTTP"):
        named("http://other.example")
