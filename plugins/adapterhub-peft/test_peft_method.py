"""The method and the form `peft`: the laws, every type against PEFT's own model, and what is stored, refused and gone on with."""

import json
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from adapterhub_peft import Peft
from adapterhub_peft_layer import TYPES, PeftLayer, layers, plain, some
from peft_outcomes import FAMILIES, SMALL, outcome, theirs

import adapterhub
from adapterhub import BuildContext, Step, plugins
from adapterhub.adapters.adapter import Adapter, modifications_of
from adapterhub.adapters.fit import check_fit
from adapterhub.errors import HubError, IncompatibleBase, NotFoldable, UsageError
from adapterhub.sites import sites
from adapterhub.tensors.file import dump, load
from adapterhub.testing import check
from adapterhub.testing import methods as laws
from adapterhub.testing.bed import tiny_llama
from adapterhub.testing.families import tiny

TRAINS = sorted({"BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
    "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"})  # fmt: skip
NOT_KEPT = {"FROD", "TINYLORA"}
"""Types that run nowhere but lowered."""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch's, of FRoD
        yield


def config(**options):
    return plugins.options(Peft.Config, options)


def given(model, before=None):
    return BuildContext(sites(model), model, before or {})


def build(model=None, seed=0, **options):
    """(what a stage builds, the stage, what it was given)."""
    start = given(model or tiny_llama())
    (stage,) = Peft().stages(config(**options))
    torch.manual_seed(seed)
    return stage.build(start), stage, start


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("peft") if r.verdict == "failed"] == []


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_type_is_pefts_own_model_or_refused(kind):
    """Logits and gradients while it trains, and the logits of what is stored; or a reason."""
    found = outcome(kind)
    assert found.startswith("lowered to ") if kind in TRAINS else found.startswith("refused: ")


@pytest.mark.parametrize("kind", sorted({*FAMILIES, *NOT_KEPT, "UNILORA", "WAVEFT"}))
def test_a_layer_that_is_kept_is_made_again_from_its_tensors(kind):
    found = outcome(kind, lower="never")
    assert found.startswith("refused: a layer of type") if kind in NOT_KEPT else found == "runs in PEFT's layer"


@pytest.mark.parametrize("kind", ["DEFT", "GLORA"])
@pytest.mark.parametrize("lower", ["auto", "never"])
def test_a_bias_of_the_base_counts(kind, lower):
    """Qwen 2's queries, keys and values have one, which these types scale or read."""
    assert outcome(kind, lower, lambda: tiny("qwen2")).startswith(("lowered", "runs"))


def test_families_are_types_that_train():
    assert len(FAMILIES) >= 20 and FAMILIES.keys() <= set(TRAINS)


def of_type(kind, **more):
    """The method with another default, for the laws."""

    class Other(Peft):
        @dataclass(frozen=True)
        class Config(Peft.Config):
            type: str = kind
            config: dict = field(default_factory=lambda: SMALL.get(kind, {}) | more)

    return Other


@pytest.mark.parametrize("method", [of_type("VBLORA"), of_type("LORA", lora_dropout=0.2)])
def test_a_run_that_was_killed_ends_with_the_same_bits(method):
    laws.resume(method, "cpu")


# --- what is stored --------------------------------------------------------------------------------------------------


def moved(parts):
    """As training leaves them, without what is not stored: other numbers, by their stored names."""
    draw = torch.Generator().manual_seed(1)
    for part in parts.values():
        for key, tensor in part.tensors.items():
            if key.startswith("t"):
                part.tensors[key] = tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
    named = {f"{path}.peft.0.{key}": tensor for path, part in parts.items() for key, tensor in part.tensors.items()}
    return {path: part for path, [part] in modifications_of(load(dump(named))).items()}


def test_lora_keeps_its_factors_bit_by_bit():
    parts, stage, start = build(config={"r": 3, "lora_alpha": 6, "use_rslora": True}, target_modules="query")
    stored = stage.finish(moved(parts), start)
    assert len(stored) == 2
    for path, [part] in stored.items():
        named = {name: parts[path].tensors[key] for key, name in parts[path].names.items()}
        assert torch.equal(part.down, named["lora_A.default.weight"]) and part.form == "low_rank"
        assert torch.equal(part.up, named["lora_B.default.weight"]) and part.scale.item() == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ({"config": {"use_dora": True}}, ["dora"]),
        ({"target_modules": "embedding"}, ["low_rank"]),
        ({"target_modules": "embedding", "config": {"use_dora": True}}, ["dense"]),
        ({"target_modules": "q_proj", "config": {"lora_bias": True}}, ["affine", "low_rank"]),
        ({"type": "hra", "target_modules": "head", "config": {"r": 4}}, ["low_rank"]),
        ({"type": "TRAINABLE_TOKENS", "target_modules": "head", "config": {"token_indices": [3]}}, ["sparse"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_stored_does_the_same(options, forms):
    parts, stage, start = build(**options)
    after = moved(parts)
    places, before = {site.path: site for site in start.sites}, {}
    for path, part in parts.items():
        part.bind(start.weight(places[path]))
        before[path] = part.delta_out(some(places[path]), None, Step())
    stored = stage.finish(after, start)
    assert stored.keys() == parts.keys() and sorted({part.form for here in stored.values() for part in here}) == forms
    for path, here in stored.items():
        for part in here:
            part.bind(start.weight(places[path]))
        y = torch.zeros_like(before[path])
        found = sum(part.delta_out(some(places[path]), y, Step()) for part in here)
        assert torch.allclose(found, before[path], atol=1e-5 * before[path].abs().max().item())


@pytest.mark.parametrize(("kind", "stays"), [("LORA", False), ("VBLORA", True)])
def test_a_site_where_nothing_trained_is_left_out_if_it_changes_nothing(kind, stays):
    """As schedules leave sites out. LoRA begins with no change; VB-LoRA does not, and its bank has trained elsewhere."""
    parts, stage, start = build(type=kind, config=SMALL[kind], target_modules="query")
    first, last = parts
    after = moved(parts) if kind == "LORA" else {path: PeftLayer(**part.tensors) for path, part in parts.items()}
    parts[last].tensors = build(type=kind, config=SMALL[kind], target_modules="query")[0][last].tensors
    stored = stage.finish({first: after[first]}, start)
    assert (last in stored) == stays and first in stored


@pytest.mark.parametrize("kind", ["OFT", "ROAD", "SHIRA", "LOHA"])
def test_the_change_of_the_weight_is_what_peft_merges(kind):
    parts, _, start = build(type=kind, config=SMALL[kind], target_modules=["q_proj", "down_proj"])
    moved(parts)
    peft = theirs(kind, SMALL[kind], parts, tiny_llama())
    merged, base = peft.merge_and_unload(), tiny_llama()
    for site in start.sites:
        if site.path in parts:
            parts[site.path].bind(start.weight(site))
            change, shift = parts[site.path].delta_weight(start.weight(site), None)
            wanted = merged.get_submodule(site.path).weight - base.get_submodule(site.path).weight
            assert shift is None and torch.allclose(change, wanted, atol=1e-5)


def test_what_is_not_linear_is_found_out_before_it_trains(monkeypatch):
    from peft.tuners.hra.layer import HRALinear

    own = HRALinear.forward
    monkeypatch.setattr(HRALinear, "forward", lambda self, x: own(self, x).tanh())
    with pytest.raises(NotFoldable, match="not linear") as caught:
        build(type="HRA", config=SMALL["HRA"])
    assert "lower=never" in caught.value.hint
    parts, _, _ = build(type="HRA", config=SMALL["HRA"], lower="never")
    assert parts


# --- in a hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path):
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return adapterhub.open(tmp_path / "hub", create=True), tmp_path / "rows.jsonl"


RUN = {"steps": 3, "lr": 1e-2, "device": "cpu"}


def test_a_lora_goes_on_as_what_it_was_lowered_to(work, tiny_folder):
    hub, path = work
    options = {"config": {"r": 4, "lora_dropout": 0.1}, "target_modules": "query"}
    first = hub.train(str(tiny_folder), "peft", path, "me/x", options=options, **RUN)
    second = hub.train(str(tiny_folder), data=path, continue_from="me/x", **RUN)
    assert {form for here in second.manifest.forms.values() for form in here} == {
        "low_rank"
    } and not second.manifest.plugins
    before, now = (Adapter.load(hub, release).tensors for release in (first, second))
    assert before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in before if n.endswith("scale"))
    assert not any(torch.equal(before[n], now[n]) for n in before if n.endswith("down"))


def test_other_types_go_on_if_they_are_kept(work, tiny_folder):
    """VB-LoRA's one vector bank is one again: it is the same at all sites before and after."""
    hub, path = work
    options = {"type": "vblora", "config": SMALL["VBLORA"], "target_modules": ["query", "value"]}
    hub.train(str(tiny_folder), "peft", path, "me/lowered", options=options, **RUN)
    with pytest.raises(UsageError, match="was lowered") as caught:
        hub.train(str(tiny_folder), data=path, continue_from="me/lowered", **RUN)
    assert "lower=never" in caught.value.hint
    first = hub.train(str(tiny_folder), "peft", path, "me/kept", options=options | {"lower": "never"}, **RUN)
    second = hub.train(str(tiny_folder), data=path, continue_from="me/kept", **RUN)
    banks = []
    for release in (first, second):
        parts = Adapter.load(hub, release).modifications()
        names = [{name: part.tensors[key] for key, name in part.names.items()} for [part] in parts.values()]
        banks.append([named["vblora_vector_bank.default"] for named in names])
        assert len(banks[-1]) == 4 and all(torch.equal(bank, banks[-1][0]) for bank in banks[-1])
    assert not torch.equal(banks[0][0], banks[1][0])


def test_a_kept_layer_stacks_routes_merges_and_lies_beneath_others(work, tiny_folder):
    hub, path = work
    options = {"type": "ROAD", "config": SMALL["ROAD"]}
    hub.train(str(tiny_folder), "peft", path, "me/low", options=options, **RUN)
    kept = hub.train(str(tiny_folder), "peft", path, "me/kept", options=options | {"lower": "never"}, **RUN)
    assert kept.manifest.plugins.keys() == {"adapterhub-peft"}
    over = hub.train(str(tiny_folder), "peft", path, "me/over", options={"config": {"r": 2}}, on=["me/kept"], **RUN)
    assert [(parent.name, parent.relation) for parent in over.manifest.parents] == [("me/kept", "on")]
    hub.merge(["me/kept", "me/over"], name="me/merged", merger="linear", options={})
    model, ids = hub.load(str(tiny_folder), device="cpu"), torch.arange(3, 15)[None]

    @torch.no_grad()
    def logits(*rows):
        return model(input_ids=ids.expand(len(rows), -1), adapters=list(rows)).logits

    low, kept, stack, merged, half = (
        logits(row)[0] for row in ("me/low", "me/kept", "me/kept + me/over", "me/merged", "0.5*me/kept + me/over")
    )
    assert torch.allclose(low, kept, atol=1e-4) and torch.allclose(stack, merged, atol=1e-4)
    assert not torch.allclose(stack, half, atol=1e-2)
    batch = logits("me/kept", None, "me/kept + me/over", "me/low")
    for row, alone in zip(batch, (kept, logits(None)[0], stack, low), strict=True):
        assert torch.allclose(row, alone, atol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "LORO"}, "no type 'LORO'"),
        ({"type": "PREFIX_TUNING"}, "built-in method prefix"),
        ({"type": "IA3"}, "built-in method ia3"),
        ({"type": "LN_TUNING"}, "built-in method full"),
        ({"type": "LILY"}, "batch's others"),
        ({"lower": "sometimes"}, "lower"),
        ({"config": {"rank": 4}}, "none of LORA's"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "none for the layers"),
        ({"config": {"target_modules": ["q_proj"]}}, "none for the layers"),
        ({"config": {"init_lora_weights": "pissa"}}, "starts"),
        ({"config": {"rank_pattern": {"q_proj": 5}}}, "none for the layers"),
        ({"type": "OSF", "config": {"target_svd_config": {"q_proj": 5}}}, "none for the layers"),
        ({"config": {"r": 0}}, "PEFT does not take"),
        ({"config": {"r": {"a": {"b": {"c": 1}}}}}, "no plain value"),
        ({"type": "BOFT", "config": {"boft_block_size": 7}}, "PEFT does not take"),
        ({"type": "TRAINABLE_TOKENS"}, "PEFT does not take"),
        ({"target_modules": "norm"}, "no linear layer"),
        ({"target_modules": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(HubError, match=words) as caught:
        build(**options)
    assert caught.value.hint


def stored(**changes):
    told = {"type": "VERA", "options": {"r": 4}, "embedding": False, "names": {}} | changes
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"config": torch.zeros(3)},
        {"config": torch.zeros(1 << 17, dtype=torch.uint8)},
        {"config": torch.full((4,), 91, dtype=torch.uint8)},
        {"config": stored(more=1)},
        {"config": stored(type="EVIL")},
        {"config": stored(type="PREFIX_TUNING")},
        {"config": stored(options={"r": 1 << 30})},
        {"config": stored(options={"base_model_name_or_path": "evil/x"})},
        {"config": stored(options={"init_lora_weights": "pissa"}, type="LORA")},
        {"config": stored(), "t0": torch.zeros(4)},
        {"config": stored(names={"t0": "vera_lambda_d.default"}), "t0": torch.zeros(5)},
        {"config": stored(names={"t0": "base_layer.weight"}), "t0": torch.zeros(32, 32)},
        {"config": stored(names={"t0": "nothing"}), "t0": torch.zeros(4)},
        {"config": stored(names={"t0": "vera_lambda_d.default"})},
    ],
    ids=range(14),
)
def test_a_hostile_file_is_refused(tensors):
    site = next(site for site in sites(tiny_llama()) if site.role == "query")
    with pytest.raises(HubError):
        check_fit({site.path: [modifications_of_one(tensors)]}, [site], "it")


def of_lora(**options):
    """(a stored layer of type LORA that does something, its site)."""
    site = next(site for site in sites(tiny_llama()) if site.role == "query")
    options = {"r": 4, "lora_alpha": 8} | options
    layer = layers("LORA", options, {"site": plain(torch.randn(site.outputs, site.inputs))})["site"]
    part = PeftLayer.of("LORA", options, layer)
    torch.manual_seed(2)
    return {k: torch.randn_like(t) if k.startswith("t") else t for k, t in part.tensors.items()}, site


@pytest.mark.parametrize("cut", [lambda t: t[:1], lambda t: t[:, :1], lambda t: t[None]])
@pytest.mark.parametrize("key", ["t0", "t1"])
def test_tensors_of_another_shape_are_refused(key, cut):
    """Those too that would spread over the layer's."""
    tensors, site = of_lora()
    PeftLayer(**tensors).check(site)
    with pytest.raises(IncompatibleBase, match=r"lora_.*where .* belongs"):
        PeftLayer(**tensors | {key: cut(tensors[key])}).check(site)


def test_shared_projections_may_be_those_of_a_wider_layer_and_of_no_narrower_one():
    site = next(site for site in sites(tiny_llama()) if site.role == "query")
    torch.manual_seed(3)
    part = PeftLayer.random(site)
    key = next(key for key, name in part.names.items() if name.startswith("vera_A"))
    own = part.tensors[key]
    part = PeftLayer(**part.tensors | {key: torch.cat([own, own], 1)})
    part.check(site)
    with pytest.raises(IncompatibleBase, match="vera_A"):
        PeftLayer(**part.tensors | {key: own[:1]}).check(site)


@pytest.mark.parametrize("dora", [False, True])
def test_what_overflows_is_refused(dora):
    tensors, site = of_lora(use_dora=dora)
    PeftLayer(**tensors).check(site)
    PeftLayer(**tensors | {key: torch.zeros_like(t) for key, t in tensors.items() if key == "t1"}).check(site)
    tensors, site = of_lora(use_dora=dora, lora_alpha=1e308)
    with pytest.raises(IncompatibleBase, match="overflows") as caught:
        PeftLayer(**tensors).check(site)
    assert caught.value.hint


def modifications_of_one(tensors):
    [[part]] = modifications_of({f"a.b.peft.0.{key}": tensor for key, tensor in tensors.items()}).values()
    return part
