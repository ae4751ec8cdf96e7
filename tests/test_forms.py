"""Numbers of the forms made outside our code: the papers' formulas in NumPy, float64, written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapterhub import plugins
from adapterhub.adapter import check_fit, modifications_of
from adapterhub.errors import IncompatibleBase, IntegrityError, NotFoldable, PluginError, UsageError
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.methods.bottleneck import BottleneckAdapter
from adapterhub.methods.lora import LoRA
from adapterhub.modification import Step
from adapterhub.sites import Site

QUERY = Site("model.layers.1.self_attn.q_proj", "query", 6, 5, True)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_low_rank_is_scale_up_down_x():
    a, b, x = numbers(2, 6), numbers(5, 2, seed=1), numbers(1, 3, 6, seed=2)
    form = LowRank(down=torch.tensor(a), up=torch.tensor(b), scale=torch.tensor(0.5, dtype=torch.float64))
    want = np.stack([0.5 * (b @ (a @ token)) for token in x[0]])[None]
    got = form.delta_out(torch.tensor(x), torch.zeros(1, 3, 5), Step())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    np.testing.assert_allclose(form.delta_weight(torch.zeros(5, 6), None)[0].numpy(), 0.5 * b @ a, rtol=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda h: np.maximum(h, 0)),
        ("gelu", lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2),
        ("silu", lambda h: h / (1 + np.exp(-h))),
        ("tanh", np.tanh),
    ],
)
def test_bottleneck_is_houlsbys(parallel, activation, function):
    a, ab, b, bb = numbers(3, 6), numbers(3, seed=1), numbers(6, 3, seed=2), numbers(6, seed=3)
    x, y = numbers(1, 4, 6, seed=4), numbers(1, 4, 6, seed=5)
    form = Bottleneck(
        down=torch.tensor(a),
        down_bias=torch.tensor(ab),
        up=torch.tensor(b),
        up_bias=torch.tensor(bb),
        scale=torch.tensor(0.25, dtype=torch.float64),
        **Bottleneck.switches(parallel, activation),
    )
    h = x if parallel else y
    want = np.stack([0.25 * (b @ function(a @ token + ab) + bb) for token in h[0]])[None]
    got = form.delta_out(torch.tensor(x), torch.tensor(y), Step())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)
    with pytest.raises(NotFoldable):
        form.delta_weight(torch.zeros(6, 6), None)


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"r": 4, "lora_alpha": 16}, 4, 16 / 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 4, 16 / 2),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 9}}, 9, 16 / 9),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"q_proj": 3}}, 4, 3 / 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 9}}, 9, 16 / 3),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"k_proj": 9}}, 4, 16 / 4),
    ],
)
def test_lora_scales_as_its_papers_say(options, rank, scale):
    config = plugins.options(LoRA.Config, options)
    made = LoRA().build([QUERY], config)[QUERY.path]
    assert made.down.shape == (rank, 6) and made.up.shape == (5, rank)
    assert made.scale.item() == pytest.approx(scale, rel=1e-6)
    assert made.up.count_nonzero() == 0 and made.down.count_nonzero()


def test_options_from_the_command_line():
    config = plugins.options(
        LoRA.Config,
        {
            "r": "8",
            "lora_alpha": "32",
            "target_modules": "q_proj,v_proj",
            "use_rslora": "true",
            "rank_pattern": '{"a": 2}',
        },
    )
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 32.0, ("q_proj", "v_proj"))
    assert config.use_rslora is True and config.rank_pattern == {"a": 2}
    assert plugins.options(LoRA.Config, {"layers_to_transform": "3"}).layers_to_transform == (3,)
    assert plugins.options(LoRA.Config, {"target_modules": "q_proj"}).target_modules == "q_proj"


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (LoRA, {"rank": 8}, "unknown option 'rank'"),
        (LoRA, {"r": "eight"}, "wrong value"),
        (LoRA, {"r": 0}, "rank"),
        (LoRA, {"lora_dropout": 1.0}, "lora_dropout"),
        (LoRA, {"target_modules": "w_proj"}, "no site"),
        (BottleneckAdapter, {"activation": "sine"}, "unknown activation"),
        (BottleneckAdapter, {"r": 0}, "r >= 1"),
    ],
)
def test_wrong_options_are_named(method, options, words):
    block = Site("model.layers.1.mlp", "ffn", 6, 6, False)
    attention = Site("model.layers.1.self_attn", "attention", 6, 6, False)
    with pytest.raises(UsageError, match=words) as caught:
        method().build([QUERY, attention, block], plugins.options(method.Config, options))
    assert caught.value.hint


def test_lora_on_a_module_that_is_no_weight_is_refused():
    with pytest.raises(UsageError, match="linear"):
        LoRA().build(
            [Site("model.layers.0.mlp", "ffn", 6, 6, False)], plugins.options(LoRA.Config, {"target_modules": "ffn"})
        )


def test_half_a_pair_and_strangers_are_all_listed():
    with pytest.raises(IntegrityError) as caught:
        modifications_of(
            {
                "a.low_rank.0.down": torch.ones(2, 3),
                "a.low_rank.0.scale": torch.ones(()),
                "b.low_rank.0.magnitude": torch.ones(2),
            }
        )
    text = str(caught.value)
    assert "a.low_rank.0 has no 'up'" in text
    assert "b.low_rank.0.magnitude belongs to no low_rank" in text and "b.low_rank.0 has no 'down'" in text


def test_names_that_say_no_form_are_refused():
    with pytest.raises(IntegrityError, match="is not named"):
        modifications_of({"base_model.model.q_proj.lora_A.weight": torch.ones(2)})
    with pytest.raises(PluginError, match="no form named 'lowrank'"):
        modifications_of({"a.lowrank.0.down": torch.ones(2)})


def test_a_rank_over_the_width_warns_of_the_lossless_one():
    form = LowRank(down=torch.ones(9, 6), up=torch.ones(5, 9), scale=torch.ones(()))
    with pytest.warns(UserWarning, match="rank 5 holds the same"):
        form.check(QUERY)
    with pytest.raises(IncompatibleBase):
        form.check(replace(QUERY, inputs=7))


def test_dropout_only_while_training():
    config = plugins.options(LoRA.Config, {"lora_dropout": 0.5, "r": 4})
    form = LoRA().build([QUERY], config)[QUERY.path]
    form.tensors["up"] = torch.ones(5, 4)
    x = torch.ones(1, 8, 6)
    still = form.delta_out(x, None, Step())
    assert torch.equal(still, form.delta_out(x, None, Step()))
    assert not torch.equal(still, form.delta_out(x, None, Step(training=True)))


def test_a_form_that_is_not_installed_names_the_package_it_came_with():
    from adapterhub.manifest import Base, File, Made, Manifest

    file = File(digest="sha256:" + "0" * 64, size=1)
    manifest = Manifest(
        name="me/x",
        version="0.1.0",
        base=Base(name="b", architecture="llama", structure=file.digest, sketch=file),
        method=Made(name="warp", distribution="adapterhub-warp 1.2.0"),
        forms={"a": ["warp"]},
    )
    with pytest.raises(PluginError, match=r"me/x 0\.1\.0 needs the form 'warp'") as caught:
        modifications_of({"a.warp.0.k": torch.ones(2)}, manifest)
    assert "adapterhub-warp 1.2.0" in caught.value.hint


def test_the_stored_numbers_of_activations_never_change():
    from adapterhub.forms.bottleneck import ACTIVATIONS

    assert list(ACTIVATIONS)[:4] == ["relu", "gelu", "silu", "tanh"]


BOTTLENECK = {
    "down": torch.ones(2, 3), "down_bias": torch.ones(2), "up": torch.ones(3, 2), "up_bias": torch.ones(3),
    "scale": torch.ones(()), **Bottleneck.switches(False, "relu"),
}  # fmt: skip
LOW_RANK = {"down": torch.ones(2, 3), "up": torch.ones(3, 2), "scale": torch.ones(())}


@pytest.mark.parametrize(
    ("form", "tensors", "change"),
    [
        ("bottleneck", BOTTLENECK, {"activation": torch.tensor(200, dtype=torch.uint8)}),
        ("bottleneck", BOTTLENECK, {"activation": torch.ones(2, dtype=torch.uint8)}),
        ("bottleneck", BOTTLENECK, {"down": torch.ones(())}),
        ("low_rank", LOW_RANK, {"down": torch.ones(())}),
        ("low_rank", LOW_RANK, {"down": torch.ones(2, 3, dtype=torch.int64)}),
        ("low_rank", LOW_RANK, {"scale": torch.ones(2)}),
    ],
)
def test_tensors_that_make_no_form_are_the_files_fault(form, tensors, change):
    site = Site("a", "query", 3, 3, True)

    def read(tensors):
        check_fit(modifications_of({f"a.{form}.0.{key}": tensor for key, tensor in tensors.items()}), [site], "me/x")

    read(tensors)
    with pytest.raises((IntegrityError, IncompatibleBase)) as caught:
        read(tensors | change)
    assert "a" in str(caught.value) and caught.value.hint
