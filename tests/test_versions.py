"""Tags that move, yanks, rollbacks, lineage, search, and how two releases differ."""

import json
import multiprocessing
import time

import pytest
import torch

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.cli.app import execute
from adapterhub.errors import NotFound, TagMoved, UsageError, YankedWarning
from adapterhub.forms.affine import Affine
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.dense import Dense
from adapterhub.forms.low_rank import LowRank
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent
from adapterhub.store.history import lineage, rollback, yank

BASE = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))


def publish(hub, name="me/x", content=b"1", parents=(), version=None, base=BASE, **more):
    manifest = Manifest(name=name, version="0.0.0", base=base, method=Made(name="lora"), parents=list(parents), **more)
    return hub.publish(manifest, {"log": content}, b"rows", version=version)[0]


def parent(release, relation="on"):
    return Parent(name=release.name, version=release.version, digest=release.digest, relation=relation)


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def three(hub):
    for i in range(3):
        publish(hub, content=b"%d" % i)
    return hub


def test_a_tag_moves_only_from_where_it_is_expected(three):
    three.tag("me/x@0.1.0", "stable", expected=None)
    with pytest.raises(TagMoved, match=r"0\.1\.0 now, not nothing"):
        three.tag("me/x@0.2.0", "stable", expected=None)
    with pytest.raises(TagMoved):
        three.tag("me/x@0.2.0", "stable", expected="0.3.0")
    assert three.resolve("me/x@stable").version == "0.1.0"
    three.tag("me/x@0.2.0", "stable", expected="0.1.0")
    assert three.resolve("me/x@stable").version == "0.2.0"
    three.tag("me/x@0.3.0", "stable")
    assert three.index.tag_moves("me/x", "stable") == ["0.1.0", "0.2.0", "0.3.0"]


def _move(root, version, go, results):
    hub = adapterhub.open(root)
    go.wait()
    try:
        hub.tag(f"me/x@{version}", "stable", expected="0.1.0")
        results.put(version)
    except TagMoved:
        results.put(None)


def test_B7_of_two_moves_with_one_expectation_one_wins(three):
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        three.tag("me/x@0.1.0", "stable")
        go, results = context.Event(), context.Queue()
        movers = [context.Process(target=_move, args=(three.root, v, go, results)) for v in ("0.2.0", "0.3.0")]
        for mover in movers:
            mover.start()
        go.set()
        won = [results.get(timeout=30) for _ in movers]
        for mover in movers:
            mover.join()
        assert won.count(None) == 1 and three.resolve("me/x@stable").version in won


def test_rollback_goes_to_what_the_tag_meant_before(three):
    with pytest.raises(NotFound):
        rollback(three, "me/x", "stable")
    for version in ("0.1.0", "0.2.0", "0.3.0"):
        three.tag(f"me/x@{version}", "stable")
    assert rollback(three, "me/x", "stable") == ("0.3.0", "0.2.0")
    assert three.resolve("me/x@stable").version == "0.2.0"
    three.tag("me/x@0.1.0", "stable")
    three.remove("me/x@0.2.0")
    with pytest.raises(NotFound, match="was removed"):
        rollback(three, "me/x", "stable")


def test_a_yanked_version_is_not_chosen_and_warns_where_it_is_named(three):
    yank(three, "me/x@0.3.0", "labels were swapped")
    assert three.resolve("me/x").version == "0.2.0"
    with pytest.warns(YankedWarning, match="labels were swapped"):
        assert three.resolve("me/x@0.3.0").version == "0.3.0"
    assert three.index.search(["x"])[0].version == "0.2.0"
    with pytest.warns(YankedWarning):
        yank(three, "me/x@0.3.0", None)
    assert three.resolve("me/x").version == "0.3.0"
    for bad in ("me/x", "me/x@9.9.9"):
        with pytest.raises((UsageError, NotFound)):
            yank(three, bad, "why")
    for reason in ("", "  ", "a\x1b[2Jb"):
        with pytest.raises(UsageError):
            yank(three, "me/x@0.1.0", reason)


def test_a_removed_version_never_comes_back_as_something_else(three):
    digest = three.resolve("me/x@0.3.0").digest
    three.remove("me/x@0.3.0")
    assert publish(three, content=b"new").version == "0.4.0"
    with pytest.raises(adapterhub.errors.NameInUse, match="was there before"):
        publish(three, content=b"newer", version="0.3.0")
    assert publish(three, content=b"2", version="0.3.0").digest == digest
    assert three.verify() == []


def test_lineage_to_the_roots_and_what_is_not_here(hub):
    root = publish(hub, "me/root")
    a, b = (publish(hub, f"me/{n}", n.encode(), [parent(root, "continue")]) for n in "ab")
    merged = publish(hub, "me/merged", b"m", [parent(a, "merge"), parent(b, "merge")])
    hub.remove("me/root", force=True)
    found = [(one.depth, one.label, one.relation, one.here, one.seen) for one in lineage(hub, merged)]
    assert found == [
        (0, "me/merged@0.1.0", "", True, False),
        (1, "me/a@0.1.0", "merge", True, False),
        (2, "me/root@0.1.0", "continue", False, False),
        (1, "me/b@0.1.0", "merge", True, False),
        (2, "me/root@0.1.0", "continue", False, True),
    ]


def test_a_lineage_of_a_thousand(hub):
    last = publish(hub, "me/x")
    chain = []
    for i in range(1000):
        manifest = Manifest(
            name="me/x",
            version=f"1.{i}.0",
            base=last.manifest.base,
            parents=[parent(last, "continue")],
            recipe={"i": i},
        )
        last = adapterhub.spec.manifest.Release(manifest, digest_of(manifest.encode()))
        chain.append(last)
    hub.index.add(chain)
    begin = time.monotonic()
    assert sum(1 for _ in lineage(hub, last)) == 1001
    assert time.monotonic() - begin < 10


def test_search_by_words_and_by_base(hub, monkeypatch, capsys):
    other = Base(name="big", architecture="llama", structure=digest_of(b"others"), sketch=File(digest="", size=0))
    publish(hub, "acme/sql", licence="MIT")
    publish(hub, "acme/tone", base=other)
    publish(hub, "me/a_b")
    assert [row.name for row in hub.index.search(["SQL"])] == ["acme/sql"]
    assert [row.name for row in hub.index.search(["acme", "lora"])] == ["acme/sql", "acme/tone"]
    assert [row.name for row in hub.index.search(["mit"])] == ["acme/sql"]
    assert [row.name for row in hub.index.search(["%"])] == [] and [r.name for r in hub.index.search(["_"])] == [
        "me/a_b"
    ]
    assert [row.name for row in hub.index.search([], digest_of(b"others"))] == ["acme/tone"]
    pages, after = [], ""
    while page := hub.index.search([], after=after, limit=1):
        pages.append(page[0].name)
        after = page[0].name
    assert pages == ["acme/sql", "acme/tone", "me/a_b"]
    monkeypatch.chdir(hub.root)
    assert execute(["search", "--base", "acme/tone", "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)["adapters"]] == ["acme/tone"]


def test_pages_of_the_list_go_on_where_they_ended(three):
    publish(three, "me/y")
    everything = [(row.name, row.version) for row in three.releases()]
    found, after = [], None
    while page := three.index.releases(after=after, limit=2):
        found += [(row.name, row.version) for row in page]
        after = found[-1]
    assert found == everything == [("me/x", "0.3.0"), ("me/x", "0.2.0"), ("me/x", "0.1.0"), ("me/y", "0.1.0")]


# --- differences ----------------------------------------------------------------------------------------------------


def low_rank(rank, seed, inputs=12, outputs=9):
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return LowRank(down=down, up=up, scale=torch.tensor(0.5))


def dense_of(parts):
    return sum(p.delta_weight(None, None)[0].double() for p in parts)


def published(hub, name, parts):
    return publish_tensors(hub, parts, name=name, base=BASE, sketch=b"rows", method=Made(name="lora"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([low_rank(2, 0)], [low_rank(3, 1)]),
        ([low_rank(2, 0), low_rank(1, 2)], [low_rank(2, 0)]),
        ([low_rank(2, 0)], [Dense(weight=torch.randn(9, 12, generator=torch.Generator().manual_seed(3)))]),
    ],
    ids=["ranks", "shared", "dense"],
)
def test_the_difference_is_that_of_the_dense_changes(hub, one, other):
    published(hub, "me/a", {"m.q": one})
    published(hub, "me/b", {"m.q": other})
    found = hub.diff("me/a", "me/b")["sites"][0]
    a, b = dense_of(one), dense_of(other)
    values = torch.linalg.svdvals(a - b).square().cumsum(0)
    assert found["norm"] == pytest.approx(float((a - b).norm()), rel=1e-6)
    assert found["relative"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert found["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-6)
    assert found["rank"] == int((values < 0.99 * values[-1]).sum()) + 1


def test_equal_changes_in_other_factors_are_equal(hub):
    a = low_rank(3, 0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))[0]
    published(hub, "me/a", {"m.q": [a]})
    published(hub, "me/b", {"m.q": [LowRank(down=turn @ a.down, up=a.up @ turn.mT, scale=a.scale)]})
    found = hub.diff("me/a", "me/b")
    assert found["sites"][0]["relative"] < 1e-6 and found["total"]["cosine"] == pytest.approx(1.0)
    assert found["manifest"] == {}


def test_a_site_that_only_one_has_and_forms_that_are_no_change_of_a_weight(hub):
    bottleneck = Bottleneck.random(adapterhub.sites.Site(path="m.b", role="block", inputs=8, outputs=8, linear=False))
    shift = Affine.of(shift=torch.ones(9))
    published(hub, "me/a", {"m.q": [low_rank(2, 0)], "m.b": [bottleneck], "m.s": [shift]})
    published(hub, "me/b", {"m.b": [bottleneck], "m.s": [Affine.of(shift=torch.full((9,), 3.0))]})
    sites = {site["path"]: site for site in hub.diff("me/a", "me/b")["sites"]}
    assert sites["m.q"]["relative"] == pytest.approx(1.0) and sites["m.q"]["cosine"] is None
    assert sites["m.b"]["norm"] == 0 and "tensors compared" in sites["m.b"]["note"] and sites["m.b"]["rank"] is None
    assert sites["m.s"]["norm"] == pytest.approx(6.0)  # nine times two squared, its root
    with pytest.raises(UsageError, match="composition"):
        hub.compose("me/a", "me/c")
        hub.diff("me/a", "me/c")


def test_the_commands(three, monkeypatch, capsys):
    monkeypatch.chdir(three.root)
    assert execute(["tag", "me/x@0.1.0", "stable", "--expect", "none"]) == 0
    assert execute(["tag", "me/x@0.2.0", "stable", "--expect", "0.3.0"]) == 1
    assert execute(["yank", "me/x@0.3.0", "--reason", "bad"]) == 0
    assert execute(["yank", "me/x@0.3.0"]) == 2
    capsys.readouterr()
    assert execute(["log", "me/x", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["versions"]
    assert [(v["version"], v["tags"], v["yanked"]) for v in listed] == [
        ("0.3.0", [], "bad"),
        ("0.2.0", [], None),
        ("0.1.0", ["stable"], None),
    ]
    for style in ("--dot", "--mermaid", "--json"):
        assert execute(["lineage", "me/x@0.1.0", style]) == 0
    assert execute(["lineage", "me/x", "--dot", "--mermaid"]) == 2
