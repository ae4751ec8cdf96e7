"""Resolution: what fits together is found whenever it exists, and a conflict is told in words."""

import itertools
import random
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shelf import Shelf, base, release, sources

from adapterhub.errors import HubError, NotFound, UsageError
from adapterhub.install.conflicts import Conflict
from adapterhub.install.question import Asked, Rules
from adapterhub.install.resolver import resolve
from adapterhub.plugins import runs
from adapterhub.spec.requirement import Requirement


def ask(*texts, by="adapterhub.toml"):
    return [Asked(Requirement.parse(text), by) for text in texts]


def chosen(answer):
    return {name: found.version for name, (found, _) in answer.chosen.items()}


@pytest.fixture
def shelf():
    return Shelf()


# --- requirements ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "acme/sql",
        "acme/sql>=1.2,<2",
        "acme/sql==1.2.0",
        "acme/sql@stable",
        "team:acme/sql>=1",
        "acme/sql@sha256:" + "0" * 64,
    ],
)
def test_a_requirement_reads_as_it_is_written(text):
    assert str(Requirement.parse(text)) == text
    assert Requirement.parse(str(Requirement.parse(text))) == Requirement.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme/sql@",
        "acme/sql>>1",
        "acme/sql=1",
        "ACME/sql",
        "../x>=1",
        "acme/sql>=1;x",
        "acme/sql===1",
        "a b",
        "acme/sql@MD5:0",
    ],
)
def test_what_is_no_requirement(text):
    with pytest.raises(UsageError) as caught:
        Requirement.parse(text)
    assert caught.value.hint


def test_at_a_version_is_that_version():
    assert str(Requirement.parse("acme/sql@1.2.0")) == "acme/sql==1.2.0" and Requirement.parse("acme/sql@1.2.0").exact


# --- the answer -----------------------------------------------------------------------------------------------------


def test_the_newest_that_is_allowed(shelf):
    shelf.put(*(release("acme/sql", v) for v in ("1.0.0", "1.9.0", "1.10.0", "2.0.0")))
    assert chosen(resolve(ask("acme/sql>=1,<2"), sources(shelf), {})) == {"acme/sql": "1.10.0"}
    assert chosen(resolve(ask("acme/sql"), sources(shelf), {})) == {"acme/sql": "2.0.0"}


def test_tags_digests_and_exact_versions(shelf):
    one, two = (shelf.put(release("acme/sql", v), tags=t) for v, t in (("1.0.0", ["stable"]), ("2.0.0", [])))
    for text, expected in (("acme/sql@stable", one), (f"acme/sql@{one.digest}", one), ("acme/sql==2.0.0", two)):
        assert resolve(ask(text), sources(shelf), {}).chosen["acme/sql"][0] == expected


def test_what_runs_together_shares_a_base_and_a_tokenizer(shelf):
    shelf.put(release("acme/a", "1.0.0", made_for=base("one")), release("acme/a", "2.0.0", made_for=base("two")))
    shelf.put(release("acme/b", "1.0.0", made_for=base("one")))
    asked = ask("acme/a", "acme/b")
    assert chosen(resolve(asked, sources(shelf), {})) == {"acme/a": "2.0.0", "acme/b": "1.0.0"}
    together = {"helpdesk": ["acme/a", "acme/b"]}
    assert chosen(resolve(asked, sources(shelf), together)) == {"acme/a": "1.0.0", "acme/b": "1.0.0"}
    copies = Rules(copies=lambda one, other: True)
    assert chosen(resolve(asked, sources(shelf), together, copies))["acme/a"] == "2.0.0"
    shelf.put(release("acme/c", "1.0.0", made_for=base("one", tokenizer="x")))
    shelf.put(release("acme/d", "1.0.0", made_for=base("one", tokenizer="y")))
    with pytest.raises(Conflict, match="different bases"):
        resolve(ask("acme/c", "acme/d"), sources(shelf), {"s": ["acme/c", "acme/d"]})


def test_parents_come_along_and_may_stand_beside_another_version_of_themselves(shelf):
    old, new = shelf.put(release("acme/root", "1.0.0")), shelf.put(release("acme/root", "2.0.0"))
    child = shelf.put(release("acme/child", "1.0.0", on=[old]))
    answer = resolve(ask("acme/child", "acme/root>=2"), sources(shelf), {})
    assert set(answer.releases) == {old.digest, new.digest, child.digest}
    assert chosen(answer) == {"acme/child": "1.0.0", "acme/root": "2.0.0"}


def test_plugins_are_checked_and_a_version_that_they_run_is_found(shelf):
    shelf.put(release("acme/a", "1.0.0", plugins={"adapterhub-loreft": "0.1.0"}))
    shelf.put(release("acme/a", "2.0.0", plugins={"adapterhub-loreft": "7.0.0"}))
    answer = resolve(ask("acme/a"), sources(shelf), {})
    assert chosen(answer) == {"acme/a": "1.0.0"} and answer.plugins == {"adapterhub-loreft": "0.1.0"}
    with pytest.raises(Conflict, match=r"made with adapterhub-loreft 7\.0\.0, and 0\.1\.0 is installed"):
        resolve(ask("acme/a>=2"), sources(shelf), {})
    shelf.put(release("acme/evil", "1.0.0", plugins={"evil-package": "1.0.0"}))
    with pytest.raises(Conflict) as caught:
        resolve(ask("acme/evil"), sources(shelf), {})
    assert "evil-package" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("installed", "made_with", "does"),
    [("0.1.0", "0.1.0", True), ("0.2.0", "0.1.0", True), ("0.1.0", "0.2.0", False), ("2.0.0", "1.9.0", False)],
)
def test_which_plugin_versions_run_what(installed, made_with, does):
    assert runs(installed, made_with) is does


def test_E2_a_bound_namespace_is_looked_for_in_its_source_alone():
    public, team = Shelf("public"), Shelf("team")
    public.put(release("acme/sql", "9.0.0"))
    ours = team.put(release("acme/sql", "1.0.0"))
    answer = resolve(ask("acme/sql"), sources(public, team, bound={"team": ["acme"]}), {})
    assert answer.chosen["acme/sql"] == (ours, "team") and answer.notes == []
    first = resolve(ask("acme/sql"), sources(team, public), {})
    assert first.chosen["acme/sql"] == (ours, "team")
    assert first.notes == ["acme/sql: public has a higher version than team, which comes first"]
    assert resolve(ask("public:acme/sql"), sources(team, public), {}).chosen["acme/sql"][1] == "public"


def test_E3_a_yanked_version_is_chosen_only_where_it_is_named_or_locked(shelf):
    shelf.put(release("acme/sql", "1.0.0"))
    gone = shelf.put(release("acme/sql", "2.0.0"), yanked="bad data")
    assert chosen(resolve(ask("acme/sql"), sources(shelf), {})) == {"acme/sql": "1.0.0"}
    named = resolve(ask("acme/sql==2.0.0"), sources(shelf), {})
    assert chosen(named) == {"acme/sql": "2.0.0"} and named.notes == ["acme/sql@2.0.0 was yanked: bad data"]
    locked = resolve(ask("acme/sql"), sources(shelf), {}, Rules(prefer={"acme/sql": gone.digest}))
    assert chosen(locked) == {"acme/sql": "2.0.0"}


def test_E10_newer_releases_are_not_seen_but_for_exceptions(shelf):
    shelf.put(release("acme/sql", "1.0.0"), created="2026-01-01T00:00:00Z")
    shelf.put(release("acme/sql", "2.0.0"), created="2026-03-01T00:00:00Z")
    before = Rules(before="2026-02-01T23:59:59Z")
    assert chosen(resolve(ask("acme/sql"), sources(shelf), {}, before)) == {"acme/sql": "1.0.0"}
    excepted = Rules(before="2026-02-01T23:59:59Z", but=["acme/sql"])
    assert chosen(resolve(ask("acme/sql"), sources(shelf), {}, excepted)) == {"acme/sql": "2.0.0"}
    with pytest.raises(NotFound, match="2025"):
        resolve(ask("acme/sql"), sources(shelf), {}, Rules(before="2025-01-01T00:00:00Z"))


def test_few_manifests_are_asked_for(shelf):
    shelf.put(*(release("acme/sql", f"1.{i}.0") for i in range(50)))
    resolve(ask("acme/sql"), sources(shelf), {})
    assert shelf.asked == ["acme/sql@1.49.0"]


# --- E4: against brute force ----------------------------------------------------------------------------------------

NAMES = [f"a/{c}" for c in "abcdef"]
BASES = ["one", "two", "three"]


@st.composite
def worlds(draw):
    """Up to six names with up to four versions each, made for one of three bases; ranges; stacks."""
    names = NAMES[: draw(st.integers(1, 6))]
    offered = {
        name: {f"{v}.0.0": draw(st.sampled_from(BASES)) for v in range(1, draw(st.integers(1, 4)) + 1)}
        for name in names
    }
    asked = {
        name: draw(st.sampled_from(["", ">=2", "<3", "==1.0.0", "!=2.0.0", ">=2,<4"]))
        for name in names
        if draw(st.booleans())
    } or {names[0]: ""}
    pool = sorted(asked)
    stacks = {
        f"s{i}": draw(st.lists(st.sampled_from(pool), min_size=1, max_size=len(pool), unique=True))
        for i in range(draw(st.integers(0, 3)))
    }
    return offered, asked, stacks


def answers(offered, asked, stacks):
    """Every choice that satisfies everything, by trying all."""
    names = sorted(asked)
    for versions in itertools.product(*(offered[name] for name in names)):
        choice = dict(zip(names, versions, strict=True))
        fits = all(Requirement.parse(n + asked[n]).versions.contains(v) for n, v in choice.items())
        if fits and all(len({offered[n][choice[n]] for n in stack}) == 1 for stack in stacks.values()):
            yield choice


def solve(offered, asked, stacks, order=None, more=()):
    shelf = Shelf()
    for name, versions in [*offered.items(), *more]:
        shelf.put(*(release(name, version, made_for=base(made)) for version, made in versions.items()))
    wanted = ask(*(name + text for name, text in asked.items()))
    if order:
        order.shuffle(wanted)
        for found in shelf.offered.values():
            order.shuffle(found)
    try:
        return chosen(resolve(wanted, sources(shelf), stacks))
    except (Conflict, NotFound):
        return None


def _holds(world, seed):
    offered, asked, stacks = world
    expected = list(answers(offered, asked, stacks))
    found = solve(offered, asked, stacks)
    assert (found in expected) if expected else found is None
    assert solve(offered, asked, stacks, order=random.Random(seed)) == found
    assert solve(offered, asked, stacks, more=[("z/z", {"1.0.0": "one"})]) == found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), st.integers(0, 99))
def test_E4_agrees_with_brute_force(world, seed):
    _holds(world, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), st.integers(0, 99))
def test_E4_agrees_with_brute_force_two_thousand_times(world, seed):
    _holds(world, seed)


# --- E5: graphs that hurt -------------------------------------------------------------------------------------------


@pytest.fixture
def bounded():
    """At most 2 s of processor time, and 500 MB more than now."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_E5_three_hundred_names_of_twenty_versions(request):
    shelf = Shelf()
    shelf.put(*(release(f"a/n{n}", f"1.{v}.0", made_for=base(BASES[v % 3])) for n in range(300) for v in range(20)))
    request.getfixturevalue("bounded")
    names = [f"a/n{n}" for n in range(300)]
    answer = resolve(ask(*names), sources(shelf), {"all": names})
    assert len(set(chosen(answer).values())) == 1


def test_E5_a_chain_of_ten_thousand_and_a_diamond(request):
    shelf = Shelf()
    root = last = shelf.put(release("a/c0", "1.0.0"))
    for i in range(1, 10_000):
        last = shelf.put(release(f"a/c{i}", "1.0.0", on=[last]))
    left, right = (shelf.put(release(f"a/{side}", "1.0.0", on=[root])) for side in ("left", "right"))
    top = shelf.put(release("a/top", "1.0.0", on=[left, right]))
    request.getfixturevalue("bounded")
    assert len(resolve(ask(last.name), sources(shelf), {}).releases) == 10_000
    assert len(resolve(ask(top.name), sources(shelf), {}).releases) == 4


def test_E5_more_than_a_source_may_ask_us_to_take(monkeypatch):
    monkeypatch.setattr("adapterhub.sources.source.LARGEST_GRAPH", 50)
    shelf = Shelf()
    last = shelf.put(release("a/c0", "1.0.0"))
    for i in range(1, 100):
        last = shelf.put(release(f"a/c{i}", "1.0.0", on=[last]))
    with pytest.raises(HubError, match="more than 50"):
        resolve(ask(last.name), sources(shelf), {})


def test_E5_a_source_that_claims_a_cycle(shelf):
    """A digest cannot hold itself, so the claim is a release under another's digest: it is taken once, and not believed."""
    a = release("a/a", "1.0.0")
    b = shelf.put(release("a/b", "1.0.0", on=[a]))
    shelf.releases[a.digest] = b
    shelf.offered["a/a"] = []
    with pytest.raises(HubError):
        resolve(ask("a/b"), sources(shelf), {})


# --- E6: conflicts in words -----------------------------------------------------------------------------------------


def test_E6_ranges_that_exclude_one_another(shelf):
    shelf.put(*(release("acme/sql", v) for v in ("1.0.0", "1.5.0", "2.0.0")))
    asked = [*ask("acme/sql>=2"), *ask("acme/sql<2", by="the stack helpdesk")]
    with pytest.raises(Conflict) as caught:
        resolve(asked, sources(shelf), {})
    assert str(caught.value) == (
        "no version of acme/sql is what everybody asks for:\n"
        "  adapterhub.toml asks for acme/sql>=2, which 2.0.0 would be\n"
        "  the stack helpdesk asks for acme/sql<2, which 1.5.0, 1.0.0 would be"
    )
    assert caught.value.hint == "change one of them; there is 2.0.0, 1.5.0, 1.0.0"


def test_E6_a_stack_of_two_bases(shelf):
    shelf.put(release("acme/a", "1.0.0", made_for=base("one")), release("acme/a", "2.0.0", made_for=base("two")))
    shelf.put(release("acme/b", "1.0.0", made_for=base("one")))
    with pytest.raises(Conflict) as caught:
        resolve(ask("acme/a>=2", "acme/b"), sources(shelf), {"helpdesk": ["acme/a", "acme/b"]})
    assert str(caught.value) == (
        "what runs together in the stack helpdesk was made for different bases:\n"
        "  acme/a@2.0.0 runs on two (3fc4ccfe7458)\n"
        "  acme/b@1.0.0 runs on one (7692c3ad3540)"
    )
    assert caught.value.hint == "ask for versions that share a base; on one (7692c3ad3540): acme/a 1.0.0, acme/b 1.0.0"
