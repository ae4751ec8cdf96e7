"""Training against PEFT in a plain loop; parents, continuing, what is refused, and what is published."""

import hashlib
import inspect
import json
import math
import resource
import shutil
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest
import torch

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.names import named_tensors
from adapterhub.data import read
from adapterhub.data.encoding import encode
from adapterhub.errors import (
    DataError,
    HubError,
    IncompatibleBase,
    ManifestError,
    NameInUse,
    NoEffect,
    NotFound,
    ParentsWarning,
    UsageError,
)
from adapterhub.kinds.method import Stage
from adapterhub.kinds.training import TrainingContext
from adapterhub.methods.lora import LoRA
from adapterhub.runtime.model import Model
from adapterhub.training.module import StageModule
from adapterhub.training.parts import training_parts
from adapterhub.training.train import DataWarning
from adapterhub.training.trainer import Schedule, fit

ROWS = [(f"Is {i} even? ", "no" if i % 2 else "yes") for i in range(16)]


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def path(tmp_path):
    return rows_in(tmp_path / "rows.jsonl", ROWS)


def rows_in(file, rows):
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    return file


@pytest.fixture
def train(hub, tiny_folder, path):
    """hub.train with a base, data, a name and few steps."""

    def train(method="lora", name="me/a", base=tiny_folder, data=path, **settings):
        return hub.train(str(base), method, data, name, **{"steps": 6, "lr": 1e-2, **settings})

    return train


def tensors_of(hub, release):
    return Adapter.load(hub, release).tensors


def log_of(hub, release):
    return json.loads(hub.store.read(release.manifest.files["log"]))


def test_it_is_what_peft_and_a_plain_loop_come_to(hub, train, path, tiny_folder, device):
    """Every batch is the whole file, so that its order does not matter; rows unpadded, one by one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    release = train(options=options, batch_size=16, steps=8, warmup=2, device=device, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    fresh = LoRA().build(Model(base).sites, LoRA.Config(**{**options, "target_modules": ("q_proj", "down_proj")}))
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    )
    trained = {}
    for site, part in fresh.items():
        module = peft.base_model.model.get_submodule(site)
        module.lora_A["default"].weight.data.copy_(part.down)
        trained[f"{site}.low_rank.0.down"] = module.lora_A["default"].weight
        trained[f"{site}.low_rank.0.up"] = module.lora_B["default"].weight
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    losses = []
    examples = encode(read(path), AutoTokenizer.from_pretrained(tiny_folder), 1024)[0]
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step < 2 else (8 - step) / 6)
        optimizer.zero_grad()
        count = sum(len(example.completion) for example in examples)
        total = 0.0
        for example in examples:
            ids = torch.tensor([example.ids])
            labels = ids.clone()
            labels[:, : example.start] = -100
            loss = peft(input_ids=ids, labels=labels).loss * len(example.completion) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(total)
    assert [entry["loss"] for entry in log_of(hub, release)] == pytest.approx(losses, rel=1e-4)
    ours = tensors_of(hub, release)
    for name, tensor in trained.items():
        assert torch.allclose(ours[name], tensor, atol=2e-4), name
        assert (tensor - (0 if name.endswith("up") else fresh[name.split(".low_rank")[0]].down)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"lora_dropout": 0.2}), ("bottleneck", {"r": 8}), ("bottleneck", {"r": 8, "parallel": True})],
)
def test_it_learns_and_says_how_it_was_made(hub, train, path, tiny_folder, method, options):
    release = train(method, options=options, steps=20, eval_data=path, licence="MIT", batch_size=8)
    manifest = release.manifest
    before = hub.evaluate(None, str(tiny_folder), path)
    after = hub.evaluate("me/a", str(tiny_folder), path)
    assert after["loss"] < before["loss"] / 2
    assert manifest.metrics["eval"]["loss"] == pytest.approx(after["loss"], abs=1e-6)
    assert manifest.metrics["eval"]["label"] == after["label"]
    log = log_of(hub, release)
    assert [entry["step"] for entry in log] == list(range(1, 21))
    assert manifest.metrics["train_loss"] == pytest.approx((log[-1]["loss"] + log[-2]["loss"]) / 2)
    assert manifest.method.name == method and manifest.method.distribution.startswith("adapterhub ")
    assert manifest.method.options.items() >= options.items()
    assert manifest.recipe["data"] == {
        "digest": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 16,
        "kind": "prompt",
    }
    assert (manifest.recipe["steps"], manifest.recipe["seed"], manifest.recipe["lr"]) == (20, 0, 1e-2)
    assert (manifest.licence, manifest.base.architecture, str(release)) == ("MIT", "llama", "me/a@0.1.0")
    assert not list((hub.root / "training").iterdir())  # checkpoints are gone


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(hub, train):
    first = train(options={"lora_dropout": 0.3})
    other = train(options={"lora_dropout": 0.3}, name="me/b")
    assert other.manifest.files == first.manifest.files
    assert train(options={"lora_dropout": 0.3}, seed=1).manifest.files != first.manifest.files


def test_dropout_is_on_while_training_and_epochs_count_rows(hub, train):
    with_dropout, without = train(options={"lora_dropout": 0.5}), train()
    assert log_of(hub, with_dropout)[-1]["loss"] != log_of(hub, without)[-1]["loss"]
    assert train(steps=None, epochs=1.5, batch_size=8).manifest.recipe["steps"] == 3


def test_checkpointed_layers_change_nothing(hub, train):
    plain, checkpointed = train(), train(gradient_checkpointing=True)
    ours, theirs = tensors_of(hub, plain), tensors_of(hub, checkpointed)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert checkpointed.manifest.recipe["gradient_checkpointing"] is True


def test_a_new_adapter_over_frozen_ones(hub, train, tiny_folder, path):
    parents = [train(name="me/p"), train("bottleneck", name="me/q", options={"r": 4})]
    release = train(name="me/child", on=["me/p", "me/q@0.1.0"], steps=12)
    assert [(p.name, p.version, p.digest, p.relation) for p in release.manifest.parents] == [
        (p.name, p.version, p.digest, "on") for p in parents
    ]
    assert release.manifest.recipe["beneath"] == "me/p@0.1.0 + me/q@0.1.0"
    assert {name.split(".")[-3] for name in tensors_of(hub, release)} == {"low_rank"}  # its own tensors only
    beneath, on_top = (
        hub.evaluate(expression, str(tiny_folder), path)["loss"]
        for expression in ("me/p + me/q", "me/p + me/q + me/child")
    )
    assert log_of(hub, release)[0]["loss"] == pytest.approx(beneath, rel=0.2)
    assert on_top < beneath
    first = train(name="me/other", on=["me/p"], batch_size=16, steps=2)
    assert log_of(hub, first)[0]["loss"] == pytest.approx(
        hub.evaluate("me/p", str(tiny_folder), path)["loss"], rel=1e-5
    )


def test_an_adapter_goes_on(hub, train, tiny_folder, path):
    parent = train(name="me/p")
    first = train(on=["me/p"], options={"r": 4, "lora_dropout": 0.1}, licence="MIT")
    loss = hub.evaluate("me/p + me/a", str(tiny_folder), path)["loss"]
    release = hub.train(str(tiny_folder), data=path, continue_from="me/a@0.1.0", steps=6, lr=1e-2)
    assert str(release) == "me/a@0.2.0"
    assert [(p.name, p.relation) for p in release.manifest.parents] == [("me/a", "continue"), ("me/p", "on")]
    assert release.manifest.parents[1].digest == parent.digest
    assert release.manifest.method == first.manifest.method
    still = hub.train(str(tiny_folder), data=path, name="me/still", continue_from="me/a@0.1.0", steps=1, lr=1e-12)
    before, after = tensors_of(hub, first), tensors_of(hub, still)
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    whole = hub.train(
        str(tiny_folder), data=path, name="me/whole", continue_from="me/a@0.1.0", steps=1, lr=1e-12, batch_size=16
    )
    # Its dropout is on: the loss is near what the adapter had, not equal.
    assert log_of(hub, whole)[0]["loss"] == pytest.approx(loss, rel=0.3)
    assert log_of(hub, whole)[0]["loss"] != pytest.approx(loss, rel=1e-6)


def test_over_a_composition_and_on_from_there(hub, train, tiny_folder, path):
    """What was beneath is there again with its weight: the loss before the first step says so."""
    train(name="me/p", lr=3e-2, steps=30)
    hub.compose("0.5*me/p", name="me/half")
    first = train(name="me/a", on=["me/half"], batch_size=16, steps=4)
    assert first.manifest.recipe["beneath"] == "0.5*me/p@0.1.0"
    assert [(p.name, p.relation) for p in first.manifest.parents] == [("me/p", "on")]
    loss = hub.evaluate("0.5*me/p + me/a", str(tiny_folder), path, metrics=["loss"])["loss"]
    whole = hub.evaluate("me/p + me/a", str(tiny_folder), path, metrics=["loss"])["loss"]
    second = hub.train(str(tiny_folder), data=path, continue_from="me/a", batch_size=16, steps=1, lr=1e-2)
    assert second.manifest.recipe["beneath"] == "0.5*me/p@0.1.0"
    assert [(p.name, p.relation) for p in second.manifest.parents] == [("me/a", "continue"), ("me/p", "on")]
    assert log_of(hub, second)[0]["loss"] == pytest.approx(loss, rel=1e-5) != pytest.approx(whole, rel=1e-5)
    small = hub.compress("me/a", "svd", {"rank": 4}, name="me/small").manifest
    assert small.recipe["beneath"] == "0.5*me/p@0.1.0" and ("me/p", "on") in [
        (p.name, p.relation) for p in small.parents
    ]
    among = msgspec.structs.replace(first.manifest, name="me/among", recipe={"beneath": None})
    hub.publish(among, {"tensors": hub.store.read(first.manifest.files["tensors"])})
    with pytest.raises(UsageError, match="among others") as caught:
        hub.train(str(tiny_folder), data=path, continue_from="me/among", steps=1)
    assert caught.value.hint
    for recipe in ({"beneath": "me/half@0.1.0"}, {"beneath": "me/p"}, {"beneath": 1}, {"beneath": "me/p@0.1.0 +"}):
        wrong = msgspec.structs.replace(first.manifest, name="me/wrong", recipe=recipe)
        with pytest.raises(ManifestError, match="me/wrong"):
            hub.publish(wrong, {"tensors": hub.store.read(first.manifest.files["tensors"])})


def test_it_is_said_when_what_was_beneath_is_left_out(hub, train, tmp_path, recwarn):
    train(name="me/p")
    train(name="me/a", on=["me/p"])
    hub.compose("me/p + me/a", name="me/both")
    hub.merge(["me/p", "me/a"], name="me/m")
    hub.export("me/both", tmp_path / "both")
    assert not [w for w in recwarn if issubclass(w.category, ParentsWarning)]
    hub.compose("2*me/a", name="me/twice")
    for alone in (
        lambda: hub.merge(["me/a"], name="me/m"),
        lambda: hub.export("me/a", tmp_path / "a"),
        lambda: hub.export("me/twice", tmp_path / "twice"),
    ):
        with pytest.warns(ParentsWarning, match=r"^me/a@0\.1\.0 was trained over me/p@0\.1\.0 ") as caught:
            alone()
        assert len(caught) == 1


def test_after_step_runs_after_each_step_and_only_adapter_tensors_are_saved(path, tiny_folder, tmp_path, device):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Model(
        AutoModelForCausalLM.from_pretrained(tiny_folder).to(device), AutoTokenizer.from_pretrained(tiny_folder)
    )
    model.base.requires_grad_(False)
    base = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    torch.manual_seed(0)
    model.attach_new(LoRA().build(model.sites, LoRA.Config(r=2)))
    parameters = model.trainable_parameters()
    calls = []

    def after_step():
        calls.append(torch.is_grad_enabled())
        for parameter in parameters:
            parameter.clamp_(-0.05, 0.05)

    setting = TrainingContext(model, encode(read(path), model.tokenizer, 64)[0], 0, steps=4)
    stage = Stage("train", lambda given: {}, after_step=lambda parts: after_step())
    learner = StageModule(setting, training_parts(None, (), None, {})[0], stage)
    log = fit(learner, Schedule(4, 8, 1e-1, 0, 0, False), tmp_path / "run", 2, "test")
    assert calls == [False] * 4 and len(log) == 4
    assert max(float(parameter.detach().abs().max()) for parameter in parameters) <= 0.0500001
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base.state_dict().items())
    assert not model.base.training
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    with safe_open(tmp_path / "run/checkpoint-4/model.safetensors", "pt") as file:
        saved = {name.replace("/", "."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    live = {name: t for name, t in named_tensors(model.new_modifications()).items() if t.requires_grad}
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name].cpu()) for name in saved)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_mistakes_are_found_before_the_base_is_touched(hub, train, path, tmp_path):
    nowhere = tmp_path / "no base here"
    train()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}')
    for wrong, error in [
        ({"version": "1"}, UsageError),
        ({"name": "Me/A"}, UsageError),
        ({"method": "lorra"}, HubError),
        ({"method": None}, UsageError),
        ({"options": {"rank": 4}}, UsageError),
        ({"data": None}, UsageError),
        ({"data": tmp_path / "none.jsonl"}, NotFound),
        ({"data": broken}, DataError),
        ({"eval_data": broken}, DataError),
        ({"on": ["me/none"]}, NotFound),
        ({"continue_from": "me/none", "method": None}, NotFound),
        ({"continue_from": "me/a"}, UsageError),
        ({"epochs": 1}, UsageError),
        ({"steps": 0}, UsageError),
        ({"lr": -1.0}, UsageError),
        ({"lr": math.nan}, UsageError),
        ({"batch_size": 0}, UsageError),
        ({"warmup": -1}, UsageError),
        ({"save_every": 0}, UsageError),
        ({"epochs": math.nan, "steps": None}, UsageError),
        ({"epochs": math.inf, "steps": None}, UsageError),
        ({"seed": -1}, UsageError),
        ({"seed": 2**32}, UsageError),
        ({"options": {"lora_alpha": "nan"}}, UsageError),
        ({"options": {"lora_alpha": math.inf}}, UsageError),
        ({"method": "bottleneck", "options": {"scale": "inf"}}, UsageError),
        ({"licence": "MIT\x1b[2J"}, UsageError),
    ]:
        with pytest.raises(error) as caught:
            train(base=nowhere, **wrong)
        assert caught.value.hint and str(nowhere) not in str(caught.value), wrong
    with pytest.raises(NotFound):
        train(base=nowhere, name="me/b")
    with pytest.raises(UsageError, match="no base"):
        hub.train(method="lora", data=path, name="me/b")
    assert [row.version for row in hub.releases()] == ["0.1.0"]


def test_a_base_folder_that_no_release_could_name(train, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "a\nb")
    with pytest.raises(UsageError, match="control characters"):
        train(base=tmp_path / "a\nb")


@pytest.mark.parametrize("limit", [4096, 36_000])  # below the tensors; between them and the optimiser's state
def test_a_full_disk_leaves_no_half_checkpoint(limit, hub, train):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(HubError, match="no space left") as caught:
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.hint and not list((hub.root / "training").glob("*/checkpoint-*"))
    assert train().version == "0.1.0"


def test_several_processes_are_refused(train, monkeypatch):
    """What torchrun sets: each process would train, and publish, by itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes") as caught:
        train()
    assert "torchrun" in caught.value.hint
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(steps=2).version == "0.1.0"


def test_a_run_that_is_published_is_not_trained_again(hub, train, path, monkeypatch):
    first, second = train(), train(seed=1, licence="MIT", eval_data=path)
    assert (first.version, second.version) == ("0.1.0", "0.2.0")
    with monkeypatch.context() as patched:
        patched.delattr("adapterhub.training.stages.fit")
        assert train() == train(version="0.1.0") == first
        assert train(seed=1, licence="MIT", eval_data=path, save_every=1) == second
        for version, other in [
            ("0.1.0", {"seed": 1}),
            ("0.1.0", {"method": "bottleneck"}),
            ("0.1.0", {"on": ["me/a@0.2.0"]}),
            ("0.1.0", {"licence": "MIT"}),
            ("0.2.0", {}),
            ("0.2.0", {"seed": 1, "licence": "MIT"}),
        ]:
            with pytest.raises(NameInUse, match=f"me/a@{version}") as caught:
                train(version=version, **other)
            assert caught.value.hint
    assert not list((hub.root / "training").iterdir())
    assert train(version="1.0.0").manifest.files == first.manifest.files
    assert train(seed=1).version == "1.1.0"  # without the licence it is another release


def test_a_run_that_diverges_publishes_nothing(hub, train):
    with pytest.raises(HubError, match=r"diverged: the (loss|gradient) is (nan|inf) at step \d+"):
        train(lr=1e30, warmup=0, save_every=1)
    assert not hub.releases() and not any((hub.root / "training").rglob("checkpoint-*"))


def test_an_adapter_that_learned_nothing_is_refused(hub, train):
    with pytest.raises(NoEffect):
        train(steps=1, warmup=1)  # the only step has a rate of 0
    assert not hub.releases()


def test_another_base_is_refused(hub, train, tiny_model, tiny_saved, tmp_path, path):
    train()
    other = tiny_saved(tmp_path / "other", tiny_model(seed=5))
    with pytest.raises(IncompatibleBase) as caught:
        hub.train(str(other), data=path, continue_from="me/a", steps=2)
    assert "--base" not in caught.value.hint and "the base it was made for" in caught.value.hint
    with pytest.raises(IncompatibleBase):
        train(name="me/b", base=other, on=["me/a"])
    with pytest.warns(UserWarning, match="forced"):
        assert hub.train(str(other), data=path, continue_from="me/a", steps=2, force=True).version == "0.2.0"


def test_a_recorded_base_is_used_only_if_its_name_is_known(hub, train, tiny_folder, tiny_model, path, monkeypatch):
    """Any other name may be a folder here by chance, or a repo id that someone else wrote into the manifest."""
    train()
    monkeypatch.chdir(tiny_folder.parent)
    with pytest.raises(UsageError, match=f"{tiny_folder.name}") as caught:
        hub.train(data=path, continue_from="me/a", steps=2)
    assert "--base" in caught.value.hint
    seen = []
    monkeypatch.setattr("adapterhub.training.train.load", lambda hub, base, *_, **__: seen.append(base) or 1 / 0)
    known = msgspec.structs.replace(hub.resolve("me/a").manifest, name="me/known")
    known = msgspec.structs.replace(known, base=msgspec.structs.replace(known.base, name="smollm2"))
    hub.publish(known, {"tensors": hub.store.read(known.files["tensors"])})
    with pytest.raises(ZeroDivisionError):
        hub.train(data=path, continue_from="me/known", steps=2)
    assert seen == ["smollm2"]
    with pytest.raises(IncompatibleBase) as caught:
        hub.load(tiny_model(seed=5), "me/known")
    assert "use --base smollm2" in caught.value.hint


def test_a_composition_has_nothing_to_train(hub, train, tiny_folder, path):
    train()
    hub.compose("0.5*me/a", "me/half")
    with pytest.raises(UsageError, match="composition"):
        hub.train(str(tiny_folder), data=path, continue_from="me/half", steps=2)


def test_rows_that_are_cut_are_counted(train, tmp_path):
    with pytest.warns(DataWarning, match="1 of 2 rows are longer than 16 tokens"):
        train(data=rows_in(tmp_path / "long.jsonl", [("a" * 30, "b"), ("a", "b")]), max_length=16, steps=2)


def test_tensors_without_a_method_go_on_too(hub, train, tiny_folder, path):
    """A merged or imported adapter: two parts at each site, no method recorded."""
    made = train()
    parts = Adapter.load(hub, made).modifications()
    tensors = named_tensors({site: [*here, *here] for site, here in parts.items()})
    from adapterhub.tensors.file import dump

    manifest = msgspec.structs.replace(
        made.manifest, name="me/two", method=None, forms={site: ["low_rank"] * 2 for site in parts}
    )
    hub.publish(manifest, {"tensors": dump(tensors)})
    release = hub.train(str(tiny_folder), data=path, continue_from="me/two", steps=3, lr=1e-2)
    assert str(release) == "me/two@0.2.0" and release.manifest.method is None
    assert tensors_of(hub, release).keys() == tensors.keys()
    assert log_of(hub, release)[0]["loss"] != log_of(hub, release)[-1]["loss"]


# --- the request -------------------------------------------------------------------------------------------------


def test_every_option_stands_once_and_the_faces_follow_it():
    """A field's default, name and help are those of Hub.train, of its docstring and of the command."""
    import typer

    from adapterhub.cli.app import app
    from adapterhub.training.request import TrainRequest, help_of

    names = [field.name for field in fields(TrainRequest)]
    signature = inspect.signature(adapterhub.Hub.train)
    assert list(signature.parameters) == ["self", *names]
    for field in fields(TrainRequest):
        assert signature.parameters[field.name].default == field.default
        assert f"\n{field.name}: {help_of(field.name)}" in adapterhub.Hub.train.__doc__
    command = typer.main.get_command(app).commands["train"]
    shown = {option.name: option.help for option in command.params}
    assert {name: shown[name] for name in names} == {name: help_of(name) for name in names}
    assert [option.name for option in command.params if option.required] == ["data"]


def test_what_is_typed_becomes_the_request(tmp_path, monkeypatch):
    from adapterhub.cli.app import execute
    from adapterhub.training import train
    from adapterhub.training.request import TrainRequest

    seen = []
    monkeypatch.setattr(train, "train", lambda hub, request: seen.append(request) or 1 / 0)
    monkeypatch.chdir(adapterhub.open(tmp_path, create=True).root)
    for typed, asked in [
        ("", {}),
        (
            "--set r=8 --set targets=q,v --recipe a --recipe b --extra old=o.jsonl --on x --on y --no-resume --force",
            {
                "options": {"r": "8", "targets": "q,v"},
                "recipes": ["a", "b"],
                "extras": {"old": "o.jsonl"},
                "on": ["x", "y"],
                "resume": False,
                "force": True,
            },
        ),
        (
            "--continue x --lr 0.5 --epochs 2 --gradient-checkpointing",
            {"continue_from": "x", "lr": 0.5, "epochs": 2, "gradient_checkpointing": True},
        ),
    ]:
        with pytest.raises(ZeroDivisionError):
            execute(["train", "--base", "b", "--data", "d.jsonl", *typed.split()])
        assert seen.pop() == TrainRequest("b", data=Path("d.jsonl"), **asked)


def test_an_unknown_argument_and_too_many_are_type_errors(hub):
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'epoch'"):
        hub.train("smollm2", data="rows.jsonl", epoch=3)
    with pytest.raises(TypeError, match=r"train\(\) too many positional arguments"):
        hub.train(*"abcdefghi")
