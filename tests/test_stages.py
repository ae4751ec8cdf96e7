"""Stages: each with its own trainable set, objective, optimiser and schedule; finished ones are kept, and shared."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import PluginError, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.method import Measurement, Method, Stage
from adapterhub.methods.lora import LoRA
from adapterhub.runtime.model import Model
from adapterhub.sites import select
from adapterhub.training.stages import attach, given, planned
from adapterhub.training.trainer import Schedule, _Watch

ROWS = [(f"Is {i} even? ", "no" if i % 2 else "yes") for i in range(16)]
SETTINGS = {"steps": 12, "lr": 1e-2, "batch_size": 16, "warmup": 0}


class Lean(Method):
    """First gains under an L1 norm, then low rank at the site whose gain grew most."""

    @dataclass(frozen=True)
    class Config:
        l1: float = 0.0
        sites: int = 1
        share: float = 0.5

    def stages(self, config):
        def gains(given):
            return {
                site.path: Affine.of(gain=torch.zeros(site.outputs))
                for site in select(given.sites, ("ffn_down", "query"))
            }

        def low_rank(given):
            before = given.before
            chosen = sorted(before, key=lambda path: -float(before[path].tensors.get("gain", torch.ones(1)).norm()))
            return {
                site.path: LoRA().fresh(site, LoRA.Config(r=2))
                for site in given.sites
                if site.path in chosen[: config.sites]
            }

        def norm(parts: Mapping[str, Affine]):
            return config.l1 * sum(part.gain.abs().sum() for part in parts.values())

        options = ("l1",)
        return [
            Stage("gains", gains, config.share, lr=0.5, penalty=norm if config.l1 else None, options=options),
            Stage("factors", low_rank, 1 - config.share, note=lambda parts: {"sites": sorted(parts)}),
        ]


class Narrow(LoRA):
    float32_base = True


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in ROWS))
    return file


@pytest.fixture(autouse=True)
def provide(monkeypatch):
    """provide(name, method): as if a package had brought it. The methods `lean` and `narrow` are there."""
    points = dict(plugins.discovery.points("methods"))

    def provide(name, made):
        dist = SimpleNamespace(name="lean", version="1")
        points[name] = SimpleNamespace(name=name, value=name, dist=dist, load=lambda: made)

    provide("lean", Lean)
    provide("narrow", Narrow)
    plugins.load.cache_clear()
    monkeypatch.setattr(
        plugins.discovery,
        "points",
        lambda group, real=plugins.discovery.points: points if group == "methods" else real(group),
    )
    yield provide
    plugins.load.cache_clear()


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def train(hub, tiny_folder, path):
    def train(name="me/a", method="lean", **settings):
        return hub.train(str(tiny_folder), method, path, name, **{**SETTINGS, **settings})

    return train


@pytest.fixture
def steps(monkeypatch):
    """The steps that are trained, by stage: [("gains", 1), ...]."""
    done = []

    def on_step_end(self, args, state, control, **kwargs):
        done.append((args.output_dir.rpartition("/")[2], state.global_step))

    monkeypatch.setattr(_Watch, "on_step_end", on_step_end)
    return done


def log_of(hub, release):
    return json.loads(hub.store.read(release.manifest.files["log"]))


def kept(hub):
    return sorted(file.name for file in (hub.root / "training" / "stages").iterdir())


def test_each_stage_trains_its_own_with_its_own_schedule(hub, train):
    release = train(options={"share": 0.25})
    log, recipe = log_of(hub, release), release.manifest.recipe
    assert [(entry["stage"], entry["step"]) for entry in log] == [
        *(("gains", i) for i in (1, 2, 3)),
        *(("factors", i) for i in range(1, 10)),
    ]
    rates = [entry["learning_rate"] for entry in log]
    assert rates == pytest.approx([5e-3 * (3 - i) / 3 for i in range(3)] + [1e-2 * (9 - i) / 9 for i in range(9)])
    assert recipe["stages"] == [
        {"name": "gains", "steps": 3, "lr": 5e-3, "warmup": 0},
        {"name": "factors", "steps": 9, "lr": 1e-2, "warmup": 0},
    ]
    (chosen,) = recipe["found"]["factors"]["sites"]
    assert release.manifest.forms == {chosen: ["low_rank"]}, "the first stage's modifications are no part of it"
    # Rewound: the second stage starts from the base again, where the whole file's loss is the first stage's first.
    assert log[3]["loss"] == pytest.approx(log[0]["loss"], abs=1e-6)
    assert release.manifest.metrics["train_loss"] == log[-1]["loss"]


def test_the_penalty_is_part_of_the_objective(hub, train, path, tiny_folder):
    """One stage by hand: the same loss plus l1 times the sum of the magnitudes, AdamW in a plain loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapterhub.data import read
    from adapterhub.data.batches import collate
    from adapterhub.data.encoding import encode

    release = train(options={"l1": 1e-2})
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    names = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "down_proj"))]
    gains = {name: torch.zeros(base.get_submodule(name).out_features, requires_grad=True) for name in names}
    for name in names:
        base.get_submodule(name).register_forward_hook(lambda module, x, y, name=name: y + y * gains[name])
    batch = collate(encode(read(path), AutoTokenizer.from_pretrained(tiny_folder), 1024)[0], 0)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    optimizer = torch.optim.AdamW(gains.values(), lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 5e-3 * (6 - step) / 6
        optimizer.zero_grad()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        loss = torch.nn.functional.cross_entropy(logits[:, -labels.shape[1] - 1 : -1].flatten(0, 1), labels.flatten())
        loss = loss + 1e-2 * sum(gain.abs().sum() for gain in gains.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gains.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [entry["loss"] for entry in log_of(hub, release)[:6]] == pytest.approx(losses, rel=1e-4)
    largest = max(gains, key=lambda name: float(gains[name].detach().norm()))
    assert release.manifest.recipe["found"]["factors"]["sites"] == [largest]


def test_a_finished_stage_is_shared_by_runs_that_share_what_decides_it(hub, train, steps):
    first = train()
    assert [name for name, _ in steps] == ["gains"] * 6 + ["factors"] * 6
    (tensors, mark) = reversed(kept(hub))
    steps.clear()
    other = train("me/b", options={"sites": 2})
    assert [name for name, _ in steps] == ["factors"] * 6
    assert kept(hub) == [mark, tensors]
    assert other.manifest.recipe["found"]["gains"] == first.manifest.recipe["found"]["gains"]
    assert log_of(hub, other)[:6] == log_of(hub, first)[:6]
    # Alone, in another hub, it comes out the same.
    assert len(other.manifest.forms) == 2
    for changed in (
        {"options": {"l1": 1e-3}},
        {"seed": 1},
        {"lr": 2e-2},
        {"batch_size": 4},
        {"options": {"share": 0.25}},
    ):
        steps.clear()
        train("me/c", **changed)
        assert steps[0] == ("gains", 1), changed
    assert not [f for f in (hub.root / "training").iterdir() if f.name != "stages"]
    steps.clear()
    assert train().digest == first.digest and not steps, "it is published already"
    train("me/d", resume=False)
    assert steps[0] == ("gains", 1)


def test_what_was_shared_is_what_it_would_have_come_to_alone(hub, train, tiny_folder, path, tmp_path):
    train()
    shared = train("me/b", options={"sites": 2})
    other = adapterhub.open(tmp_path / "other", create=True)
    alone = other.train(str(tiny_folder), "lean", path, "me/b", **SETTINGS, options={"sites": 2})
    assert alone.digest == shared.digest


@pytest.mark.parametrize("harm", ["cut", "no mark", "bit", "no tensors"])
def test_a_broken_kept_stage_is_none(hub, train, steps, harm):
    first = train()
    tensors, mark = (hub.root / "training" / "stages" / name for name in reversed(kept(hub)))
    if harm == "no mark":
        mark.unlink()
    elif harm == "no tensors":
        tensors.unlink()
    else:
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data if harm == "bit" else data[:100])
    steps.clear()
    assert train("me/b").manifest.files == first.manifest.files
    assert steps[0] == ("gains", 1)


def test_an_adapter_goes_on_with_the_last_stage(hub, train, steps, tiny_folder, path):
    first = train()
    steps.clear()
    second = hub.train(str(tiny_folder), data=path, continue_from="me/a", **SETTINGS)
    assert {name for name, _ in steps} == {"factors"} and len(steps) == 12
    assert second.manifest.forms == first.manifest.forms and "stages" not in second.manifest.recipe
    before, after = log_of(hub, first), log_of(hub, second)
    assert after[0]["loss"] < before[0]["loss"] - 0.1
    assert Adapter.load(hub, second).tensors.keys() == Adapter.load(hub, first).tensors.keys()


def test_too_few_steps_are_refused_before_anything_is_trained(hub, train, steps):
    with pytest.raises(UsageError, match="none is left for the stage 'gains'") as caught:
        train(steps=3, options={"share": 0.1})
    assert caught.value.hint and not steps and not (hub.root / "training").exists()


def test_a_method_that_float32_base_gets_it_or_is_refused(hub, train, tiny_folder, path):
    assert train(method="narrow").manifest.recipe["dtype"] == "float32"
    with pytest.raises(UsageError, match="bfloat16 would round") as caught:
        train("me/b", method="narrow", dtype="bfloat16")
    assert "--dtype float32" in caught.value.hint
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16)
    with pytest.raises(UsageError, match="float16 would round"):
        hub.train(loaded, "narrow", path, "me/b", **SETTINGS)


def test_a_key_hangs_on_the_stages_before():
    def keys(first):
        stages = [Stage("one", None, options={"a": first}), Stage("two", None, options={})]
        return [p.key for p in planned(stages, Schedule(10, 4, 1e-2, 1, 0, False), None, {}, {})]

    assert keys(1) == keys(1) and not set(keys(1)) & set(keys(2))


@dataclass(frozen=True)
class Options:
    gain: float = 0.0
    other: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "both", self.gain + self.other)

    @property
    def twice(self):
        return 2 * self.other


def reading(read, early=None):
    """A method whose first stage names one of its two options, and whose `build` reads its config in this way."""

    class Reading(Lean):
        Config = Options

        def stages(self, config):
            self.config, shared = config, early and early(config)

            def first(given):
                start = float(read(self.config) if early is None else shared)
                return {
                    site.path: Affine.of(gain=torch.full((site.outputs,), start))
                    for site in select(given.sites, "ffn_down")
                }

            def last(given):
                assert self.config.other is not None  # it may
                return {site.path: LoRA().fresh(site, LoRA.Config(r=2)) for site in select(given.sites, "query")}

            return [Stage("first", first, options=("gain",)), Stage("last", last)]

    return Reading


@pytest.mark.parametrize(
    "read",
    [
        lambda config: config.other,
        lambda config: config.twice,
        lambda config: config.both,
        lambda config: asdict(config)["other"],
        lambda config: vars(config)["other"],
        lambda config: replace(config, gain=1.0).other,
        lambda config: copy.copy(config).other,
        lambda config: config == Options(),
        lambda config: getattr(config, "other"),  # noqa: B009
    ],
    ids=["read", "property", "derived", "asdict", "vars", "replace", "copy", "equal", "getattr"],
)
def test_a_stage_reads_no_option_that_it_does_not_name(train, provide, steps, read):
    """It would be kept for runs that differ in it."""
    provide("reading", reading(read))
    with pytest.raises(PluginError, match="Reading, stage 'first': the option 'other' is read") as caught:
        train(method="reading")
    assert "author" in caught.value.hint and not steps


def test_what_stages_itself_reads_decides_every_stage(train, provide, steps):
    """What it hands on, nobody sees: another value trains the stage again."""
    provide("reading", reading(None, early=lambda config: config.other))
    first = train(method="reading")
    for options, trains in (({"gain": 1.0}, True), ({"other": 0.5}, True), ({"other": 0.5, "gain": 0.0}, False)):
        steps.clear()
        train("me/b", "reading", options=options, licence=str(len(options)))
        assert (("first", 1) in steps) is trains, options
    assert first.manifest.recipe["found"]["first"]["tensors"]


def test_an_option_that_a_modification_reads_later_is_seen_too(train, provide, steps):
    class Late(Affine):
        def _change(self, h):
            return super()._change(h) * self.config.other

    class Method(Lean):
        Config = Options

        def stages(self, config):
            def first(given):
                made = {site.path: Late.of(gain=torch.zeros(site.outputs)) for site in select(given.sites, "ffn_down")}
                for part in made.values():
                    part.config = config
                return made

            return [Stage("first", first, options=("gain",)), Stage("last", first)]

    provide("late", Method)
    with pytest.raises(PluginError, match="Method, stage 'first': the option 'other' is read"):
        train(method="late")
    assert not steps


def test_a_stage_that_names_what_is_no_option_is_refused(train, provide):
    class Typo(Lean):
        def stages(self, config):
            return [replace(stage, options=("l2",)) for stage in super().stages(config)]

    provide("typo", Typo)
    with pytest.raises(PluginError, match="Typo, stage 'gains' names the option 'l2'"):
        train(method="typo")


def test_a_measurement_reads_no_option_that_it_does_not_name(train, provide, steps):
    class Measured(Lean):
        def stages(self, config):
            measurement = Measurement("sum", lambda setting: {"x": torch.tensor(float(config.sites))}, options=("l1",))
            return [replace(stage, measurement=measurement) for stage in super().stages(config)[-1:]]

    provide("measured", Measured)
    with pytest.raises(PluginError, match="stage 'factors', measurement 'sum': the option 'sites' is read"):
        train(method="measured")
    assert not steps


def test_what_a_later_stage_cannot_do_is_refused_first(hub, train, provide, steps):
    class Checking(Lean):
        def stages(self, config):
            def check(given):
                if config.sites > len(given.sites):
                    raise UsageError("too many", "fewer")

            first, last = super().stages(config)
            return [first, replace(last, check=check)]

    provide("checking", Checking)
    with pytest.raises(UsageError, match="too many"):
        train(method="checking", options={"sites": 1000})
    assert not steps and not (hub.root / "training").exists()
    assert train(method="checking").version == "0.1.0"


def test_what_trains_lies_in_the_order_of_the_sites_however_it_was_built(tiny_model):
    """An optimiser counts parameters by their order, and a set has another one in each process."""
    model = Model(tiny_model().requires_grad_(False))

    def build(given):
        return {
            site.path: Affine.of(gain=torch.zeros(site.outputs)) for site in reversed(select(given.sites, "all-linear"))
        }

    attach(model, Stage("train", build), given(model, {}), seed=0)
    wanted = [site.path for site in model.sites if site.linear and site.role != "head"]
    assert [name.removesuffix(".affine.0.gain") for name in model.trainable_tensors()] == wanted


def test_steps_add_up():
    stages = [Stage(name, None, share) for name, share in (("a", 1.0), ("b", 0.5), ("c", 2.0))]
    for total in range(6, 60):
        plan = planned(stages, Schedule(total, 4, 1e-2, 1, 0, False), None, {}, {})
        assert sum(part.schedule.steps for part in plan) == total
        assert all(abs(p.schedule.steps - total * p.stage.share / 3.5) < 1 for p in plan)


def test_low_rank_is_the_form_that_is_stored(hub, train):
    train()
    parts = Adapter.load(hub, hub.resolve("me/a")).modifications()
    assert all(isinstance(part, LowRank) for [part] in parts.values())
