"""A plan belongs to its call: threads, copies, pickles, other software's hooks; and batches that a model sees in its own way."""

import copy
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from threading import Barrier

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, OPTConfig, OPTForCausalLM

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import BatchError, UnsafeFile
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.low_rank import LowRank
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.model import Model
from adapterhub.sites import select, sites
from adapterhub.testing.families import tiny

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def put(hub, base, name, form, target, seed=0, **more):
    """A release of random parts of a form at the sites of a target."""
    torch.manual_seed(seed)
    made = {site.path: plugins.load("forms", form).random(site) for site in select(sites(base), target)}
    parts = {path: [part] for path, part in made.items() if part is not None}
    assert parts
    known = fingerprint(base)
    return publish_tensors(hub, parts, name=name, base=known.base, sketch=known.sketch, **more)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_eight_threads_and_two_models_on_one_base(hub):
    """200 calls of batches of unlike rows, gradients on in a quarter of them: each row gives what it gives alone."""
    base = tiny("llama").double()
    kinds = [
        ("low_rank", "q_proj"), ("dora", "v_proj"), ("dense", "down_proj"), ("sparse", "up_proj"), ("affine", "k_proj"),
        ("bottleneck", "ffn"), ("prefix", "attention"), ("dense", "embedding"),
    ]  # fmt: skip
    for number, (form, target) in enumerate(kinds):
        put(hub, base, f"t/{number}", form, target, seed=number)
    models = [hub.load(base, "t/2 + t/7"), hub.load(base, "0.5*t/0")]
    expressions = [f"t/{n}" for n in range(8)] + ["mix(t/4 + t/0, 0.5*t/2)", None, "logits(base + t/0 - 0.3*t/5)"]
    with torch.no_grad():
        alone = {one: models[0](IDS, adapters=[one]).logits[0] for one in expressions}
        defaults = [model(IDS).logits[0] for model in models]
    start = Barrier(8)

    def calls(thread: int) -> float:
        draw, worst = random.Random(thread), 0.0
        start.wait()
        for _ in range(25):
            rows, model = draw.choices(expressions, k=draw.randrange(1, 4)), draw.randrange(2)
            with torch.set_grad_enabled(draw.random() < 0.25):
                got = models[model](IDS.repeat(len(rows), 1), adapters=rows).logits.detach()
                mine = models[model](IDS).logits[0].detach()
            worst = max(
                worst, apart(mine, defaults[model]), *(apart(g, alone[r]) for g, r in zip(got, rows, strict=True))
            )
        return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(calls, range(8))) < 1e-9


def test_a_call_in_one_thread_is_none_in_another(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "q_proj")
    model = hub.load(base)
    bare = base(IDS).logits
    with model.running("t/a"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: base(IDS).logits).result(), bare)
        assert not torch.equal(base(IDS).logits, bare)
    assert torch.equal(base(IDS).logits, bare)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread_runs_a_checkpoint_under_its_own_pass(hub, reentrant):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "q_proj")
    put(hub, base, "t/b", "dense", "down_proj")
    model = hub.load(base, "t/a + t/b", trainable=["t/a", "t/b"])

    def gradients() -> list[torch.Tensor]:
        for parameter in model.trainable_parameters():
            parameter.grad = None
        with torch.enable_grad():
            loss = model(IDS, use_cache=False).logits.square().mean()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        return [parameter.grad for parameter in model.trainable_parameters()]

    plain = gradients()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    base.train()
    for got, want in zip(gradients(), plain, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-8)


def test_a_deep_copy_runs_adapters_of_its_own_and_assists(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "all-linear")
    put(hub, base, "t/p", "prefix", "attention")
    model = hub.load(base, "t/a + t/p")
    with torch.no_grad():
        want, bare = model(IDS).logits, base(IDS).logits
        twin = copy.deepcopy(base)
        assert torch.equal(twin(IDS).logits, bare)
        with model.running():  # inside of a call of the original the copy is itself
            assert torch.equal(twin(IDS).logits, bare)
        assert torch.equal(hub.load(twin, "t/a + t/p")(IDS).logits, want)
        twin.get_submodule("model.layers.0.self_attn.q_proj").weight.zero_()
        assert torch.equal(model(IDS).logits, want)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, assistant_model=copy.deepcopy(base), **options), alone)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_early_exit_drafts_and_the_whole_model_decides(hub, depth):
    base = tiny("llama", num_hidden_layers=3)
    put(hub, base, "t/a", "low_rank", "all-linear")
    model = hub.load(base, "t/a")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, assistant_early_exit=depth, **options), model.generate(IDS, **options))
    with torch.no_grad():
        model(IDS)


def test_a_base_pickles_with_adapters_on_it_and_without(hub):
    base = tiny("llama")
    for form, target in (("low_rank", "q_proj"), ("prefix", "attention")):
        put(hub, base, f"t/{form}", form, target)
    model = hub.load(base, "t/low_rank + t/prefix")
    with torch.no_grad():
        bare = base(IDS).logits
        model(IDS)
        assert torch.equal(pickle.loads(pickle.dumps(base))(IDS).logits, bare)
        base.activation_checkpointing_enable({"use_reentrant": False})
        with torch.enable_grad():
            model(IDS)
        base.disable_input_require_grads()  # transformers' own hook does not pickle
        plain = model.detach()
        assert torch.equal(pickle.loads(pickle.dumps(plain))(IDS).logits, bare)
        assert torch.equal(copy.deepcopy(plain)(IDS).logits, bare)
    left = [key for module in plain.modules() for key in module.__dict__ if "adapterhub" in key or key == "forward"]
    hooks = [hook for module in plain.modules() for hook in module._forward_pre_hooks.values()]
    assert not left and not any("adapterhub" in hook.__module__ for hook in hooks)


def test_what_other_software_hangs_on_a_module_sees_what_adapters_made_of_it(hub):
    """The states that transformers records, whether its hooks were placed before ours or after."""
    got = []
    for first in (False, True):
        base = tiny("llama")
        put(hub, base, "t/a", "bottleneck", "block")
        with torch.no_grad():
            if first:
                base(IDS, output_hidden_states=True)
            got.append(hub.load(base)(IDS, adapters="t/a", output_hidden_states=True).hidden_states)
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)
    final = hub.load(tiny("llama"))
    with torch.no_grad():
        assert not torch.equal(got[0][1], final(IDS, output_hidden_states=True).hidden_states[1])


def test_a_forward_that_a_module_had_before_stays(hub):
    """As accelerate puts one on the modules of a base that is spread over devices."""
    base, seen = tiny("llama"), []
    layer = base.model.layers[0].self_attn.q_proj
    before = layer.forward

    def forward(x):
        seen.append(x.shape)
        return before(x)

    layer.forward = forward
    put(hub, base, "t/a", "dense", "q_proj")
    model = hub.load(base, "t/a")
    with torch.no_grad():
        want = hub.load(tiny("llama"), "t/a")(IDS).logits
        assert torch.equal(model(IDS).logits, want)
    assert apart(model(IDS).logits.detach(), want) < 1e-5 and len(seen) == 2
    model.detach()
    assert layer.forward is forward


def test_rows_of_a_model_whose_layers_see_all_tokens_in_one_sequence(hub):
    """OPT flattens its feed-forward's rows."""
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    base = OPTForCausalLM(config).double().eval()
    for n, form in enumerate(("low_rank", "bottleneck", "dense")):
        put(hub, base, f"t/{n}", form, ["fc1", "fc2"], seed=n)
    model, ids = hub.load(base), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [3, 9, 4, 7], [5, 5, 6, 8]])
    rows = ["t/0", "t/1 + t/0", None, "0.5*t/2"]
    mask = torch.tensor([[1] * 4, [0, 0, 1, 1], [1] * 4, [1] * 4])
    with torch.no_grad():
        got = model(ids, attention_mask=mask, adapters=rows).logits
        for row, one in enumerate(rows):
            real = ids[row][mask[row].bool()][None]
            assert apart(got[row][mask[row].bool()], model(real, adapters=one).logits[0]) < 1e-9
        out = model(ids[:, :3], adapters=rows, use_cache=True)
        last = model(ids[:, 3:], past_key_values=out.past_key_values, adapters=rows).logits
        assert apart(last[0, 0], got[0, 3]) < 1e-9


def test_padding_that_a_window_counts_is_refused(hub):
    base = tiny("mistral")
    put(hub, base, "t/a", "low_rank", "query")
    model, ids = hub.load(base), torch.arange(3, 13)[None]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        with pytest.raises(BatchError, match="window"):
            model(ids, attention_mask=mask, adapters="t/a")
        for side in (mask.sort(dim=1).values, mask.sort(dim=1, descending=True).values):
            got = model(ids, attention_mask=side, adapters="t/a").logits[side.bool()]
            assert apart(got, model(ids[side.bool()][None], adapters="t/a").logits[0]) < 1e-5


def test_a_decoder_beside_an_encoder_counts_no_padding(hub):
    base = tiny("whisper")
    put(hub, base, "t/a", "low_rank", "decoder.query")
    model, sound, ids = hub.load(base), torch.randn(1, 8, 24), torch.tensor([[1, 5, 6, 7]])
    padded, mask = torch.tensor([[0, 0, 1, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        want = model(input_features=sound, decoder_input_ids=ids, adapters="t/a").logits
        got = model(input_features=sound, decoder_input_ids=padded, decoder_attention_mask=mask, adapters="t/a").logits
        assert apart(got[0, 2:], want[0]) < 1e-5
    base = tiny("t5")
    put(hub, base, "t/b", "low_rank", "decoder.query")
    model = hub.load(base, "t/b")
    given = {"input_ids": IDS}
    with torch.no_grad():
        want = model(**given, decoder_input_ids=ids).logits
        got = model(**given, decoder_input_ids=padded, decoder_attention_mask=mask).logits
        assert apart(got[0, 2:], want[0]) < 1e-5
        with pytest.raises(BatchError, match="padding stands before"):
            model(**given, decoder_input_ids=padded, decoder_attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))


def test_an_encoder_decoder_whose_positions_count_padding_refuses_it(hub):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    base = BartForConditionalGeneration(config).eval()
    put(hub, base, "t/a", "low_rank", "q_proj")
    model, ids = hub.load(base, "t/a"), torch.tensor([[1, 5, 6, 7]])
    left, right = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        want = model(input_ids=IDS[:, :3], decoder_input_ids=ids).logits
        assert apart(model(input_ids=IDS, attention_mask=right, decoder_input_ids=ids).logits, want) < 1e-5
        with pytest.raises(BatchError, match="padding stands before"):
            model(input_ids=IDS, attention_mask=left, decoder_input_ids=ids)
        with pytest.raises(BatchError, match="padding stands before"):
            model(input_ids=IDS, decoder_input_ids=ids, decoder_attention_mask=torch.tensor([[0, 1, 1, 1]]))


def test_inputs_embeds_in_place_of_an_embedding_where_an_adapter_acts(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "embedding")
    put(hub, base, "t/b", "low_rank", "q_proj")
    model = hub.load(base)
    embeds = base.model.embed_tokens.weight[IDS]
    with torch.no_grad():
        with pytest.raises(BatchError, match="inputs_embeds take the place"):
            model(inputs_embeds=embeds, adapters="t/a + t/b")
        assert apart(model(inputs_embeds=embeds, adapters="t/b").logits, model(IDS, adapters="t/b").logits) < 1e-6


def test_a_model_that_takes_positions_from_its_tokens_needs_its_own_padding(hub):
    """RoBERTa counts the tokens that are not its pad token, whatever the mask says."""
    base = tiny("roberta")
    put(hub, base, "t/a", "low_rank", "query")
    model, pad = hub.load(base, "t/a"), base.config.pad_token_id
    left = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        want = model(IDS[:, 2:]).logits
        assert apart(model(IDS.masked_fill(left == 0, pad), attention_mask=left).logits[:, 2:], want) < 1e-5
        with pytest.raises(BatchError, match="padding stands before"):
            model(IDS, attention_mask=left)


@pytest.mark.parametrize("weight", ["1e30", "-1e25", "1e300"])
@pytest.mark.parametrize("form", ["low_rank", "affine", "bottleneck", "dense", "prefix"])
@pytest.mark.parametrize("grad", [False, True])
def test_what_leaves_the_range_is_refused_at_the_first_call(hub, weight, form, grad):
    base = tiny("llama")
    put(hub, base, "t/a", form, {"bottleneck": "block", "prefix": "attention"}.get(form, "q_proj"))
    model = hub.load(base)
    with torch.set_grad_enabled(grad), pytest.raises(UnsafeFile, match="too large"):
        model(IDS, adapters=f"{weight}*t/a")
    with torch.set_grad_enabled(grad):
        assert model(IDS, adapters="1e3*t/a").logits.isfinite().all()
        with pytest.raises(UnsafeFile, match="out of range"):
            model(IDS, adapters="logits(1e38*base + 1e38*t/a + 1e38*t/a + 1e38*t/a)")


def test_an_attachment_lives_as_long_as_somebody_holds_it():
    base = tiny("llama")
    one, two = Model(base), Model(base)
    assert Attachment.of(base) is one._attachment is two._attachment
    one.detach()
    two.attach_new({"model.layers.0.self_attn.q_proj": LowRank.random(one.sites[3])})
    assert Attachment.of(base) is two._attachment
    two.fold()
    assert Attachment.of(base) is not two._attachment


def test_a_shift_and_a_dense_change_at_an_embedding_with_gradients_and_without(hub):
    base = tiny("gemma").double()
    torch.manual_seed(0)
    path = next(site.path for site in sites(base) if site.role == "embedding")
    known = fingerprint(base)
    width, words = base.config.hidden_size, base.config.vocab_size
    for name, part in {
        "t/shift": Affine.of(shift=0.3 * torch.randn(width)),
        "t/dense": Dense(weight=0.05 * torch.randn(width, words)),
    }.items():
        publish_tensors(hub, {path: [part]}, name=name, base=known.base, sketch=known.sketch)
    model = hub.load(base)
    with torch.no_grad():
        want = model(IDS, adapters="t/shift + t/dense").logits
    assert apart(model(IDS, adapters="t/shift + t/dense").logits.detach(), want) < 1e-12
    model.use("t/shift + t/dense", trainable=["t/shift"])
    model(IDS).logits.square().mean().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in model.trainable_parameters())


def test_a_compiled_base_is_one_graph_with_adapters_on_it(hub):
    base = tiny("llama")
    for n in range(2):
        put(hub, base, f"t/{n}", "low_rank", "all-linear", seed=n)
    model, ids = hub.load(base), IDS.repeat(2, 1)
    for rows in ([None, None], ["t/0", "t/1"], ["t/0", "t/0"]):
        torch._dynamo.reset()
        with torch.no_grad(), model.running(rows):
            want = base(input_ids=ids, use_cache=False).logits
            assert torch._dynamo.explain(base)(input_ids=ids, use_cache=False).graph_break_count == 0
            compiled = torch.compile(base, backend="eager")
            assert apart(compiled(input_ids=ids, use_cache=False).logits, want) < 1e-6
    torch._dynamo.reset()


def test_forwards_that_others_put_on_a_module_come_and_go_in_any_order(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "q_proj")
    model, layer = hub.load(base, "t/a"), base.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        want, calls = model(IDS).logits, []

        def around(before):
            def forward(x):
                calls.append(1)
                return before(x)

            return forward

        layer.forward = around(layer.forward)  # after ours
        assert torch.equal(model(IDS).logits, want) and calls == [1]
        model.detach()
        bare = base(IDS).logits
        again = hub.load(base, "t/a")
        assert torch.equal(again(IDS).logits, want) and torch.equal(base(IDS).logits, bare) and len(calls) == 4
        del layer.forward  # theirs and ours
        assert torch.equal(again(IDS).logits, want)


@pytest.mark.parametrize("way", ["input", "encoder", "exit", "fold"])
def test_what_leaves_the_range_where_no_output_of_the_whole_model_shows_it(hub, way):
    base = tiny("t5" if way == "encoder" else "llama")
    if way == "input":
        path, known = "model.layers.0.input_layernorm", fingerprint(base)
        part = Affine.of(gain=torch.ones(base.config.hidden_size), into=True)
        publish_tensors(hub, {path: [part]}, name="t/a", base=known.base, sketch=known.sketch)
    else:
        put(hub, base, "t/a", "low_rank", {"encoder": "encoder.query", "fold": "q_proj"}.get(way, "o_proj"))
    model = hub.load(base)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "adapters": ["1e30*t/a"]}
    with torch.no_grad(), pytest.raises(UnsafeFile, match="too large"):
        if way == "input":
            model(IDS, adapters="1e30*t/a")
        elif way == "fold":
            model.use("1e30*t/a")
            model.fold()
        else:
            model.generate(IDS, **options, **({"assistant_early_exit": 1} if way == "exit" else {}))


def test_inputs_embeds_of_a_later_chunk_need_no_embedding_with_an_adapter_either(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "embedding")
    model = hub.load(base, "t/a")
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(BatchError, match="inputs_embeds take the place"):
            model(inputs_embeds=base.model.embed_tokens.weight[IDS[:, :1]], past_key_values=cache)


def test_adapters_that_were_first_met_in_inference_mode_train_later(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "q_proj")
    put(hub, base, "t/b", "low_rank", "v_proj")
    model = hub.load(base)
    with torch.inference_mode():
        model(IDS, adapters="t/a + t/b")
    model.use("t/a + t/b", trainable=["t/b"])
    model(IDS).logits.square().mean().backward()
    assert all(tensor.grad is not None for tensor in model.trainable_parameters())


def test_arguments_by_place_are_arguments_by_name(hub):
    base = tiny("llama")
    put(hub, base, "t/a", "low_rank", "q_proj")
    model, mask, positions = hub.load(base, "t/a"), torch.ones_like(IDS), torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(model(IDS, mask, positions).logits, model(IDS).logits)


def test_an_encoder_that_failed_by_itself_does_not_swallow_the_next_call(hub):
    base = tiny("t5")
    put(hub, base, "t/a", "low_rank", "query")
    model = hub.load(base, "t/a")
    with torch.no_grad(), model.running():
        with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)):
            base.get_encoder()(input_ids=IDS + 10_000)
        got = base(input_ids=IDS, decoder_input_ids=IDS[:, :2]).logits
    with torch.no_grad():
        assert torch.equal(got, model(input_ids=IDS, decoder_input_ids=IDS[:, :2]).logits)


def test_a_pickled_base_with_a_prefix_is_read_in_a_process_of_its_own(hub, tmp_path):
    base = tiny("llama")
    put(hub, base, "t/p", "prefix", "attention")
    model = hub.load(base, "t/p")
    with torch.no_grad():
        model(IDS)
        want = base(IDS).logits
    torch.save(base, tmp_path / "base.pt")
    code = "import sys, torch; torch.set_grad_enabled(False); torch.set_num_threads(1); "
    code += "base = torch.load(sys.argv[1], weights_only=False); torch.save(base(torch.tensor([[3, 4, 5, 6, 7]])).logits, sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "base.pt", tmp_path / "logits.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)


def test_plans_of_ensembles_are_counted_too(hub):
    base = tiny("llama")
    for n in range(4):
        put(hub, base, f"t/{n}", "low_rank", "all-linear", seed=n)
    model = hub.load(base)
    with torch.no_grad():
        for order in permutations(range(4)):
            model(IDS, adapters="logits(" + " + ".join(f"t/{n}" for n in order) + ")")
    assert sum(size > 0 for _, size in model._plans._plans.values()) == 1


def test_windows_that_no_layer_has_count_nothing(hub):
    config = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 8}
    base = tiny("qwen2", **config)
    put(hub, base, "t/a", "low_rank", "q_proj")
    model, ids = hub.load(base, "t/a"), torch.arange(3, 11)[None]
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits[mask.bool()]
        assert apart(got, model(ids[mask.bool()][None]).logits[0]) < 1e-5
