"""JSON and TOML of strangers: bounded in length and depth wherever they are read, and the printing of what they say."""

import json
import sys

import msgspec
import pytest
from crashed import TENSORS, publish

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.cli.output import LINE, clean, one_line, shown
from adapterhub.config import lock, project, user
from adapterhub.errors import HubError, ManifestError
from adapterhub.files.bounded import DEPTH, TooMuch, read_json, read_toml
from adapterhub.formats.peft import config
from adapterhub.spec import claims
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import RELATIONS, Manifest, Release
from adapterhub.trust.signature import LIST, opened


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.mark.parametrize("value", [{"a": [1, {"b": "]]]"}], "[": '"[' * 99}, ['\\"[', "\\\\"] * 99, "\u2028[", []])
def test_json_is_what_the_library_reads(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert read_json(text) == value


def test_depth_and_length_end_it_before_any_object_is_made(monkeypatch):
    assert read_json(nested(DEPTH)) is not None
    monkeypatch.setattr(json, "loads", None)  # it is not even asked
    for text in (nested(DEPTH + 1), nested(10**6), '{"a":' * (DEPTH + 1), '["\\\\",' * (DEPTH + 1), "[" * 10**6):
        with pytest.raises(TooMuch, match="nested deeper"):
            read_json(text)
    with pytest.raises(TooMuch, match="at most 10"):
        read_json(b"[" + b" " * 20 + b"]", length=10)


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "NaN", "[1e999]", "[Infinity]", "\xff", "[", "\ud800"])
def test_json_that_means_two_things_or_none_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_toml_is_what_the_library_reads_whatever_its_line_ends():
    text = "# don't [[[\na = '[[['\nb = \"\"\"x\n[[\"\"\"\n[t.u]\nc = [1, [2]]\n[[v]]\nd = '''\n]'''\n"
    wanted = {"a": "[[[", "b": "x\n[[", "t": {"u": {"c": [1, [2]]}}, "v": [{"d": "]"}]}
    assert read_toml(text) == read_toml(text.replace("\n", "\r\n").encode()) == wanted


@pytest.mark.parametrize(
    "text",
    ["a = " + nested(100), "a = " + nested(100_000), "[" + ".".join("a" * 200) + "]", ".".join("b" * 200) + " = 1"],
)
def test_toml_is_bounded_in_depth_also_where_keys_make_it(text):
    with pytest.raises(TooMuch, match="nested deeper"):
        read_toml(text)
    with pytest.raises(TooMuch, match="at most"):
        read_toml("a = 1" + " " * 100, length=100)


def test_every_reader_of_strangers_files_is_behind_it(tmp_path, monkeypatch):
    """Each with its own words, and none of them Python's."""
    deep = nested(5000)
    for name, read in (("adapterhub.lock", lock.read), ("adapterhub.toml", project.read)):
        (tmp_path / name).write_text(f"version = {deep}")
        with pytest.raises(HubError, match="nested deeper") as caught:
            read(tmp_path)
        assert caught.value.hint
    monkeypatch.setenv("ADAPTERHUB_CONFIG", str(tmp_path))
    user.config_file().write_text(f"a = {deep}")
    with pytest.raises(HubError, match="nested deeper"):
        user.load()
    (tmp_path / "adapter_config.json").write_text('{"peft_type":' + deep + "}")
    with pytest.raises(HubError, match="nested deeper"):
        config.read_config(tmp_path)
    with pytest.raises(HubError, match="nested deeper"):
        opened(deep.encode(), LIST, ())
    with pytest.raises(ManifestError, match="nested deeper"):
        Manifest.decode(b'{"recipe":' + deep.encode() + b"}")


# --- what a manifest claims ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    monkeypatch.chdir(hub.root)
    return hub


@pytest.fixture
def plain(hub):
    return publish(hub, "me/x", TENSORS).manifest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"licence": "x" * 2000}, "control characters, or more than"),
        ({"licence": "MIT\nhint: run this"}, "control characters"),
        ({"recipe": {"beneath": 5}}, "beneath"),
        ({"recipe": {"recipes": 5}}, "recipes"),
        ({"recipe": {"recipes": [{"name": 5}]}}, "no name"),
        ({"recipe": {"objective": "sft"}}, "no name"),
        ({"recipe": {"schedule": [1]}}, "no name"),
        ({"recipe": {"x": "y" * (2 << 20)}}, "characters"),
        ({"recipe": {"x" * 2000: 1}}, "a key in it"),
        ({"metrics": {"many": [0] * (1 << 18)}}, "values"),
        ({"forms": {f"s{n}": ["low_rank"] for n in range(65_537)}}, "65537 forms"),
        ({"forms": {"s": ["low_rank"] * 1001}}, "at one site"),
        ({"compose": "a" * (2 << 20)}, "expression"),
    ],
)
def test_what_no_release_says_of_itself_is_refused_when_it_is_decoded(plain, changes, says):
    data = msgspec.structs.replace(plain, **changes).encode()
    with pytest.raises(ManifestError, match=says) as caught:
        Manifest.decode(data)
    assert len(str(caught.value)) < 400 and caught.value.hint


def test_a_relation_is_one_that_we_know(plain):
    parent = {"name": "me/p", "version": "0.1.0", "digest": digest_of(b"p"), "relation": "owns"}
    for relation in (*RELATIONS, "owns", "on\x1b"):
        data = canonical({**msgspec.to_builtins(plain), "parents": [{**parent, "relation": relation}]})
        if relation in RELATIONS:
            assert Manifest.decode(data).parents[0].relation == relation
            continue
        with pytest.raises(ManifestError, match="no relation"):
            Manifest.decode(data)


STRANGE = [
    {"train_loss": "0.1"}, {"train_loss": None}, {"train_loss": True}, {"train_loss": [1]}, {"train_loss": 10**400},
    {"compress": "x"}, {"compress": {"bytes_bf16": 1, "bytes_after": 0, "bytes_before": 1, "worst_error": 0, "median_error": 0}},
    {"merge": {}}, {"merge": {"relative_error": "1", "largest_rank": 1}}, {"eval": 5}, {"plugin's own": {"a": [1, None, "\x1b[2J"]}},
]  # fmt: skip


@pytest.mark.parametrize("metrics", STRANGE)
def test_metrics_of_strangers_are_shown_and_never_a_traceback(hub, plain, metrics, tmp_path, capsys):
    """What a plugin measured may stand there; what has not the shape that our verbs write is not taken for theirs."""
    there = adapterhub.open(tmp_path / "there", create=True)
    manifest = msgspec.structs.replace(plain, name="me/odd", metrics=metrics)
    release = there.publish(manifest, {"tensors": TENSORS}, b"rows")[0]
    assert release.manifest.metrics == metrics
    for command in (["install", f"{there.root}:me/odd"], ["show", "me/odd"], ["list"], ["show", "me/odd", "--json"]):
        assert execute(command) == 0, command
        told = capsys.readouterr()
        assert "Traceback" not in told.err and "\x1b" not in told.out + told.err


def test_known_figures_are_told():
    known = {"train_loss": 0.25, "merge": {"relative_error": 0.0, "largest_rank": 4, "worst_site": ""}}
    assert claims.figures(known | {"other": 1}) == known


# --- printing ---------------------------------------------------------------------------------------------------------


def test_control_characters_are_escaped_and_lines_are_short():
    every = "".join(map(chr, range(0x110000)))
    told = clean(every)
    assert {c for c in told if ord(c) < 32} == {"\n", "\t"} and not set("\x7f\x9b\u202e\u2066\u2028\ud800") & set(told)
    assert clean("\x1b[2J\u202e") == "\\x1b[2J\\u202e" and clean("é\tü\n漢") == "é\tü\n漢"
    told.encode(sys.getfilesystemencoding(), "strict")
    assert one_line("a\nhint: b\x1b") == "a hint: b\\x1b"
    assert len(one_line("x" * 10**6)) < LINE + 50 and "996000 characters more" in one_line("x" * 10**6)
    assert [len(line) < LINE + 50 for line in shown("x" * 5000 + "\n" + "y" * 5000).split("\n")] == [True, True]


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            claims.date,
            ["2026-11-30T10:00:00+00:00", "2026-11-30"],
            ["yesterday", "\x1b", 5, None, "2026-13-01", "1" * 2000],
        ),
        (claims.line, ["why", "ä ö"], ["a\nb", "x" * 1025, 5, None, "\u202e"]),
        (claims.count, [0, 5, 2**62], [-1, 1.0, "1", True, None, 2**63]),
    ],
)
def test_what_a_list_says_is_checked_by_kind(check, good, bad):
    for value in good:
        assert check(value, "it") == value
    for value in bad:
        with pytest.raises(ValueError, match="it is"):
            check(value, "it")


def test_an_older_manifest_of_our_own_verbs_still_reads(plain):
    """What a merge, a compression and a training of the first versions wrote."""
    recipe = {"merger": "linear", "options": {}, "weights": [1.0, 0.5], "data": {"digest": digest_of(b"d"), "rows": 3}, "stages": [],
              "recipes": [{"name": "mix", "options": {}}], "schedule": {"name": "hft"}, "objective": {"name": "sft"}, "found": {"x": None}}  # fmt: skip
    metrics = {
        "compress": {"bytes_after": 5},
        "scan": {"sites": 2, "site": "a.b"},
        "eval": {"loss": 1.5, "labels": [" yes"]},
    }
    data = msgspec.structs.replace(plain, recipe=recipe, metrics=metrics).encode()
    assert Release(Manifest.decode(data), digest_of(data)).manifest.recipe == recipe


def test_what_a_list_says_of_a_release_is_checked_at_once():
    for good in (("", None, ()), ("2026-11-30T10:00:00+00:00", "broken", ["stable"])):
        claims.check_listed(*good)
    for bad in (
        ("soon", None, ()),
        ("", "\x1b[2J", ()),
        ("", 5, ()),
        ("", None, "stable"),
        ("", None, ["a\nb"]),
        (None, None, ()),
    ):
        with pytest.raises(ValueError):
            claims.check_listed(*bad)
