"""Objectives, recipes, parameter schedules, measurements and what a stage stores: parts that a test brings, in real trainings."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import adapterhub
from adapterhub import BuildContext, Measurement, Method, Objective, ParameterSchedule, Recipe, Stage, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.cli.app import execute
from adapterhub.errors import PluginError, UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.methods.lora import LoRA
from adapterhub.runtime.scoring import token_losses
from adapterhub.sites import select
from adapterhub.training.parts import LeftOut

ROWS = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(12)]
SCORED = [{"prompt": f"{i}: ", "completions": ["good", "bad", "odd"], "rewards": [1, -1, 0.5]} for i in range(4)]
SEEN = []
"""What the parts below were given."""


class Margin(Objective):
    """The worst completion is to be less probable than the best, and a number of its own is trained besides."""

    kinds = ("scored",)
    extras = ("background",)

    @dataclass(frozen=True)
    class Config:
        weight: float = 1.0

    def prepare(self, setting):
        super().prepare(setting)
        self.own = nn.Parameter(torch.zeros(()))

    def parameters(self):
        return {"own": self.own}

    def loss(self, batch, moment):
        SEEN.append((batch["group"].tolist(), batch["reward"].tolist(), moment.step))
        chances = -token_losses(self.setting.model, batch).sum(1)
        return -self.config.weight * (batch["reward"] * chances).mean() + (self.own - 1) ** 2

    def found(self):
        return {"background": len(self.setting.extra("background", "")), "own": self.own.item()}


class Alone(Objective):
    """Learns from what the model writes."""

    samples = True


class Twice(Recipe):
    def examples(self, examples, setting):
        return [*examples, *examples]

    def found(self):
        return {"times": 2}


class Alternate(ParameterSchedule):
    """The queries in the first half of the steps, the keys at half the rate in the second; the rest never."""

    rounds = 2

    def rates(self, tensors, round, draw):
        rate = {"query": (1.0, 0.0), "key": (0.0, 0.5)}
        return {name: rate.get(site.role, (0.0, 0.0))[round] for name, site in tensors.items()}


class Mean(Method):
    """A LoRA whose A is made of the mean input that was measured on data; what is stored has rank 1 more, of zeros."""

    @dataclass(frozen=True)
    class Config:
        extra: str | None = None
        r: int = 2

    def stages(self, config):
        def take(setting):
            SEEN.append("measured")
            sums = {}
            base = setting.model.base
            sites = select(setting.model.sites, "query")
            hooks = [
                base.get_submodule(site.path).register_forward_pre_hook(
                    lambda module, args, path=site.path: sums.__setitem__(path, args[0].double().sum((0, 1)).float())
                )
                for site in sites
            ]
            rows = setting.examples if config.extra is None else setting.extra(config.extra, "it is measured")
            setting.model(input_ids=setting.batch(rows[:2])["input_ids"])
            for hook in hooks:
                hook.remove()
            return sums

        def build(given: BuildContext):
            if given.before:
                return given.before
            assert set(given.measured) == {site.path for site in select(given.sites, "query")}
            made = {}
            for site in select(given.sites, "query"):
                assert torch.equal(given.weight(site), given.base.get_submodule(site.path).weight)
                down = given.measured[site.path].expand(config.r, -1).clone()
                made[site.path] = LowRank(down=down, up=torch.zeros(site.outputs, config.r), scale=torch.tensor(1.0))
            return made

        def finish(parts, given):
            return {
                path: LowRank(
                    down=torch.cat([part.down, torch.ones(1, part.down.shape[1])]),
                    up=torch.cat([part.up, torch.zeros(len(part.up), 1)], 1),
                    scale=part.scale,
                )
                for path, part in parts.items()
            }

        measurement = Measurement("mean", take, config.extra, options=("extra",))
        return [Stage("train", build, measurement=measurement, finish=finish)]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The parts above, as if a package had brought them."""
    SEEN.clear()
    parts = {
        "objectives": {"margin": Margin, "alone": Alone}, "recipes": {"twice": Twice}, "schedules": {"alternate": Alternate},
        "methods": {"mean": Mean},
    }  # fmt: skip
    real = plugins.discovery.points

    def points(group):
        dist = SimpleNamespace(name="here", version="1")
        mine = {
            name: SimpleNamespace(name=name, value=name, dist=dist, load=lambda made=made: made)
            for name, made in parts.get(group, {}).items()
        }
        return real(group) | mine

    plugins.load.cache_clear()
    monkeypatch.setattr(plugins.discovery, "points", points)
    yield
    plugins.load.cache_clear()


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def train(hub, tiny_folder, data):
    def train(name="me/a", method="lora", **settings):
        given = {"base": str(tiny_folder), "data": data, "steps": 4, "lr": 1e-2}
        return hub.train(method=method, name=name, **given | settings)

    return train


def tensors(hub, release):
    return Adapter.load(hub, release).tensors


# --- objectives ----------------------------------------------------------------------------------------------------


def test_an_objective_reads_scored_rows_and_trains_what_is_its_own(hub, train, tmp_path):
    scored, background = write(tmp_path / "s.jsonl", SCORED), write(tmp_path / "b.jsonl", ROWS[:5])
    made = train(
        data=scored, objective="margin", extras={"background": background}, batch_size=2,
        options={"r": 2, "margin.weight": 0.5},
    )  # fmt: skip
    for group, reward, _ in SEEN:
        assert len(group) == 6 and group[:3] == [group[0]] * 3 and reward == [1, -1, 0.5] * 2
    assert [step for *_, step in SEEN] == [0, 1, 2, 3]
    told = made.manifest.recipe
    assert told["objective"] == {"name": "margin", "options": {"weight": 0.5}, "distribution": "here 1"}
    assert told["data"]["kind"] == "scored" and told["extras"]["background"]["rows"] == 5
    found = told["found"]["train"]["objective"]
    assert found["background"] == 5 and 0 < found["own"] < 1
    assert not any(name.rpartition(".")[2] == "own" for name in tensors(hub, made))
    assert made.manifest.method.options["r"] == 2 and "margin.weight" not in made.manifest.method.options


def test_what_goes_on_says_under_what(hub, train, tmp_path):
    scored, background = write(tmp_path / "s.jsonl", SCORED), write(tmp_path / "b.jsonl", ROWS[:5])
    given = {"data": scored, "extras": {"background": background}}
    train(objective="margin", schedule="alternate", **given)
    with pytest.raises(UsageError, match="under the objective 'margin'"):
        train(name=None, method=None, continue_from="me/a")
    with pytest.warns(LeftOut, match="alternate"):
        train(name=None, method=None, continue_from="me/a", objective="margin", **given)
    with pytest.warns(LeftOut):
        train(name=None, method=None, continue_from="me/a@0.1.0", objective="sft")


def test_the_default_objective_is_not_told_and_is_the_same(hub, train):
    one, two = train("me/a"), train("me/b", objective="sft")
    assert "objective" not in one.manifest.recipe and "recipes" not in one.manifest.recipe
    assert all(torch.equal(t, tensors(hub, two)[n]) for n, t in tensors(hub, one).items())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": "margin"}, "reads scored rows"),
        ({"objective": "margin", "data": "scored"}, "background"),
        ({"data": "scored"}, "reads prompt"),
        ({"options": {"margin.weight": 2}}, "no part of this training"),
        ({"recipes": ["twice"], "options": {"twice.n": 2}}, "unknown option"),
        ({"method": "mean", "options": {"extra": "calibration"}}, "calibration"),
        ({"extras": {"typo": "rows"}}, "no part of this training reads"),
        ({"recipes": ["twice", "twice"]}, "given twice"),
        ({"objective": "alone", "recipes": ["neftune"]}, "would do nothing"),
        ({"objective": "alone", "gradient_checkpointing": True}, "would do nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, match, hub, train, tmp_path):
    if "extras" in settings:
        settings = settings | {"extras": {"typo": write(tmp_path / "b.jsonl", ROWS)}}
    if settings.get("data") == "scored":
        settings = settings | {"data": write(tmp_path / "s.jsonl", SCORED)}
    with pytest.raises(UsageError, match=match) as caught:
        train(**settings)
    assert caught.value.hint and hub.releases() == [] and not (hub.root / "training").exists()


def test_parts_that_are_not_installed_are_named(train):
    for settings in ({"objective": "margn"}, {"recipes": ["twise"]}, {"schedule": "alternat"}):
        with pytest.raises(PluginError, match=r"no (objective|recipe|schedule) named") as caught:
            train(**settings)
        assert "did you mean" in caught.value.hint


# --- recipes and schedules -----------------------------------------------------------------------------------------


def test_a_recipe_changes_the_rows_and_says_what_it_made(train):
    made = train(recipes=["twice"], steps=None, epochs=1, batch_size=8)
    assert made.manifest.recipe["steps"] == 3 and made.manifest.recipe["mixed"] == {"twice": {"times": 2}}


def by_hand(model, tokenizer, paths, order, rates, lr, steps):
    """Full fine-tuning of some matrices in plain torch: AdamW, clipped at 1, linearly falling; {path: change}."""
    weights = {path: nn.Parameter(torch.zeros_like(model.get_submodule(path).weight)) for path in paths}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    for step, batch in enumerate(order):
        on = rates(step)
        for path, weight in weights.items():
            weight.requires_grad_(on[path] > 0)
        changed = {f"{path}.weight": model.get_submodule(path).weight + w for path, w in weights.items()}
        logits = torch.func.functional_call(model, changed, kwargs=batch["model"]).logits
        loss = nn.functional.cross_entropy(logits[batch["rows"], batch["places"]], batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        active = [w for w in weights.values() if w.requires_grad]
        torch.nn.utils.clip_grad_norm_(active, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * max(on.values()) * (steps - step) / steps
        optimizer.step()
    return {path: weight.detach() for path, weight in weights.items()}


def test_a_schedule_is_plain_training_of_what_it_says(hub, train, tiny_folder, data):
    """Queries for two steps, then keys at half the rate; every row in each batch, so that the order says nothing."""
    made = train(method="full", schedule="alternate", batch_size=12, warmup=0, lr=1e-3)
    got = tensors(hub, made)
    roles = ("query", "key")
    sites = [site for site in hub.load(str(tiny_folder)).sites if site.role in roles]
    assert set(got) == {f"{site.path}.dense.0.weight" for site in sites}  # what never trained is not stored
    told = made.manifest.recipe["found"]["train"]["rates"]
    assert told == [
        {rate: [site.path for site in sites if site.role == role]}
        for role, rate in zip(roles, ("1", "0.5"), strict=True)
    ]
    assert made.manifest.recipe["schedule"]["name"] == "alternate"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    model.requires_grad_(False)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] + [2] for row in ROWS]
    longest = max(map(len, ids))
    full = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    rows, places, labels = [], [], []
    for row, one in enumerate(ids):
        for place in range(len(ROWS[row]["prompt"]), len(one)):
            rows, places, labels = [*rows, row], [*places, place - 1], [*labels, one[place]]
    batch = {"model": {"input_ids": full}, "rows": rows, "places": places, "labels": torch.tensor(labels)}
    rate = {site.path: (1.0, 0.0) if site.role == "query" else (0.0, 0.5) for site in sites}
    want = by_hand(
        model, tokenizer, rate, [batch] * 4, lambda step: {p: r[step // 2] for p, r in rate.items()}, 1e-3, 4
    )
    for path, change in want.items():
        assert change.abs().max() > 2e-4
        np.testing.assert_allclose(got[f"{path}.dense.0.weight"].numpy(), change.numpy(), atol=2e-6)


def test_what_never_trained_stays_out_and_goes_on_as_the_base(hub, train):
    made = train(method="lora", schedule="alternate")
    paths = {name.rsplit(".", 3)[0] for name in tensors(hub, made)}
    assert all(path.endswith(("q_proj", "k_proj")) for path in paths)
    further = train(name=None, method=None, continue_from="me/a")
    assert {name.rsplit(".", 3)[0] for name in tensors(hub, further)} > paths


def test_more_rounds_than_steps_are_refused(hub, train):
    with pytest.raises(UsageError, match="rounds"):
        train(schedule="alternate", steps=1)
    assert hub.releases() == []


def test_a_stage_that_was_kept_says_what_it_said(hub, train):
    """A killed run takes its finished stage from the folder, and another run too: the same manifest."""
    given = {"method": "lt_sft", "schedule": "alternate", "steps": 8}
    options = {"k": 2600, "target_modules": ["query", "key"]}
    first = train("me/a", options=options, **given)
    second = train("me/b", options=options | {"k": 2700}, **given)  # the probe is the first one's
    found = [release.manifest.recipe["found"]["probe"] for release in (first, second)]
    assert found[0] == found[1] and set(found[0]) == {"rates", "tensors"}


def test_gradient_checkpointing_leaves_the_base_alone(tiny_folder, hub, data):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        bare = base(input_ids=ids).logits
    hub.train(base, "full", data, "me/a", steps=3, lr=1e-1, gradient_checkpointing=True)
    assert not [name for name, module in base.named_modules() if {"weight", "bias"} & module.__dict__.keys()]
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, bare)


# --- measurements and what is stored -------------------------------------------------------------------------------


def test_a_measurement_is_taken_once_for_base_and_data(hub, train, tmp_path):
    other = write(tmp_path / "other.jsonl", ROWS[3:8])
    kept = hub.root / "training" / "measured"
    one = train("me/a", "mean")
    train("me/b", "mean", options={"r": 3}, lr=1e-3)
    assert SEEN == ["measured"] and len(list(kept.glob("*.safetensors"))) == 1
    digest = one.manifest.recipe["found"]["train"]["measured"]
    (file,) = kept.glob("*.safetensors")
    import hashlib

    assert digest == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    train("me/c", "mean", data=other)
    assert len(SEEN) == 2
    train("me/d", "mean", options={"extra": "calibration"}, extras={"calibration": other})
    assert len(SEEN) == 3  # the same rows, but another value of an option that it reads
    train("me/e", "mean", options={"extra": "calibration"}, extras={"calibration": other}, data=other, lr=2e-2)
    assert len(SEEN) == 3
    train("me/r", "mean", recipes=["twice"], lr=4e-2)
    assert len(SEEN) == 4  # other rows are read
    for path in kept.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    train("me/f", "mean", lr=3e-2)
    assert len(SEEN) == 5  # what was kept is broken: it is measured again


def test_what_a_stage_finishes_is_what_is_stored_and_measured(hub, train, tiny_folder, data):
    made = train("me/a", "mean", eval_data=data)
    held = tensors(hub, made)
    assert all(t.shape[0] == 3 for name, t in held.items() if name.endswith("down"))
    further = train(name=None, method=None, continue_from="me/a")
    assert SEEN == ["measured"] and further.version != made.version  # what goes on is not measured
    loss = hub.evaluate("me/a@0.1.0", str(tiny_folder), data)["loss"]
    assert loss == pytest.approx(made.manifest.metrics["eval"]["loss"], rel=1e-6)


def test_without_new_is_the_base_and_ends(tiny_folder, hub):
    model = hub.load(str(tiny_folder))
    ids = torch.arange(5, 15)[None]
    bare = model(input_ids=ids).logits
    torch.manual_seed(0)
    parts = LoRA().build(model.sites, LoRA.Config(r=2, lora_dropout=0.5))
    for part in parts.values():
        part.tensors["up"] = torch.randn_like(part.up)
    model.attach_new(parts)
    model.training_mode(True)
    with model.without_new():
        got = model(input_ids=ids).logits
        assert torch.equal(got, bare) and not got.requires_grad and not model.base.training
    assert model.base.training and not torch.equal(model(input_ids=ids).logits, bare)
    assert model(input_ids=ids).logits.requires_grad


def test_given_reads_columns_of_a_fused_weight():
    from adapterhub.sites import sites
    from adapterhub.testing.families import tiny

    model = tiny("gpt2")
    here = next(site for site in sites(model) if site.columns and site.role == "key")
    width = model.config.hidden_size
    want = model.get_submodule(here.module).weight.T[width : 2 * width]
    assert torch.equal(BuildContext([here], model).weight(here), want)


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_line_names_them(hub, tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_HOME", str(hub.root))
    scored, background = write(tmp_path / "s.jsonl", SCORED), write(tmp_path / "b.jsonl", ROWS[:5])
    status = execute(
        ["train", "--base", str(tiny_folder), "--method", "lora", "--data", str(scored), "--name", "me/a", "--steps", "2",
         "--objective", "margin", "--recipe", "twice", "--schedule", "alternate", "--extra", f"background={background}",
         "--set", "margin.weight=0.25", "--set", "r=2", "--json"]
    )  # fmt: skip
    assert status == 0
    told = hub.resolve("me/a").manifest.recipe
    assert told["objective"]["options"] == {"weight": 0.25} and told["recipes"][0]["name"] == "twice"
    assert told["schedule"]["name"] == "alternate" and told["extras"]["background"]["rows"] == 5
