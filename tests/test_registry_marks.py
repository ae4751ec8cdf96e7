"""Tags and yanks at a registry: set there, carried along by a push; and serial numbers that are forgotten."""

import pytest
from crashed import large, publish
from fault_server import Faults, faulty
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import IntegrityError, NotFound, TagMoved, UsageError
from adapterhub.share import registry_marks
from adapterhub.share.registry import push
from adapterhub.sources import serials, tokens
from adapterhub.sources.registry import Registry
from adapterhub.spec.address import address
from adapterhub.store.history import yank
from adapterhub.trust.keys import new_key

TOKEN = "a-token"


@pytest.fixture
def ada(tmp_path, monkeypatch):
    ada = adapterhub.open(tmp_path / "ada", create=True)
    monkeypatch.chdir(ada.root)
    return ada


@pytest.fixture
def there(ada, tmp_path):
    """The registry's hub, with an address that a token is kept for."""
    hub = adapterhub.open(tmp_path / "there", create=True)
    with serving(hub, token=TOKEN) as url:
        tokens.keep(address(url), TOKEN)
        hub.__dict__["url"] = url
        yield hub


def pushed(ada, there, reference="me/x"):
    """Push, and what the user is told."""
    lines = []
    push(ada, reference, there.url, lines.append)
    return lines


def tags(hub, name="me/x"):
    return {tag: row.version for row in hub.releases(name) for tag in row.tags}


def yanks(hub, name="me/x"):
    return {row.version: row.yanked for row in hub.releases(name) if row.yanked is not None}


# --- at ---------------------------------------------------------------------------------------------------------------


def test_tag_yank_and_unyank_at_a_registry(ada, there, capsys):
    for seed in (0, 1):
        publish(ada, "me/x", large(seed))
        pushed(ada, there)
    (ada.root / "adapterhub.toml").write_text(f'[sources.team]\nurl = "{there.url}"\n')
    for at in ("team", there.url):
        assert execute(["tag", "me/x@0.1.0", "stable", "--at", at]) == 0
        assert tags(there) == {"stable": "0.1.0"} and tags(ada) == {}
        assert execute(["yank", "me/x@0.2.0", "--reason", "wrong labels", "--at", at]) == 0
        assert yanks(there) == {"0.2.0": "wrong labels"} and yanks(ada) == {}
        assert execute(["tag", "me/x", "newest", "--at", at]) == 0  # the newest that is not yanked
        assert tags(there)["newest"] == "0.1.0"
        assert execute(["unyank", "me/x@0.2.0", "--at", at]) == 0 and yanks(there) == {}
        assert execute(["tag", "me/x@stable", "also", "--at", at, "--expect", "none"]) == 0
        there.index.set_tag("me/x", "also", None)
        there.index.set_tag("me/x", "newest", None)
    assert "me/x@0.2.0 is yanked" in capsys.readouterr().out


def test_what_cannot_be_set_there_is_said(ada, there, tmp_path, capsys):
    publish(ada, "me/x", large(0))
    pushed(ada, there)
    registry = Registry(there.url)
    with pytest.raises(TagMoved, match=r"0\.9\.0"):
        registry_marks.tag(registry, "me/x@0.1.0", "stable", "0.9.0")
    for reference in ("me/other", "me/x@0.2.0", "me/x@nothing"):
        with pytest.raises(NotFound):
            registry_marks.tag(registry, reference, "stable")
    for wrong in ("Not A Tag", "1.0.0", "a/b"):
        with pytest.raises(UsageError):
            registry_marks.tag(registry, "me/x", wrong)
    for reference, reason in (("me/x", "r"), ("me/x@0.1.0", " "), ("me/x@0.1.0", "a\x1b[2J")):
        with pytest.raises(UsageError):
            registry_marks.yank(registry, reference, reason)
    assert execute(["tag", "me/x", "s", "--at", "nowhere"]) == 3
    other = adapterhub.open(tmp_path / "other", create=True)
    (ada.root / "adapterhub.toml").write_text(f'[sources.disk]\npath = "{other.root}"\n')
    assert execute(["tag", "me/x", "s", "--at", "disk"]) == 2
    tokens.forget(address(there.url))
    assert execute(["tag", "me/x", "s", "--at", there.url]) == 2
    assert f"adapterhub login {there.url}" in capsys.readouterr().err
    assert tags(there) == {} and yanks(there) == {}


# --- a push carries them ----------------------------------------------------------------------------------------------


def test_a_push_carries_tags_and_yanks(ada, there):
    publish(ada, "me/x", large(0))
    ada.tag("me/x", "stable")
    ada.tag("me/x", "best")
    yank(ada, "me/x@0.1.0", "labels were swapped")
    with pytest.warns(match="yanked"):
        lines = pushed(ada, there)
    assert tags(there) == {"stable": "0.1.0", "best": "0.1.0"} and yanks(there) == {"0.1.0": "labels were swapped"}
    assert len(lines) == 3
    with pytest.warns(match="yanked"):
        assert pushed(ada, there) == []  # nothing is left to do


def test_a_tag_that_is_given_after_the_push_comes_with_the_next(ada, there):
    publish(ada, "me/x", large(0))
    assert pushed(ada, there) == []
    ada.tag("me/x", "stable")
    assert pushed(ada, there) == ["me/x@stable means 0.1.0 there"] and tags(there) == {"stable": "0.1.0"}


def test_a_tag_moves_with_a_release_that_is_new_there(ada, there):
    publish(ada, "me/x", large(0))
    ada.tag("me/x", "stable")
    pushed(ada, there)
    publish(ada, "me/x", large(1))
    ada.tag("me/x@0.2.0", "stable")
    assert pushed(ada, there) == ["me/x@stable means 0.2.0 there, no longer 0.1.0"]
    assert tags(there) == {"stable": "0.2.0"}


def test_a_tag_that_others_moved_back_stays_where_they_put_it(ada, there):
    publish(ada, "me/x", large(0))
    ada.tag("me/x", "stable")
    pushed(ada, there)
    publish(ada, "me/x", large(1))
    ada.tag("me/x@0.2.0", "stable")
    pushed(ada, there)
    there.tag("me/x@0.1.0", "stable")  # somebody goes back to what worked
    (line,) = pushed(ada, there)
    assert tags(there) == {"stable": "0.1.0"}
    command = f"adapterhub tag me/x@0.2.0 stable --at {there.url} --expect 0.1.0"
    assert line == f"me/x@stable means 0.1.0 there and was not moved: {command}"
    assert execute(command.split()[1:]) == 0 and tags(there) == {"stable": "0.2.0"}


def test_a_tag_of_others_is_not_taken_with_a_release_that_is_new_there(ada, there, tmp_path):
    bob = adapterhub.open(tmp_path / "bob", create=True)
    publish(bob, "me/x", large(5))
    bob.tag("me/x", "stable")
    pushed(bob, there)
    publish(ada, "me/x", large(0))  # 0.1.0, as Bob's
    ada.remove("me/x")
    mine = publish(ada, "me/x", large(1))
    assert mine.version == "0.2.0"
    ada.tag("me/x", "stable")
    (line,) = pushed(ada, there)
    assert "was not moved" in line and tags(there) == {"stable": "0.1.0"}
    assert {row.version for row in there.releases("me/x")} == {"0.1.0", "0.2.0"}


def test_a_yank_is_brought_and_never_taken_back(ada, there):
    publish(ada, "me/x", large(0))
    pushed(ada, there)
    there.index.yank("me/x", "0.1.0", "their reason")
    assert pushed(ada, there) == [] and yanks(there) == {"0.1.0": "their reason"}
    yank(ada, "me/x@0.1.0", "mine")
    with pytest.warns(match="yanked"):
        pushed(ada, there)
    assert yanks(there) == {"0.1.0": "their reason"}


def test_what_it_needs_brings_its_tags_when_it_is_new_there(ada, there):
    parent = publish(ada, "me/parent", large(0))
    ada.tag("me/parent", "stable")
    publish(ada, "me/x", large(1), [parent])
    assert pushed(ada, there) == ["me/parent@stable means 0.1.0 there"]
    there.index.set_tag("me/parent", "stable", None)
    assert pushed(ada, there) == []  # it is not what was asked for, and was there


def test_a_race_for_a_tag_is_lost_in_words(ada, there):
    """Between our look and our step somebody else gives the tag."""
    publish(ada, "me/x", large(0))
    publish(ada, "me/x", large(1))
    pushed(ada, there, "me/x@0.1.0")
    ada.tag("me/x@0.2.0", "stable")
    registry = Registry(there.url)
    before = registry.candidates

    def look(name):
        found = before(name)
        there.tag("me/x@0.1.0", "stable")
        return found

    registry.candidates, lines = look, []
    push(ada, "me/x", registry, lines.append)
    assert tags(there) == {"stable": "0.1.0"} and "was not moved" in lines[0]


# --- serial numbers ---------------------------------------------------------------------------------------------------


def test_a_restored_registry_is_believed_again_when_its_serial_is_forgotten(ada, tmp_path, monkeypatch, capsys):
    """The registry's hub goes back to an older state; its client refuses until it is told."""
    old, new, key = (
        adapterhub.open(tmp_path / "old", create=True),
        adapterhub.open(tmp_path / "new", create=True),
        new_key("r"),
    )
    publish(old, "me/x", large(0))
    for seed in range(3):
        publish(new, "me/x", large(seed))
    faults = Faults()
    with serving(old, key=key) as restored, serving(new, key=key) as before:
        origins = {"now": before}

        class Origin(str):
            def __add__(self, path):
                return origins["now"] + path

        with faulty(Origin(), faults) as url:
            (ada.root / "adapterhub.toml").write_text(
                f'[adapters]\n"me/x" = "*"\n[sources.team]\nurl = "{url}"\nkey = "{key.public.text}"\n'
            )
            assert execute(["trust", "forget", "team", "--yes"]) == 3
            assert execute(["lock"]) == 0
            origins["now"] = restored
            assert execute(["update"]) == 4
            assert "adapterhub trust forget team" in capsys.readouterr().err
            assert execute(["trust", "forget", "team"]) == 2  # nobody is there to ask
            assert "--yes" in capsys.readouterr().err
            with pytest.raises(IntegrityError):
                Registry(url, key=key.public.text).candidates("me/x")
            assert execute(["trust", "forget", url, "--yes"]) == 0
            assert serials.remembered(url) == 0
            assert execute(["update"]) == 0
            assert serials.remembered(url) == old.index.serial()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_forgetting_asks_on_a_terminal(ada, answer, code, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    serials.check_no_older("https://a.example", 7, "a")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert execute(["trust", "forget", "https://a.example"]) == code
    assert serials.remembered("https://a.example") == (7 if code else 0)
