"""Models with adapters on them: what runs where, what is refused, and anyone's own training loop."""

import warnings

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import BaseWarning, fingerprint
from adapterhub.bases.resolution import resolve
from adapterhub.errors import (
    BatchError,
    HubError,
    IncompatibleBase,
    NotFoldable,
    NotFound,
    ParentsWarning,
    UnsafeFile,
    UsageError,
)
from adapterhub.sites import sites
from adapterhub.spec.manifest import Made


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_folder):
    """Random adapters on the tiny Llama: me/a and me/c low rank, me/b sequential bottleneck, me/p parallel."""
    hub = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True)
    base = fingerprint(resolve(str(tiny_folder)))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    recipes = {
        "me/a": ("lora", {"r": 4}),
        "me/b": ("bottleneck", {"r": 6}),
        "me/c": ("lora", {"r": 3, "target_modules": "q_proj,lm_head"}),
        "me/p": ("bottleneck", {"r": 5, "parallel": True, "target_modules": "ffn"}),
    }
    for seed, (name, (method, options)) in enumerate(recipes.items()):
        torch.manual_seed(seed)
        kind = plugins.load("methods", method)
        made = kind().build(sites(model), plugins.options(kind.Config, options))
        for modification in made.values():
            for key, tensor in modification.tensors.items():
                if key not in modification.constants:
                    modification.tensors[key] = tensor + 0.05 * torch.randn_like(tensor)
        publish_tensors(
            hub, {path: [m] for path, m in made.items()}, name=name, base=base.base, sketch=base.sketch,
            method=Made(name=method, options=options),
        )  # fmt: skip
    return hub


@pytest.fixture
def load(hub, tiny_folder):
    return lambda expression=None, **settings: hub.load(str(tiny_folder), expression, device="cpu", **settings)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(5))


def test_one_expression_for_all_rows_or_one_for_each(load, ids):
    model = load("me/a + 0.5*me/b")
    default = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, adapters="me/a + 0.5*me/b").logits, default)
    mixed = model(input_ids=ids, adapters=["me/a", "me/b + me/a", None]).logits
    for row, expression in enumerate(["me/a", "me/b + me/a", None]):
        alone = load(expression)(input_ids=ids[row : row + 1]).logits[0]
        assert torch.allclose(mixed[row], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], default[0], atol=1e-3)


def test_the_bare_base_is_the_base(load, ids, tiny_folder):
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)(input_ids=ids).logits
    assert torch.equal(load()(input_ids=ids).logits, plain)
    assert torch.equal(load("me/a")(input_ids=ids, adapters=[None] * 3).logits, plain)


def test_order_matters_where_it_should(load, ids):
    model = load()
    ab, ba = (model(input_ids=ids, adapters=e).logits for e in ("me/b + me/a", "me/a + me/b"))
    assert torch.allclose(ab, ba, atol=1e-5)  # at different sites
    ac, ca = (model(input_ids=ids, adapters=e).logits for e in ("me/a + me/c", "me/c + me/a"))
    assert torch.allclose(ac, ca, atol=1e-5)  # additive at the same sites
    bp, pb = (model(input_ids=ids, adapters=e).logits for e in ("me/b + me/p", "me/p + me/b"))
    assert not torch.allclose(bp, pb, atol=1e-4)  # sequential over parallel is not parallel over sequential
    both = model(input_ids=ids[:2], adapters=["me/b + me/p", "me/p + me/b"]).logits  # each row keeps its order
    assert torch.allclose(both[0], bp[0], atol=1e-5) and torch.allclose(both[1], pb[1], atol=1e-5)
    mix, stack = (model(input_ids=ids, adapters=e).logits for e in ("mix(me/b, me/p)", "me/p + me/b"))
    assert not torch.allclose(mix, stack, atol=1e-4)


def test_minus_takes_away(load, ids):
    model = load()
    assert torch.allclose(model(input_ids=ids, adapters="me/a - me/a").logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_saved_composition_runs_as_its_expression(hub, load, ids):
    release = hub.compose("0.7*me/a + me/b", name="me/stack")
    assert release.manifest.compose == "0.7*me/a@0.1.0 + me/b@0.1.0" and not release.manifest.files
    model = load()
    assert torch.equal(
        model(input_ids=ids, adapters="me/stack - me/c").logits,
        model(input_ids=ids, adapters="(0.7*me/a + me/b) - me/c").logits,
    )


def test_fold_is_the_same_model(load, ids):
    attached = load("me/a - 0.5*me/c")
    want = attached(input_ids=ids).logits
    plain = attached.fold()
    assert torch.allclose(plain(input_ids=ids).logits, want, atol=1e-5)
    refused = load("me/a + me/b")
    before = {name: t.clone() for name, t in refused.base.state_dict().items()}
    with pytest.raises(NotFoldable):
        refused.fold()
    assert all(torch.equal(t, before[name]) for name, t in refused.base.state_dict().items())


def test_fold_refuses_a_shared_weight(hub, tmp_path, tiny_saved, tiny_model, ids):
    tied = tiny_saved(tmp_path / "tied", tiny_model(tie_word_embeddings=True))
    with pytest.warns(BaseWarning):
        model = hub.load(str(tied), "me/c", device="cpu", force=True)
    with pytest.raises(NotFoldable, match="shares its weight"):
        model.fold()


def test_detach_gives_the_base_back(load, ids):
    model = load("me/a")
    plain = model.detach()
    assert torch.equal(plain(input_ids=ids).logits, load()(input_ids=ids).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_positions_come_from_the_mask(load, ids):
    model = load("me/a")
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    alone = model(input_ids=ids[:1, 4:]).logits[0]
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[0, 4:], alone, atol=1e-5)


@pytest.mark.parametrize("adapters", [["me/a"], ["me/a"] * 4, []])
def test_a_batch_that_is_not_the_rows_given_is_refused(load, ids, adapters):
    with pytest.raises(BatchError, match="rows"):
        load()(input_ids=ids, adapters=adapters)


def test_beams_are_refused_and_sequences_repeat_the_rows(load, ids):
    model = load()
    rows = ["me/a", "me/b", None]
    with pytest.raises(BatchError, match="beam"):
        model.generate(input_ids=ids, adapters=rows, num_beams=2, max_new_tokens=3)
    with pytest.raises(BatchError):
        model.base.generation_config.num_beams = 2
        model.generate(input_ids=ids, adapters=rows, max_new_tokens=3)
    model.base.generation_config.num_beams = 1
    torch.manual_seed(0)
    out = model.generate(input_ids=ids, adapters=rows, num_return_sequences=2, do_sample=True, max_new_tokens=4,
                         output_logits=True, return_dict_in_generate=True)  # fmt: skip
    assert out.sequences.shape == (6, 13)
    for row in range(6):
        want = model(input_ids=out.sequences[row : row + 1, :-1], adapters=[rows[row // 2]]).logits[0, 8:]
        got = torch.stack([step[row] for step in out.logits])
        assert torch.allclose(got, want, atol=1e-4), f"sequence {row} ran another row's adapter"


def test_generation_of_a_mixed_batch_is_each_alone(load, tiny_folder):
    model = load()
    texts, rows = ["Hello there", "a", "What is it?"], ["me/a", "me/b + me/a", None]
    together = model.complete(texts, adapters=rows, max_new_tokens=8)
    assert together == [
        model.complete([t], adapters=[r], max_new_tokens=8)[0] for t, r in zip(texts, rows, strict=True)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    batch = tokenizer(texts[2], return_tensors="pt", return_token_type_ids=False)
    out = plain.generate(**batch, do_sample=False, max_new_tokens=8)
    assert together[2] == tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_another_base_is_refused_and_forced(hub, tmp_path, tiny_saved, tiny_model, ids):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=1))
    with pytest.raises(IncompatibleBase, match="another model") as caught:
        hub.load(str(other), "me/a", device="cpu")
    assert "--force" in caught.value.hint
    with pytest.warns(BaseWarning, match="forced"):
        hub.load(str(other), "me/a", device="cpu", force=True)(input_ids=ids)
    with pytest.raises(IncompatibleBase):  # also one that joins later
        hub.load(str(other), device="cpu")(input_ids=ids, adapters=["me/a", None, None])
    narrow = tiny_saved(tmp_path / "narrow", tiny_model(hidden_size=16, num_hidden_layers=1))
    with (
        pytest.warns(BaseWarning),
        pytest.raises(IncompatibleBase, match=r"model.layers.1.mlp.down_proj: no such site"),
    ):
        hub.load(str(narrow), "me/a", device="cpu", force=True)


def test_a_loaded_model_is_a_base(hub, ids, tiny_model, tiny_folder):
    own = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = hub.load(own, "me/a")
    assert model.base is own
    assert torch.equal(
        model(input_ids=ids).logits, hub.load(str(tiny_folder), "me/a", device="cpu")(input_ids=ids).logits
    )
    with pytest.raises(IncompatibleBase):
        hub.load(tiny_model(seed=3), "me/a")


def test_unknown_names(load, ids):
    with pytest.raises(NotFound):
        load("me/nothing")
    with pytest.raises(NotFound):
        load("me/a@9.9.9")
    with pytest.raises(UsageError, match="is not in"):
        load("me/a", trainable=["me/b"])


def test_anyones_own_loop(hub, load, ids):
    model = load("me/a + me/b", trainable=["me/b"])
    frozen = {name: t.clone() for name, t in model.base.state_dict().items()}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.trainable_parameters())
    assert {n.rsplit(".", 3)[1] for n in model.trainable_tensors()} == {"bottleneck"}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(t, frozen[name]) for name, t in model.base.state_dict().items())
    release = model.save("me/b", version="0.2.0")
    assert [(p.name, p.version, p.relation) for p in release.manifest.parents] == [
        ("me/b", "0.1.0", "continue"), ("me/a", "0.1.0", "on"),
    ]  # fmt: skip
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert torch.allclose(load("me/a + me/b@0.2.0")(input_ids=ids).logits, want, atol=1e-5)
        assert not torch.allclose(load("me/a + me/b@0.1.0")(input_ids=ids).logits, want, atol=1e-3)
    with pytest.raises(UsageError, match="not trainable"):
        model.save("me/a")


def test_rows_while_training(load, ids):
    """Each row its own also while one of them trains: gradients come from its rows only."""
    model = load("me/a + me/b", trainable=["me/b"])
    model(input_ids=ids, adapters=["me/a", None, "me/a"], labels=ids)
    loss = model(input_ids=ids, adapters=["me/b", None, "me/a"], labels=ids).loss
    loss.backward()
    one = load("me/b", trainable=["me/b"])
    logits = one(input_ids=ids[:1]).logits
    share = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / (3 * 8)
    share.backward()
    for name, parameter in one.trainable_tensors().items():
        assert torch.allclose(parameter.grad, model.trainable_tensors()[name].grad, atol=1e-6)


def test_reading_a_weight_without_calling_its_module_is_noticed(hub, tiny_folder, ids):
    own = AutoModelForCausalLM.from_pretrained(tiny_folder)
    layer = own.model.layers[0].mlp
    layer.forward = lambda x: x @ layer.gate_proj.weight.T @ layer.down_proj.weight.T
    with pytest.raises(BatchError, match=r"model.layers.0.mlp.down_proj"):
        hub.load(own, "me/a")(input_ids=ids)


def test_use_again(hub, load, ids):
    model = load("me/a + me/b@0.1.0", trainable=["me/b@0.1.0"])
    first = model.trainable_parameters()
    model.use("me/b@0.1.0", trainable=["me/b@0.1.0"])
    assert all(a is b for a, b in zip(first, model.trainable_parameters(), strict=True))
    with pytest.raises(NotFound):
        model.use("me/nothing")
    assert model.trainable_parameters()  # refused, it changed nothing
    model.use("me/a")
    assert not model.trainable_parameters()
    assert torch.equal(model(input_ids=ids).logits, load("me/a")(input_ids=ids).logits)


def test_an_adapter_trained_over_another_says_so_when_alone(hub, load):
    model = load("me/a + 0.5*me/c", trainable=["me/c"])
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.01
    release = model.save("me/c", version="0.9.0")
    assert release.manifest.recipe == {"trained_in": "me/a@0.1.0 + 0.5*me/c@0.1.0", "beneath": None}
    with pytest.warns(ParentsWarning, match=r"me/c@0\.9\.0 was trained over me/a@0\.1\.0"):
        load("me/c@0.9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("me/a + me/c@0.9.0")


def test_texts_without_a_pad_token(hub, tiny_folder):
    model = hub.load(str(tiny_folder), device="cpu")
    want = model.complete(["Hello", "a"], max_new_tokens=5)
    model.tokenizer.pad_token = None
    assert model.complete(["Hello", "a"], max_new_tokens=5) == want
    with pytest.raises(UsageError, match="empty text"):
        model.complete([""])


@pytest.mark.parametrize(
    "adapters", [5, {"me/a", "me/c"}, {"me/a": 1}, ["me/a", 5, None], (row for row in ["me/a"] * 3)]
)
def test_adapters_of_no_known_kind(load, ids, adapters):
    with pytest.raises(UsageError, match="adapters is"):
        load()(input_ids=ids, adapters=adapters)


def test_texts_of_no_known_kind(load):
    for texts in ("hello", []):
        with pytest.raises(UsageError, match="texts is"):
            load().complete(texts)


def test_overflow_is_told(load):
    with pytest.raises(UnsafeFile, match="overflows"):
        load("1e39*me/a")
    with pytest.raises(UnsafeFile, match="overflows"):
        load("1e6*(1e35*me/a)")


@pytest.mark.slow
def test_compositions_of_compositions_have_bounds(hub):
    hub.compose("me/a + me/a", name="me/x0")
    with pytest.raises(HubError, match="more than 10000 adapters"):
        for i in range(25):
            hub.compose(f"me/x{i} + me/x{i}", name=f"me/x{i + 1}")
    hub.compose("1*me/a", name="me/y0")
    with pytest.raises(HubError, match="100 deep"):
        for i in range(120):
            hub.compose(f"2*me/y{i}", name=f"me/y{i + 1}")


def test_adapters_of_one_weight_used_in_two_ways_do_not_compose(hub):
    release = hub.resolve("me/a")
    base = msgspec.structs.replace(
        release.manifest.base, computes={**release.manifest.base.computes, "rms_norm_eps": 0.5}
    )
    twin = msgspec.structs.replace(release.manifest, name="me/twin", base=base)
    hub.publish(twin, {"tensors": hub.store.read(release.manifest.files["tensors"])})
    with pytest.raises(IncompatibleBase, match="rms_norm_eps"):
        hub.compose("me/a + me/twin", name="me/none")


def test_no_batch_is_told(load):
    for given in ({}, {"input_ids": torch.tensor([3, 4])}):
        with pytest.raises(BatchError, match="no batch"):
            load("me/a")(**given)
