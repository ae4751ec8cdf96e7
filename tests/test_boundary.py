"""Whatever the code of a plugin raises, or returns that it must not, is one PluginError that names package, part, hook, site
and the author's line; what worked before still works."""

import json

import pytest
import torch

import adapterhub
from adapterhub import plugins
from adapterhub.bases import resolution
from adapterhub.errors import HubError, PluginError, UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.contracts import make
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification, Step
from adapterhub.methods.lora import LoRA
from adapterhub.plugins.boundary import guard
from tests.support import acme

Q = "model.layers.0.self_attn.q_proj"
METHOD = """
import torch
from adapterhub import Method, Stage
from adapterhub.forms.low_rank import LowRank
from adapterhub.methods.lora import LoRA


class Acme(LoRA):
    def build(self, sites, config):
        made = dict(super().build(sites, config))
        path = "model.layers.0.self_attn.q_proj"
        {body}
        return made
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    yield lambda source, **parts: acme.install(monkeypatch, folder, source, **parts)
    acme.forget()


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def train(hub, tiny_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) for n in range(8)))

    def train(method="lora", name="me/a", **settings):
        settings = {"steps": 2, "batch_size": 4, "device": "cpu"} | settings
        return hub.train(str(tiny_folder), method, file, name, **settings)

    return train


def refused(call, hub):
    """The words of the PluginError that it ends in; nothing is published."""
    with pytest.raises(PluginError) as caught:
        call()
    assert hub.releases() == [] and "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value), caught.value.hint


BUILDS = {
    "made[path] = made[path].up": f"build, {Q}: a Modification was expected, this is a Tensor of shape (32, 8)",
    "made = None": "build: a dict of modifications by site path was expected, this is None",
    "made = list(made)": "build: a dict of modifications by site path was expected, this is a list",
    "made['model.layers.0.self_attn.q_prok'] = made.pop(path)": (
        f"build, model.layers.0.self_attn.q_prok: this base has no such site; did you mean {Q}?"
    ),
    "made[0] = made.pop(path)": (
        "build: a dict of modifications by site path: a name that is a text was expected, this is an int"
    ),
    "made[path].tensors['spare'] = torch.zeros(3)": (
        f"build, {Q}: the form 'low_rank' stores down, up, scale, and no 'spare'"
    ),
    "made[path].tensors['up'] = made[path].up.long()": (
        f"build, {Q}: 'up' is torch.int64: what trains is floating point, other tensors are `constants`"
    ),
    "made[path].up[0] = float('nan')": (f"build, {Q}: the tensor 'up' of shape (32, 8) holds NaN or infinite values"),
    "made[path].tensors['up'] = [0.0]": f"build, {Q}: a Tensor 'up' was expected, this is a list",
    "made[path].tensors['up'] = made[path].up.to('meta')": (
        f"build, {Q}: the tensor 'up' is torch.strided on meta: give a plain one with values"
    ),
    "{}['layer']": "build: KeyError: 'layer'",
    "raise StopIteration": "build: StopIteration",
}


@pytest.mark.parametrize(("body", "says"), BUILDS.items(), ids=range(len(BUILDS)))
def test_what_build_returns_is_checked(installed, train, hub, body, says):
    installed(METHOD.replace("{body}", body), methods="acme = Acme")
    message, hint = refused(lambda: train("acme"), hub)
    assert message == f"adapterhub-acme 0.1: method acme, {says}"
    raises = body.startswith(("raise", "{}"))
    assert hint == f"report it to the author of adapterhub-acme: adapterhub_acme.py:{11 if raises else 8}"
    assert not (hub.root / "training").exists()


def test_strided_tensors_and_views_train_as_their_copies_do(installed, train, hub):
    strided = "one = made[path].tensors; one['down'] = one['down'].mT.contiguous().mT; one['up'] = torch.zeros(1).expand(32, 8)"
    installed(METHOD.replace("{body}", strided), methods="acme = Acme")
    plain, other = train("lora"), train("acme", name="me/b")
    assert plain.manifest.files["tensors"].digest == other.manifest.files["tensors"].digest


HOOKS = {
    "def stages(self, config): return None": "stages: a list of Stages, one at least, was expected, this is None",
    "def stages(self, config): return [self]": "stages: a Stage was expected, this is an Acme",
    "def stages(self, config): return 2 * [Stage('train', lambda given: {})]": (
        "stages: 'train' is not a name for a stage: [a-z][a-z0-9_]*, none twice"
    ),
    "def stages(self, config): return [Stage('a', super().stages(config)[0].build, penalty=lambda parts: None)]": (
        "penalty: a Tensor of one floating-point number was expected, this is None"
    ),
    "def stages(self, config): return [Stage('a', super().stages(config)[0].build, note=lambda parts: {'a': {1}})]": (
        "note: what it found is not JSON: Object of type set is not JSON serializable"
    ),
    "def stages(self, config): return [Stage('a', super().stages(config)[0].build, finish=lambda parts, given: [])]": (
        "finish: a dict of modifications by site path was expected, this is a list"
    ),
    "def after_step(self, modifications): modifications['x']": "after_step: KeyError: 'x'",
    "def after_step(self, modifications): next(iter(modifications.values())).tensors['up'] = torch.ones(32, 8)": (
        f"after_step, {Q}: it replaced the tensor 'up': change it in place, `up.copy_(...)`"
    ),
    "def __init__(self): raise OSError('no such file')": "__init__: OSError: no such file",
}


@pytest.mark.parametrize(("hook", "says"), HOOKS.items(), ids=range(len(HOOKS)))
def test_the_other_hooks_of_a_method(installed, train, hub, hook, says):
    installed(
        METHOD.replace("def build(self", f"{hook}\n\n    def build(self").replace("{body}", ""), methods="acme = Acme"
    )
    message, hint = refused(lambda: train("acme"), hub)
    assert message == f"adapterhub-acme 0.1: method acme, {says}"
    assert hint == "report it to the author of adapterhub-acme: adapterhub_acme.py:8"


CLASSES = {
    ("methods", "acme = build", "def build(): pass"): (
        "adapterhub-acme 0.1: method acme: its entry point adapterhub_acme:build is not a class, but a function"
    ),
    ("methods", "acme = Acme", "class Acme: pass"): (
        "adapterhub-acme 0.1: method acme, entry point adapterhub_acme:Acme: "
        "a subclass of adapterhub.kinds.method.Method was expected, this is adapterhub_acme.Acme"
    ),
    ("forms", "acme = Acme", "from adapterhub.methods.lora import LoRA as Acme"): (
        "adapterhub-acme 0.1: form acme, entry point adapterhub_acme:Acme: "
        "a subclass of adapterhub.kinds.modification.Modification was expected, this is adapterhub.methods.lora.LoRA"
    ),
    ("forms", "acme = Acme", "from adapterhub import Modification\nclass Acme(Modification):\n  form = 'acne'"): (
        "adapterhub-acme 0.1: form acme, entry point adapterhub_acme:Acme: "
        "its `form` is 'acne', and its entry point 'acme': they must be one name"
    ),
    ("methods", "acme = Acme", "from adapterhub import Method\nclass Acme(Method):\n  class Config: r = 1"): (
        "adapterhub-acme 0.1: method acme, entry point adapterhub_acme:Acme: "
        "its Config is not a dataclass: write @dataclass(frozen=True) above it"
    ),
    ("forms", "acme = Acme", "from adapterhub import Modification\nclass Acme(Modification):\n  form, stores = 'acme', 'up'"): (
        "adapterhub-acme 0.1: form acme, entry point adapterhub_acme:Acme: "
        "`stores` is a text, where names in a tuple are expected: ('up',)"
    ),
    ("bases", "acme = Acme", "class Acme: pass"): (
        "adapterhub-acme 0.1: base acme, entry point adapterhub_acme:Acme: a base has a method folder(), and this class has none"
    ),
    ("methods", "acme = Acme", "raise RuntimeError('no licence')"): (
        "method 'acme' of adapterhub-acme 0.1 does not load: RuntimeError: no licence"
    ),
    ("methods", "acme = Acme", "x = 1"): (
        "method 'acme' of adapterhub-acme 0.1 does not load: AttributeError: module 'adapterhub_acme' has no attribute 'Acme'"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("group", "entry", "source"), CLASSES, ids=range(len(CLASSES)))
def test_an_entry_point_is_a_class_of_its_kind(installed, group, entry, source):
    installed(source, **{group: entry})
    with pytest.raises(PluginError) as caught:
        plugins.load(group, "acme")
    assert str(caught.value) == CLASSES[group, entry, source]


PARTS = {
    ("objectives", "Objective", "def loss(self, batch, moment): return torch.zeros(4, requires_grad=True)"): (
        "objective acme, loss: a Tensor of one floating-point number was expected, this is a Tensor of shape (4,)"
    ),
    ("objectives", "Objective", "def loss(self, batch, moment): return 1.0"): (
        "objective acme, loss: a Tensor of one floating-point number was expected, this is a float"
    ),
    ("objectives", "Objective", "def loss(self, batch, moment): return torch.tensor(1.0)"): (
        "objective acme, loss: the loss has no gradient: it was computed without what trains, or was detached"
    ),
    ("objectives", "Objective", "def parameters(self): return {'value': torch.zeros(2)}"): (
        "objective acme, parameters: a Parameter was expected, this is a Tensor of shape (2,)"
    ),
    ("objectives", "Objective", "period = 0"): (
        "objective acme, period: a whole number from 1 on was expected, this is 0"
    ),
    ("recipes", "Recipe", "def rows(self, data): pass"): "recipe acme, rows: a Data was expected, this is None",
    ("recipes", "Recipe", "def rows(self, data): return dataclasses.replace(data, rows=())"): (
        "recipe acme, rows: it leaves no rows"
    ),
    ("recipes", "Recipe", "def examples(self, examples, setting): return []"): (
        "recipe acme, examples: a sequence of Examples, one at least, was expected, this is a list"
    ),
    ("recipes", "Recipe", "def batch(self, batch, moment): pass"): (
        "recipe acme, batch: a dict of tensors by their names was expected, this is None"
    ),
    ("recipes", "Recipe", "def around(self, moment): pass"): (
        "recipe acme, around: an AbstractContextManager was expected, this is None"
    ),
    ("recipes", "Recipe", "def term(self, batch, moment): return batch['input_ids']"): (
        "recipe acme, term: a Tensor of one floating-point number was expected, this is a Tensor of shape (4, 10)"
    ),
    ("schedules", "ParameterSchedule", "def rates(self, tensors, round, draw): return {'up': 1.0}"): (
        "schedule acme, rates: no tensor that trains is named 'up'"
    ),
    ("schedules", "ParameterSchedule", "def rates(self, tensors, round, draw): return dict.fromkeys(tensors, -1.0)"): (
        f"schedule acme, rates: the rate of {Q}.low_rank.0.down is -1.0: a number from 0 on was expected"
    ),
    ("schedules", "ParameterSchedule", "def start(self, parts, given): return []"): (
        "schedule acme, start: a dict of modifications by site path was expected, this is a list"
    ),
    ("schedules", "ParameterSchedule", "rounds = 'two'"): (
        "schedule acme, rounds: a whole number from 1 on was expected, this is 'two'"
    ),
}  # fmt: skip
PART = """
import dataclasses
import torch
from adapterhub import {kind}


class Acme({kind}):
    {hook}
"""


@pytest.mark.parametrize(("group", "kind", "hook"), PARTS, ids=range(len(PARTS)))
def test_what_the_other_parts_of_a_training_return_is_checked(installed, train, hub, group, kind, hook):
    installed(PART.format(kind=kind, hook=hook), **{group: "acme = Acme"})
    given = {"objectives": "objective", "recipes": "recipes", "schedules": "schedule"}[group]
    message, hint = refused(lambda: train(**{given: ["acme"] if group == "recipes" else "acme"}), hub)
    assert message == f"adapterhub-acme 0.1: {PARTS[group, kind, hook]}"
    if hook.startswith("def"):
        assert hint == "report it to the author of adapterhub-acme: adapterhub_acme.py:7"


MERGERS = {
    "return None": "a Tensor of shape (32, 32) was expected, this is None",
    "return deltas[0][0]": "a Tensor of shape (32, 32) was expected, this is a Tensor of shape (32,)",
    "return deltas[0] / 0": "the tensor 'the merged change' of shape (32, 32) holds NaN or infinite values",
    "return deltas[0] @ deltas[0][:3]": (
        "RuntimeError: mm: mat1 and mat2 shapes cannot be multiplied (32x32 and 3x32)"
    ),
}


@pytest.mark.parametrize(("body", "says"), MERGERS.items(), ids=range(len(MERGERS)))
def test_a_merger(installed, train, hub, body, says):
    hook = f"def combine(self, deltas, weights, config): {body}"
    installed(PART.format(kind="Merger", hook=hook), mergers="acme = Acme")
    from adapterhub.transform.merge import merge_modifications

    rule = plugins.load("mergers", "acme")
    one = {Q: [LowRank(down=torch.ones(4, 32), up=torch.ones(32, 4), scale=torch.tensor(1.0))]}
    with pytest.raises(PluginError) as caught:
        merge_modifications([one, one], [1.0, 1.0], make(rule), rule.Config())
    assert str(caught.value) == f"adapterhub-acme 0.1: merger acme, combine: {says}"


CODECS = {
    "def encode(self, tensors, config): return list(tensors)": (
        "encode: a dict of tensors by their names was expected, this is a list"
    ),
    "def encode(self, tensors, config): return {name: t.tolist() for name, t in tensors.items()}": (
        f"encode: a Tensor '{Q}.low_rank.0.down' was expected, this is a list"
    ),
    "encode = lambda self, tensors, config: {name: t.half() for name, t in tensors.items()}\n"
    "    def decode(self, tensors): return {name: t / 0 for name, t in tensors.items()}": (
        f"decode: the tensor '{Q}.low_rank.0.down' of shape (8, 32) holds NaN or infinite values"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("hook", "says"), CODECS.items(), ids=range(len(CODECS)))
def test_a_codec(installed, train, hub, hook, says):
    train(options={"target_modules": "q_proj", "layers_to_transform": [0]})
    installed(PART.format(kind="Codec", hook=hook), codecs="acme = Acme")
    with pytest.raises(PluginError) as caught:
        hub.compress("me/a", codec="acme", name="me/b")
    assert str(caught.value) == f"adapterhub-acme 0.1: codec acme, {says}"
    assert [row.name for row in hub.releases()] == ["me/a"]


def test_a_verifier(installed):
    installed(
        PART.format(kind="Verifier", hook="def verify(self, prompt, reference, answer): return 1.0"),
        verifiers="acme = Acme",
    )
    verifier = plugins.load("verifiers", "acme")
    with pytest.raises(PluginError, match="verifier acme, verify: a Verdict was expected, this is a float"):
        make(verifier, verifier.Config()).verify("p", "r", "a")


@pytest.mark.parametrize(("body", "says"), {
    "return '/nowhere'": "a folder that is there was expected, this is '/nowhere'",
    "return None": "a folder that is there was expected, this is None",
    "return open('/nowhere/at-all')": "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at-all'",
}.items())  # fmt: skip
def test_a_base(installed, body, says):

    installed(f"class Acme:\n    note = ''\n    def folder(self): {body}", bases="acme = Acme")
    with pytest.raises(PluginError) as caught:
        resolution.resolve("acme")
    assert str(caught.value) == f"adapterhub-acme 0.1: base acme, folder: {says}"


def test_options_that_no_one_can_read_are_the_packages_fault(installed):
    source = """
    from dataclasses import dataclass
    from adapterhub import Method

    class Acme(Method):
        @dataclass(frozen=True)
        class Config:
            r: int = 1
            def __post_init__(self):
                if self.r == 2: {}["no"]
                if self.r == 3: raise ValueError("r is not 3")
    """
    installed(source, methods="acme = Acme")
    config = plugins.load("methods", "acme").Config
    with pytest.raises(PluginError, match=r"^adapterhub-acme 0.1: method acme, Config: KeyError: 'no'$"):
        plugins.options(config, {"r": 2})
    with pytest.raises(UsageError, match="r is not 3"):  # the author's way to refuse a value
        plugins.options(config, {"r": "3"})


def test_a_form_that_falls_over_the_base(installed, tiny_model):
    source = """
    from adapterhub import Modification

    class Acme(Modification):
        form, stores = "acme", ("shift",)
        def bind(self, weight):
            self.length = weight.norm(dim=7)
    """
    installed(source, forms="acme = Acme")
    from adapterhub.adapters.fit import bind
    from adapterhub.sites import sites

    model = tiny_model()
    site = next(site for site in sites(model) if site.path == Q)
    with pytest.raises(PluginError, match=rf"^adapterhub-acme 0.1: form acme, bind, {Q}: IndexError") as caught:
        bind(plugins.load("forms", "acme")(shift=torch.zeros(32)), site, model)
    assert caught.value.hint.endswith("adapterhub_acme.py:6") and isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("error", [
    KeyboardInterrupt(), SystemExit(3), HubError("said already"), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), OSError(28, "No space left on device"),
    UserWarning("made an error by the user"),
])  # fmt: skip
def test_what_is_not_the_codes_fault_passes(error):
    with pytest.raises(type(error)) as caught, guard(LoRA, "build"):
        raise error
    assert caught.value is error


def test_the_outer_guard_adds_the_site_that_the_inner_one_did_not_know():
    with pytest.raises(PluginError) as caught, guard(Modification, "delta_out", Q), guard(LowRank, "delta_out"):
        raise ValueError("x")
    assert str(caught.value).endswith(f": form low_rank, delta_out, {Q}: ValueError: x")


def test_a_recipe_around_a_step_hides_no_error_and_is_left(installed):
    from adapterhub import Recipe
    from adapterhub.kinds import contracts

    left = []

    class Quiet(Recipe):
        def around(self, moment):
            class Context:
                def __enter__(self):
                    pass

                def __exit__(self, *error):
                    left.append(error[0])
                    return True

            from contextlib import AbstractContextManager

            AbstractContextManager.register(Context)
            return Context()

    with pytest.raises(ZeroDivisionError), contracts.around(make(Quiet, Quiet.Config()), None):
        1 / 0  # noqa: B018
    assert left == [ZeroDivisionError]


def test_what_a_form_gives_is_checked_where_it_is_called():
    x, y, step = torch.randn(2, 3, 4), torch.randn(2, 3, 5), Step()

    class Form(Modification):
        form = "odd"
        gives = None

        def delta_out(self, x, y, step):
            return self.gives

        delta_weight = scaled = lambda self, *given: self.gives
        join = rows = classmethod(lambda cls, parts: cls.gives)

    def says(gives, hook, *given):
        part = Form()
        Form.gives = gives
        with pytest.raises(PluginError) as caught:
            call(part if hook not in ("join", "rows") else Form, hook, *given, site=Q)
        assert caught.value.hint.endswith("tests/test_boundary.py:" + caught.value.hint.rpartition(":")[2])
        return str(caught.value).partition(f"{hook}, {Q}: ")[2]

    number = "a Tensor of floating-point numbers, or None, was expected, this is "
    assert says(1.0, "delta_out", x, y, step) == number + "of the type float"
    assert says(y.long(), "delta_out", x, y, step) == number + "a Tensor of int64 and shape (2, 3, 5)"
    assert says(x, "delta_out", x, y, step) == "a change of shape (2, 3, 5) was expected, this one is (2, 3, 4)"
    weight, bias = torch.randn(5, 4), torch.randn(5)
    assert says(weight, "delta_weight", weight, bias).startswith("a pair (ΔW, Δb) was expected, this is a Tensor")
    assert says((weight.mT, None), "delta_weight", weight, bias).startswith("a change of shape (5, 4) was expected")
    assert says((None, weight), "delta_weight", weight, bias).startswith("a change of shape (5,) was expected")
    for hook in ("scaled", "rows", "join"):
        wanted = "a Modification, or None, was expected, this is a Tensor of float32 and shape (5, 4)"
        assert says(weight, hook, []) == wanted
    Form.gives = torch.randn(5)  # the same for every token: it spreads, as it always has
    assert torch.equal(call(Form(), "delta_out", x, y, step), Form.gives.expand(2, 3, 5))
    Form.gives = None
    assert call(Form(), "delta_out", x, y, step) is None and call(Form, "join", []) is None
