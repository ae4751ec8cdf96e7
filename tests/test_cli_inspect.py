"""show --sites, inspect, explain and doctor: figures against NumPy, verdicts against what really happens."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.publish import publish_tensors
from adapterhub.analysis.sites import alike, by_layer, repeated, touched
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, IntegrityError, ManifestError
from adapterhub.forms.affine import Affine
from adapterhub.forms.gate import Gate
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.sites import sites
from adapterhub.spec.manifest import Made, Manifest, Parent
from adapterhub.testing.bed import random_adapter, tiny_llama
from adapterhub.testing.families import FAMILIES, tiny

FORMS = ("affine", "bottleneck", "dense", "dora", "low_rank", "prefix", "sparse")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_folder):
    return tiny_folder


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    """me/FORM: one of each form at every site that suits it; me/moved: a prefix that counts as positions; me/router: a
    gate over me/low-rank and me/affine."""
    hub = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True)
    model = tiny_llama()
    acts: set[str] = set()
    for seed, form in enumerate(FORMS):
        parts = random_adapter(plugins.load("forms", form), model, seed)
        put(hub, base, form.replace("_", "-"), parts)
        acts |= parts.keys() if form in ("low_rank", "affine") else set()
    torch.manual_seed(0)
    moved = Prefix(keys=torch.randn(2, 3, 8), values=torch.randn(2, 3, 8), shift=torch.tensor(3))
    put(hub, base, "moved", {f"model.layers.{n}.self_attn": [moved] for n in range(2)})
    router = {
        s.path: [Gate(weight=torch.randn(2, s.inputs), bias=torch.zeros(2))] for s in sites(model) if s.path in acts
    }
    weighed = [hub.resolve(f"me/{name}") for name in ("low-rank", "affine")]
    parents = [Parent(name=r.name, version=r.version, digest=r.digest, relation="gate") for r in weighed]
    put(hub, base, "router", router, parents=parents)
    return hub


def put(hub, base, name, parts, **more):
    record, sketch = fingerprint(base)
    return publish_tensors(hub, parts, name=f"me/{name}", base=record, sketch=sketch, **more)


@pytest.fixture
def run(capsys, monkeypatch, hub):
    """run("inspect me/a") -> (status, stdout, stderr), in the hub's folder."""
    monkeypatch.chdir(hub.root)
    monkeypatch.setenv("ADAPTERHUB_HOME", str(hub.root))

    def run(line, *more):
        capsys.readouterr()
        status = execute([*shlex.split(line), *map(str, more)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def weights(base):
    """{name: array} of the base's file, as NumPy reads it."""
    with safe_open(base / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118


def arrays(hub, name):
    """{tensor: array} of a release's file, as NumPy reads it."""
    release = hub.resolve(f"me/{name}")
    with safe_open(hub.store.path(release.manifest.files["tensors"].digest), "np") as file:
        return {key: file.get_tensor(key).astype(np.float64) for key in file.keys()}  # noqa: SIM118


# --- show --sites ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_sites_are_those_of_the_file(form, run, hub):
    name = form.replace("_", "-")
    document = json.loads(run(f"show me/{name} --sites --json")[1])
    stored = arrays(hub, name)
    told = {
        f"{site['path']}.{form}.0.{key}": tuple(tensor["shape"])
        for site in document["sites"]
        for part in site["parts"]
        for key, tensor in part["tensors"].items()
    }
    assert told == {key: array.shape for key, array in stored.items()}
    release = hub.resolve(f"me/{name}")
    tensors = Adapter.load(hub, release).tensors
    parts = [part for site in document["sites"] for part in site["parts"]]
    assert sum(p["numbers"] for p in parts) == sum(
        t.numel() for t in tensors.values() if t.is_floating_point() and t.ndim
    )
    assert sum(p["bytes"] for p in parts) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert run(f"show me/{name} --sites")[1].count("\n") < len(document["sites"]) + 2


def test_layers_are_one_row_and_ranks_a_span(run, hub, base):
    def low_rank(rank):
        return [LowRank(down=torch.ones(rank, 32), up=torch.ones(32, rank), scale=torch.tensor(1.0)), shift]

    shift = Affine.of(shift=torch.ones(32))
    put(hub, base, "ranks", {f"model.layers.{n}.self_attn.q_proj": low_rank(2 + 3 * n) for n in range(2)})
    (row,) = repeated(touched(hub, hub.resolve("me/ranks")))
    assert (row.pattern, row.sites, row.forms) == ("model.layers.*.self_attn.q_proj", 2, "low_rank r=2-5, affine")
    assert row.shapes == "down 2-5x32, up 32x2-5; shift 32"
    assert row.numbers == 7 * 64 + 2 * 32
    assert "low_rank r=2-5, affine" in run("show me/ranks --sites")[1]


def test_paths_sort_by_layer_and_the_first_number_is_the_layer():
    paths = ["h.10.mlp", "h.2.mlp", "h.2.attn"]
    assert sorted(paths, key=by_layer) == ["h.2.attn", "h.2.mlp", "h.10.mlp"]
    assert alike("encoder.block.3.layer.0.SelfAttention.q") == "encoder.block.*.layer.0.SelfAttention.q"
    assert alike("lm_head") == "lm_head" and alike("0.q4_proj.1") == "*.q4_proj.1"


def test_a_codec_that_packs_is_named_and_one_that_keeps_names_is_read(run, hub):
    hub.compress("me/low-rank", codec="compeft", name="me/packed")
    status, out, err = run("show me/packed --sites")
    assert status == 0 and "compeft" in err and "low_rank" in out and "x2" in out
    document = json.loads(run("show me/packed --sites --json")[1])
    assert document["codecs"] == ["compeft"]
    assert {part["form"] for site in document["sites"] for part in site["parts"]} == {"low_rank"}
    assert all(part["tensors"] is None for site in document["sites"] for part in site["parts"])
    hub.compress("me/low-rank", codec="svd", options={"rank": 2}, name="me/short")
    status, out, err = run("show me/short --sites")
    assert status == 0 and "svd" in err and "low_rank r=2" in out


def test_what_has_no_tensors_or_others_is_refused(run, hub, base):
    hub.compose("me/dora + me/affine", "me/both")
    for line in ("show me/both --sites", "inspect me/both"):
        status, out, err = run(line)
        assert (status, out) == (2, "") and "me/dora@0.1.0, me/affine@0.1.0" in err
    release = put(hub, base, "cut", {Q0: [Affine.of(shift=torch.ones(32))]})
    path = hub.store.path(release.manifest.files["tensors"].digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    try:
        assert run("show me/cut --sites")[0] == 4
    finally:
        path.write_bytes(whole)
    lying = hub.publish(
        adapterhub.spec.manifest.Manifest(
            name="me/lying", version="0.0.0", base=release.manifest.base, forms={Q0: ["dense"]}
        ),
        {"tensors": whole},
    )[0]
    with pytest.raises(IntegrityError, match="not those its manifest names"):
        touched(hub, lying)
    hub.remove("me/lying")


def test_a_forged_path_is_no_manifest(hub):
    """What a packed adapter's manifest says of its paths is foreign text, and a terminal obeys control characters."""
    packed = hub.compress("me/low-rank", codec="compeft", name="me/honest").manifest
    forms = {**packed.forms, "x\nproblem   base       \x1b[31mforged": ["low_rank"]}
    with pytest.raises(ManifestError, match="control characters"):
        Manifest.decode(msgspec.structs.replace(packed, name="me/forged", forms=forms).encode())


def test_show_sites_imports_no_torch(hub):
    code = (
        "import sys\nfrom adapterhub.cli.app import execute\n"
        "status = execute(['show', 'me/low-rank', '--sites'])\nprint(status, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "ADAPTERHUB_HOME": str(hub.root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    out = done.stdout
    assert out.splitlines()[-1] == "0 False"


# --- inspect --------------------------------------------------------------------------------------------------------


def change(form, key, t, w):
    """ΔW by the papers' formulas in float64."""
    match form:
        case "low_rank":
            return t("scale") * t("up") @ t("down")
        case "dense":
            return t("weight")
        case "sparse":
            flat = np.zeros(w.size)
            flat[t("index").astype(int)] = t("values")
            return flat.reshape(w.shape)
        case "dora":
            v = w + t("scale") * t("up") @ t("down")
            return t("magnitude")[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
        case "affine":
            return w * t("gain") if t("side") else w * t("gain")[:, None]


@pytest.mark.parametrize("form", ["affine", "dense", "dora", "low_rank", "sparse"])
def test_norms_and_ranks_are_those_of_numpy(form, hub, base):
    name = form.replace("_", "-")
    stored, own = arrays(hub, name), weights(base)
    checked = 0
    for entry in hub.inspect(f"me/{name}", base)["sites"]:
        path = entry["path"]
        w = own.get(f"{path}.weight")
        if w is None or w.ndim != 2:
            assert entry["weight"] is None and set(entry["tensors"]) == {"gain", "shift"}
            continue
        w = w.T if entry["role"] == "embedding" else w  # its weight maps one-hot ids: (width, vocabulary)
        delta = change(form, path, lambda key, path=path: stored[f"{path}.{form}.0.{key}"], w)
        s = np.linalg.svd(delta, compute_uv=False)
        energy = np.cumsum(s**2) / (s**2).sum()
        got = entry["weight"]
        assert got["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert got["relative"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w), rel=1e-5)
        assert got["shape"] == list(w.shape)
        assert got["rank"] == (
            4 if form == "low_rank" else min(w.shape) if form != "sparse" else np.linalg.matrix_rank(delta)
        )
        assert got["energy_rank"] == int(np.searchsorted(energy, 0.9)) + 1
        if form == "affine":
            side, shift = stored[f"{path}.affine.0.side"], stored[f"{path}.affine.0.shift"]
            assert entry["bias"]["norm"] == pytest.approx(np.linalg.norm(w @ shift if side else shift), rel=1e-6)
            assert entry["bias"]["relative"] is None  # this base has no biases
        checked += 1
    assert checked >= 14


def test_without_a_base_norms_are_absolute_and_what_needs_it_says_so(hub, run):
    entries = {e["path"]: e for e in hub.inspect("me/low-rank")["sites"]}
    stored = arrays(hub, "low-rank")
    delta = change("low_rank", Q0, lambda key: stored[f"{Q0}.low_rank.0.{key}"], None)
    assert entries[Q0]["weight"]["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert entries[Q0]["weight"]["relative"] is None and entries[Q0]["role"] is None
    for name, learned in (("dora", {"down", "up", "magnitude"}), ("affine", {"gain", "shift"})):
        for entry in hub.inspect(f"me/{name}")["sites"]:
            assert entry["weight"] is None and set(entry["tensors"]) == learned and "base's own weight" in entry["note"]
    assert "--base" in run("inspect me/dora")[2]


@pytest.mark.parametrize("form", ["bottleneck", "prefix"])
def test_what_is_no_change_of_a_weight_is_told_by_its_tensors(form, hub, base):
    stored = arrays(hub, form)
    for entry in hub.inspect(f"me/{form}", base)["sites"]:
        assert entry["weight"] is None and entry["bias"] is None and entry["note"]
        assert set(entry["tensors"]) == (
            {"keys", "values"} if form == "prefix" else {"down", "down_bias", "up", "up_bias"}
        )
        for key, got in entry["tensors"].items():
            array = stored[f"{entry['path']}.{form}.0.{key}"]
            assert got["shape"] == list(array.shape)
            assert got["norm"] == pytest.approx(np.linalg.norm(array), rel=1e-6)
            assert got["rms"] == pytest.approx(np.sqrt(np.mean(array**2)), rel=1e-6)


def test_columns_of_a_fused_projection_are_held_against_their_own_part(tmp_path, tiny_saved):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    folder = tiny_saved(tmp_path / "gpt2", model)
    hub = adapterhub.open(tmp_path / "hub", create=True)
    low = LowRank(down=torch.randn(2, 32), up=torch.randn(32, 2), scale=torch.tensor(0.5))
    path = "transformer.h.0.attn.c_attn.key"
    put(hub, folder, "key", {path: [low, Affine.of(shift=torch.full((32,), 0.5))]})
    first, second = hub.inspect("me/key", folder)["sites"]
    stored, own = arrays(hub, "key"), weights(folder)
    name = next(key for key in own if key.endswith("h.0.attn.c_attn.weight"))
    w, b = (
        own[name].T[32:64],
        own[name.replace("weight", "bias")][32:64],
    )  # a Conv1D: (inputs, outputs), and q, k, v in blocks
    delta = change("low_rank", path, lambda key: stored[f"{path}.low_rank.0.{key}"], w)
    assert first["weight"]["relative"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w), rel=1e-5)
    assert second["bias"]["relative"] == pytest.approx(0.5 * 32**0.5 / np.linalg.norm(b), rel=1e-5)
    explained = hub.explain("me/key", folder)
    assert explained["runs"], explained


def test_another_base_is_refused_before_its_weights_are_read(run, hub, tiny_saved, tiny_model, tmp_path, monkeypatch):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=5))
    with monkeypatch.context() as patched:
        patched.setattr("adapterhub.bases.loading.load_model", lambda *_: pytest.fail("the weights were loaded"))
        status, out, err = run("inspect me/low-rank --base", other)
    assert (status, out) == (1, "") and "another model" in err
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, out, err = run("inspect me/low-rank --force --base", other)
    assert status == 0 and any("forced" in str(w.message) for w in caught)


def test_the_table_has_medians_the_largest_and_the_ten_strongest(run, hub, base):
    document = json.loads(run("inspect me/low-rank --json --base", base)[1])
    relative = {e["path"]: e["weight"]["relative"] for e in document["sites"]}
    out = run("inspect me/low-rank --base", base)[1]
    downs = [relative[f"model.layers.{n}.mlp.down_proj"] for n in range(2)]
    row = next(line.split() for line in out.splitlines() if line.startswith("model.layers.*.mlp.down_proj"))
    assert row[1:6] == ["x2", "low_rank", "weight", "relative", f"{np.median(downs):.3g}"]
    assert row[6:] == [f"{max(downs):.3g}", f"model.layers.{np.argmax(downs)}.mlp.down_proj", "4", row[-1]]
    strongest = re.findall(r"^(\S+) +low_rank +(\S+) +(#+)$", out, re.MULTILINE)
    expected = sorted(relative.items(), key=lambda item: -item[1])[:10]
    assert [path for path, *_ in strongest] == [path for path, _ in expected]
    for (_, value, bar), (_, exact) in zip(strongest, expected, strict=True):
        assert value == f"{exact:.3g}" and len(bar) == round(24 * exact / expected[0][1])


# --- explain --------------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    "me/low-rank",
    "me/low-rank + 0.5*me/sparse - me/dense",
    "me/dora + me/bottleneck",
    "mix(0.3*me/affine, me/bottleneck)",
    "me/prefix + me/moved",
    "0.5*me/prefix",
    "0.5*me/moved",
    "mix(me/moved, me/low-rank)",
    "me/moved@9.0.0",
    "me/low-rnak",
    "me/low-rank +me/dora",
    "me/router",
    "gate(me/router, me/affine, me/low-rank)",
    "gate(me/router, me/low-rank, me/prefix)",
    "gate(me/router, me/low-rank)",
    "gate(me/dora, me/low-rank)",
    "0.5*me/low-rank + me/router",
    "logits(base + me/low-rank - 0.5*me/bottleneck)",
    "logits(base + me/moved)",
    "logits(2*base)",
    "me/low-rank + logits(base)",
]


def really(hub, expression, base):
    """(does it run, does it fold) on the base itself, by doing it."""
    try:
        model = hub.load(base, expression)
        model(input_ids=torch.arange(5)[None])
    except HubError:
        return False, False
    try:
        model.fold()
    except HubError:
        return True, False
    return True, True


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_verdicts_are_what_happens(expression, hub, base, monkeypatch):
    runs, folds = really(hub, expression, base)
    monkeypatch.setattr("adapterhub.bases.loading.load_model", lambda *_: pytest.fail("the weights were loaded"))
    told = hub.explain(expression, base)
    assert told["runs"] is runs, told
    assert bool(told["next"])
    if runs:
        (folding,) = (step for step in told["steps"] if step["name"] == "folding")
        assert (folding["state"] == "ok") is folds, folding


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rehearsed(family, tmp_path, capfd):
    """Images and sounds too; what is said of folding is what happens."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    hub = adapterhub.open(tmp_path / "hub", create=True)
    for name in ("low_rank", "prefix", "bottleneck"):
        put(hub, tmp_path / "base", name.replace("_", "-"), random_adapter(plugins.load("forms", name), model, 0))
    put(hub, tmp_path / "base", "block", {s.path: [LowRank.random(s)] for s in sites(model) if s.role == "query"})
    capfd.readouterr()
    for expression in ("me/low-rank + 0.5*me/prefix + me/bottleneck", "me/low-rank", "me/block"):
        told = hub.explain(expression, tmp_path / "base")
        states = {step["name"]: step["state"] for step in told["steps"]}
        assert told["runs"] and states["rehearsal"] == "ok", told
        loaded = hub.load(tmp_path / "base", expression)
        try:
            loaded.fold()
            assert states["folding"] == "ok"
        except HubError:
            assert states["folding"] == "note"
    strong = hub.inspect("me/block", tmp_path / "base")["sites"]
    assert strong and all(entry["weight"]["relative"] > 0 for entry in strong)


def test_a_prefix_that_moves_positions_where_none_are_taken_is_a_problem(tmp_path):
    model = tiny("roberta")
    model.save_pretrained(tmp_path / "base")
    hub = adapterhub.open(tmp_path / "hub", create=True)
    for shift in (0, 3):
        parts = {
            site.path: [Prefix(keys=torch.ones(4, 3, 8), values=torch.ones(4, 3, 8), shift=torch.tensor(shift))]
            for site in sites(model)
            if site.role == "attention"
        }
        put(hub, tmp_path / "base", f"moved{shift}", parts)
        told = hub.explain(f"me/moved{shift}", tmp_path / "base")
        assert told["runs"] is really(hub, f"me/moved{shift}", tmp_path / "base")[0] is (not shift)
    assert [s["name"] for s in told["steps"] if s["state"] == "problem"] == ["rehearsal"]


def test_another_base_is_a_problem_and_one_of_other_shapes_too(hub, base, tiny_saved, tiny_model, tmp_path):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=5))
    told = hub.explain("me/low-rank", other)
    assert not told["runs"] and not really(hub, "me/low-rank", other)[0]
    assert [s["name"] for s in told["steps"] if s["state"] == "problem"] == ["base"]
    assert base.name in told["next"]
    wide = tiny_saved(tmp_path / "wide", tiny_model(hidden_size=64))
    told = hub.explain("me/low-rank", wide)
    assert {s["name"] for s in told["steps"] if s["state"] == "problem"} == {"base", "fit"}
    copy = tiny_saved(tmp_path / "copy", tiny_model().to(torch.float16))
    told = hub.explain("me/low-rank", copy)
    (verdict,) = (step for step in told["steps"] if step["name"] == "base")
    assert told["runs"] and verdict["state"] == "note" and "rounded" in verdict["told"]
    told = hub.explain("me/low-rank", tmp_path / "nowhere")
    assert not told["runs"] and told["next"]


@pytest.mark.parametrize(
    "names",
    ["low-rank low-rank", "low-rank sparse", "dense affine", "low-rank dora", "low-rank bottleneck", "dense prefix"],
)
@pytest.mark.parametrize("weights", [(2, 1), (1, 0.5)])
def test_what_is_said_of_merging_is_what_merge_does(names, weights, hub, base):
    one, two = names.split()
    told = next(
        s["told"]
        for s in hub.explain(f"{weights[0]}*me/{one} + {weights[1]}*me/{two}")["steps"]
        if s["name"] == "merging"
    )
    settings = {"weights": list(weights), "name": "me/merged"}
    command = f"merge me/{one}@0.1.0 me/{two}@0.1.0 --weights {weights[0]:g},{weights[1]:g} --name NAME"
    try:
        hub.merge([f"me/{one}", f"me/{two}"], **settings)
    except HubError:
        if told.startswith("it does not merge"):
            assert two in told
            with pytest.raises(HubError):
                hub.merge([f"me/{one}", f"me/{two}"], base=base, **settings)
        else:
            assert told.endswith(f"{command} --base NAME")
            hub.merge([f"me/{one}", f"me/{two}"], base=base, **settings)
    else:
        assert told.endswith(command)


def test_columns_of_a_fused_projection_have_a_place_among_what_is_done_to_the_whole_of_it(hub):
    model = tiny("gpt2")
    places, known = {site.path: site for site in sites(model)}, fingerprint(model)
    whole, query, key = (places[f"transformer.h.0.attn.c_attn{name}"] for name in ("", ".query", ".key"))
    for name, site in (("me/whole", whole), ("me/query", query), ("me/key", key)):
        part = LowRank.random(site) if site is whole else Affine.of(gain=torch.ones(site.outputs))
        publish_tensors(hub, {site.path: [part]}, name=name, base=known.base, sketch=known.sketch)

    def state(expression):
        return next(step["state"] for step in hub.explain(expression)["steps"] if step["name"] == "order")

    assert state("me/query + me/whole") == "note" and state("me/query + me/key") == "ok"


def test_what_commutes_is_what_gives_the_same_in_either_order(hub, base):
    names = ("low-rank", "sparse", "dora", "bottleneck", "affine", "prefix")
    ids = torch.arange(6)[None]
    model = hub.load(base, dtype="float32")
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            (step,) = (s for s in hub.explain(f"me/{one} + me/{two}")["steps"] if s["name"] == "order")
            a, b = (model(input_ids=ids, adapters=e).logits for e in (f"me/{one} + me/{two}", f"me/{two} + me/{one}"))
            same = bool(((a - b).abs().max() / a.abs().max()) < 1e-4)
            assert (step["state"] == "ok") is same, (one, two, step)
    mixed = next(s for s in hub.explain("mix(me/bottleneck, me/affine)")["steps"] if s["name"] == "order")
    assert mixed["state"] == "ok"


def test_the_program_is_a_tree_and_each_site_says_what_runs_there(run, hub):
    hub.compose("0.5*me/low-rank + me/bottleneck", "me/pair")
    status, out, err = run("explain 'me/pair - me/prefix'")
    assert status == 0 and "explain 'me/pair - me/prefix' --base" in err
    lines = [line.strip() for line in out.splitlines()]
    tree = lines[lines.index("stack, one after the other") :][:7]
    assert tree == [
        "stack, one after the other",
        "me/pair@0.1.0: 0.5*me/low-rank@0.1.0 + me/bottleneck@0.1.0",
        "stack, one after the other",
        "0.5 times the change of",
        "me/low-rank@0.1.0 (low_rank)",
        "me/bottleneck@0.1.0 (bottleneck)",
        "-1 times the change of",
    ]
    assert "model.embed_tokens x1  0.5*me/low-rank@0.1.0: low_rank" in lines
    assert "no static cache" in out


def test_a_part_that_is_not_installed_is_told_with_its_package(run, hub, base):
    record = hub.resolve("me/low-rank").manifest.base
    made = Made(name="warp", distribution="adapterhub-loreft 1.2.0")
    manifest = adapterhub.spec.manifest.Manifest(
        name="me/warped", version="0.0.0", base=record, method=made, forms={Q0: ["warp"]}
    )
    hub.publish(manifest, {"tensors": b"\x02\0\0\0\0\0\0\0{}"})
    try:
        status, out, err = run("explain me/warped --base", base)
        assert status == 1 and "adapterhub-loreft 1.2.0" in err.splitlines()[-1]
        status, out, err = run("doctor")
        problem = next(line for line in out.splitlines() if line.startswith("problem:"))
        assert (
            status == 1
            and "me/warped@0.1.0" in problem
            and "'warp'" in problem
            and "adapterhub-loreft 1.2.0" in problem
        )
    finally:
        hub.remove("me/warped")


def test_a_parent_that_is_not_beneath_is_a_note(hub, base):
    parent = hub.resolve("me/low-rank")
    over = Parent(name=parent.name, version=parent.version, digest=parent.digest, relation="on")
    put(hub, base, "over", {Q0: [Affine.of(shift=torch.ones(32))]}, parents=[over])

    def state(expression):
        told = hub.explain(expression)
        assert told["runs"]
        return next(s for s in told["steps"] if s["name"] == "parents")["state"]

    assert (state("me/over"), state("me/low-rank + me/over")) == ("note", "ok")


def test_explain_as_json_and_its_exit_status(run, base):
    status, out, _ = run("explain me/low-rank --json --base", base)
    document = json.loads(out)
    assert status == 0 and document["runs"] and document["schema_version"] == 1
    assert document["next"].startswith("adapterhub run me/low-rank --base ")
    status, out, _ = run("explain 'me/low-rank +x' --json")
    document = json.loads(out)
    assert status == 1 and [s["state"] for s in document["steps"]] == ["problem"]
    assert document["next"] == document["steps"][0]["hint"] != ""


def test_gates_and_ensembles_are_shown_as_what_they_weigh(hub, base):
    def step(expression, name):
        return next(s for s in hub.explain(expression)["steps"] if s["name"] == name)

    tree = [line.strip() for line in step("logits(me/router - 0.5*base)", "program")["details"]]
    assert tree == [
        "logits, the weighted sum (1, -0.5) of what these models put out",
        "gate me/router@0.1.0, which weighs at every token",
        "me/low-rank@0.1.0 (low_rank)",
        "me/affine@0.1.0 (affine)",
        "the bare base",
    ]
    (line,) = (x for x in step("me/router", "sites")["details"] if x.startswith("model.norm "))
    assert line == "model.norm x1  gate(me/router@0.1.0, me/low-rank@0.1.0, me/affine@0.1.0): gate; affine"
    lanes = step("logits(me/low-rank - 0.5*me/prefix)", "sites")["details"]
    assert "model.layers.*.self_attn x2  logits(base - 0.5*me/prefix@0.1.0): prefix" in lanes
    assert "composer gate" in " ".join(step("me/router", "parts")["details"])
    assert "2 lanes" in step("logits(base - me/dora)", "running")["details"][0]
    assert step("logits(base - me/dora)", "merging")["state"] == step("me/router", "merging")["state"] == "note"
    assert "me/router" in step("me/router", "folding")["told"]
    entries = hub.inspect("me/router", base)["sites"]
    assert {e["form"] for e in entries} == {"gate"} and all(set(e["tensors"]) == {"weight", "bias"} for e in entries)


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_names_the_package_of_each_part(run):
    status, out, _ = run("doctor --json")
    document = json.loads(out)
    assert (status, document["problems"]) == (0, [])
    ours = next(line for line in document["facts"]["forms"] if line.startswith("adapterhub 0"))
    assert set(FORMS) <= set(ours.partition(": ")[2].split())
    assert any(re.match(r"adapterhub-loreft \S+: .*subspace", line) for line in document["facts"]["forms"])


def test_doctor_tells_a_version_that_is_too_old(run, monkeypatch):
    from adapterhub.analysis import doctor

    monkeypatch.setattr(
        doctor, "requires", lambda _: ["msgspec>=999", "numpy>=1", "nothing-such>=1", "x>1; extra == 'y'"]
    )
    status, out, _ = run("doctor")
    told = [line for line in out.splitlines() if line.startswith("problem:")]
    assert status == 1 and len(told) == 2 and "msgspec" in told[0] and "nothing-such" in told[1]
