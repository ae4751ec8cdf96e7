"""The command line: every command on a tiny base, exit statuses, JSON, and what it does with foreign text."""

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
import typer

import adapterhub
from adapterhub import errors
from adapterhub.cli.app import app, execute, main
from adapterhub.cli.output import clean, size, table
from adapterhub.errors import HubError
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest

ADAPTERHUB = [sys.executable, "-m", "adapterhub"]


def commands(group=None, path=()):
    """((names), command) of every command, those of groups included."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub; the working directory is its folder."""
    hub = adapterhub.open(tmp_path / "hub", create=True)
    monkeypatch.chdir(hub.root)
    return hub


@pytest.fixture
def put(hub):
    """put("me/x", size of its one tensor in bytes, **manifest fields) -> Release."""

    def put(name="me/x", count=7, base="tiny", **fields):
        header = json.dumps({"t": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(count)
        made_for = Base(name=base, architecture="llama", structure=digest_of(b"s"), sketch=File(digest="", size=0))
        fields = {"method": Made(name="lora", options={"r": 8})} | fields
        manifest = Manifest(name=name, version="0.0.0", base=made_for, **fields)
        return hub.publish(manifest, {"tensors": content}, b"rows")[0]

    return put


@pytest.fixture
def run(capsys):
    """run("list --json") -> (status, stdout, stderr); the arguments as a shell would split them."""

    def run(line, *more):
        capsys.readouterr()
        status = execute([*shlex.split(line), *map(str, more)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


# --- the face -------------------------------------------------------------------------------------------------------


def test_the_fixed_commands_are_there():
    fixed = (
        "init train eval import export merge compress compose run chat install list ls show rm verify doctor tag demo"
    )
    assert {(name,) for name in fixed.split()} <= set(COMMANDS)
    assert {("plugins", name) for name in ("list", "check", "new")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_that_parses(path, run):
    help = COMMANDS[path].help
    assert len(help.partition("\n\n")[0].splitlines()) == 1
    example = help.partition("Example:\n")[2].replace("\\\n", " ").partition("&&")[0]
    words = shlex.split(example)
    assert words[: len(path) + 1] == ["adapterhub", *("list" if name == "ls" else name for name in path)]
    COMMANDS[path].make_context(path[-1], words[len(path) + 1 :])
    status, out, err = run(f"{' '.join(path)} --help")
    assert (status, err) == (0, "") and "Example" in out


def test_no_help_loses_words_to_markup(run):
    for path, command in COMMANDS.items():
        for parameter in command.params:
            assert "[" not in (parameter.help or ""), (path, parameter.name)


def test_no_arguments_is_help_and_version_is_the_distributions(run):
    from importlib.metadata import version

    assert run("")[1].strip() == run("--help")[1].strip() != ""
    assert run("plugins")[0] == 0
    assert run("--version") == (0, f"adapterhub {version('adapterhub')}\n", "")


def test_the_table_of_exit_statuses_is_whole(run):
    told = {int(n) for n in re.findall(r"(\d+)  \w", run("--help")[1].partition("Exit status")[2])}
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HubError)}
    assert told == {0, 130, 141, 143} | codes


# --- exit statuses, each by what causes it --------------------------------------------------------------------------


def test_1_failed(run, put):
    put("me/a")
    assert run("rm me/a")[0] == 0
    assert run("init /dev/null/hub")[0] == 1


def test_2_an_expression_that_does_not_parse(run, put):
    put("me/a")
    status, _, err = run("compose 'me/a +me/a' --name me/b")
    assert status == 2 and "^" in err


@pytest.mark.parametrize(
    "line",
    [
        "trian",
        "train",
        "list --nonsense",
        "show me/X",
        "tag me/a UPPER",
        "merge me/a --weights 1,x --name me/b",
        "compress me/a --codec svd --set rank --name me/b",
        "compress me/a --codec svd --set rank=1 --set rank=2 --name me/b",
        "train --data d.jsonl --method lora --name me/b",
        "run me/a --base b --prompt p --max-new-tokens 0",
        "plugins new Shouting",
        "run me/a --base b --prompt p --temperature 1 --seed 1180591620717411303424",
        "run me/a --base b --prompt p --temperature 1e-50",
        "run me/a --base b --prompt p --temperature nan",
        "chat me/a --base b --temperature inf",
        "run me/a --base b --prompt p\udcff",
    ],
)
def test_2_wrong_use(line, run, put):
    put("me/a")
    status, out, err = run(line)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .+\nhint: .+\n", err)


@pytest.mark.parametrize(
    "line", ["show me/none", "rm me/none", "tag me/none x", "install no/folder", "show me/a@9.0.0"]
)
def test_3_not_found(line, run, put):
    put("me/a")
    status, out, err = run(line)
    assert (status, out) == (3, "")
    assert err.startswith("error: ") and "\nhint: " in err


def test_4_damaged_bytes(run, put, hub):
    release = put("me/a")
    assert run("verify")[0] == 0
    blob = hub.store.path(release.manifest.files["tensors"].digest)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"z")
    status, out, _ = run("verify")
    assert status == 4 and str(blob) in out and "me/a@0.1.0" in out
    status, out, _ = run("verify --json")
    assert status == 4
    (problem,) = json.loads(out)["problems"]
    assert problem["path"] == str(blob) and problem["releases"] == ["me/a@0.1.0"]


def test_5_refused_as_unsafe(run, tmp_path, hub):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "weights.bin").write_bytes(b"\x80\x04.")
    status, _, err = run("install", folder)
    assert status == 5 and "pickle" in err


def test_130_interrupted(hub):
    command = [*ADAPTERHUB, "run", "--base", "none", "--prompt", "-"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as process:
        process.stdin.write(b"x" * (1 << 20))  # more than a pipe holds: once this returns, the command is reading
        for _ in range(15):  # again, should it come between two reads
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
                break
        assert process.returncode == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_bug_keeps_its_traceback_and_says_so(run, hub, monkeypatch):
    monkeypatch.setattr(adapterhub, "open", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run("list")
    assert "bug in adapterhub" in caught.value.__notes__[0]


def test_what_the_machine_refuses_is_no_bug(run, tmp_path, hub):
    (tmp_path / "file").touch()
    status, _, err = run("init", tmp_path / "file" / "hub")
    assert status == 1 and err.startswith("error: ")
    with open("/dev/full", "w") as full:
        result = subprocess.run([*ADAPTERHUB, "plugins", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (1, 2)
    assert result.stderr.startswith("error: No space left on device")


def test_a_name_too_long_for_the_machine(run, hub):
    status, _, err = run("init", "x" * 300)
    assert status == 1 and err.startswith("error: ")


def test_a_closed_stdout_is_quiet(hub):
    result = subprocess.run(["sh", "-c", f"{shlex.join(ADAPTERHUB)} list >&-"], stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1) and "Traceback" not in result.stderr


def test_a_prompt_that_is_not_utf8(run, hub, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    status, _, err = run("run --base b --prompt -")
    assert status == 2 and "UTF-8" in err


def test_a_minus_at_the_start_is_explained(run, hub):
    assert "parentheses" in run("run -1*me/a --base b --prompt p")[2]
    assert "No such option" not in run("run (-1*me/a) --base b --prompt p")[2]
    assert "No such option" not in run("run --base b --prompt p -- -1*me/a")[2]


def test_a_reader_that_goes_away_is_quiet(hub):
    process = subprocess.Popen([*ADAPTERHUB, "plugins", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_errors_as_json(run, hub):
    status, out, err = run("show me/none --json")
    document = json.loads(err)
    assert (status, out, document["schema_version"]) == (3, "", 1)
    assert document["error"]["kind"] == "NotFound" and document["error"]["code"] == 3
    assert "me/none" in document["error"]["message"] and document["error"]["hint"]
    assert json.loads(run("train --json")[2])["error"] == {
        "kind": "UsageError",
        "message": "Missing option '--data'.",
        "hint": "see adapterhub train --help",
        "code": 2,
    }


# --- releases -------------------------------------------------------------------------------------------------------


def test_init_makes_a_hub_and_prints_where(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("init new")
    assert status == 0 and (tmp_path / "new" / "hub.db").is_file() and out.strip().endswith("new")


def test_list_of_nothing_is_no_output(run, hub):
    assert run("list")[:2] == (0, "")
    assert json.loads(run("list --json")[1])["releases"] == []


def test_list_is_aligned_and_complete(run, put):
    put("me/a", 1500)
    put("me/a", 1600)
    put("owner-with-a-long-name/adapter-with-a-long-name", base="base" * 20)
    run("tag me/a@0.1.0 stable")
    status, out, err = run("list")
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 4)
    assert [line.split()[:2] for line in lines[1:3]] == [["me/a", "0.2.0"], ["me/a", "0.1.0"]]
    assert "stable" in lines[2] and lines[1].endswith("1.7 kB") and "base" * 20 in lines[3]
    assert len({line.index(word) for line, word in zip(lines[1:], ["0.2.0", "0.1.0", "0.1.0"], strict=True)}) == 1
    assert run("ls")[1] == out


def test_list_as_json(run, put, hub):
    release = put("me/a")
    document = json.loads(run("list --json")[1])
    (row,) = document["releases"]
    assert document["schema_version"] == 1 and document["hub"] == str(hub.root)
    assert row | {"created": ""} == {
        "name": "me/a",
        "version": "0.1.0",
        "digest": release.digest,
        "method": "lora",
        "base": "tiny",
        "size": release.manifest.files["tensors"].size,
        "created": "",
        "yanked": None,
        "tags": [],
    }


def test_show_tells_what_the_manifest_says(run, put):
    release = put("me/a", forms={"q": ["low_rank"], "v": ["low_rank", "bottleneck"]}, metrics={"loss": 1.5})
    out = run("show me/a")[1]
    for said in ("me/a@0.1.0", release.digest, "tiny (llama)", "lora (r=8)", "2 low_rank, 1 bottleneck", "loss = 1.5"):
        assert said in out
    document = json.loads(run("show me/a --json")[1])
    assert document["digest"] == digest_of(
        json.dumps(document["manifest"], sort_keys=True, separators=(",", ":")).encode()
    )


def test_show_prints_no_line_that_a_manifest_forged(run, put):
    put("me/a", recipe={"seed\nlicence:    ": "MIT\u2028digest: x"})
    out = run("show me/a")[1]
    assert re.findall("^licence:.*", out, re.M) == ["licence:    not stated"]
    assert "\u2028" not in out


def test_tag_rm_install(run, put, hub, tmp_path, monkeypatch):
    put("me/a")
    assert run("tag me/a stable")[:2] == (0, "me/a@0.1.0\n")
    assert run("show me/a@stable")[0] == 0
    adapterhub.open(tmp_path / "other", create=True)
    monkeypatch.chdir(tmp_path / "other")
    status, out, _ = run(f"install {hub.root}:me/a@stable --json")
    assert status == 0 and json.loads(out)["releases"][0]["name"] == "me/a"
    assert run("export me/a --format bundle", tmp_path / "bundle")[0] == 0
    assert run("rm me/a")[:2] == (0, "me/a@0.1.0\n")
    assert run("list")[1] == ""
    assert run("install", tmp_path / "bundle")[0] == 0
    assert "me/a" in run("list")[1]


# --- foreign text and terminals -------------------------------------------------------------------------------------


def test_D11_no_control_character_of_a_manifest_reaches_the_terminal(run, put):
    # A manifest with such a name, base or licence is refused; what its maker measured and set may be anything.
    method = Made(name="lora", options={"\x1b]0;title\x07": "\x1b[31mred\u202etxt[bold]"})
    put("me/a", method=method, recipe={"\x9b2J": "a\rb\nc"})
    for line in ("list", "show me/a", "list --json", "show me/a --json"):
        out = run(line)[1]
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out), line
    assert r"\x1b[31mred\u202etxt[bold]" in run("show me/a")[1]


def test_clean_keeps_every_script_and_line():
    text = "naïve 日本語 می\u200cخواهم 👩\u200d💻\n\tend"
    assert clean(text) == text
    assert clean("a\x1b[2J\x00\x08\u2066b") == r"a\x1b[2J\x00\x08\u2066b"


def test_table_and_size(capsys):
    table(("A", "LONGER"), [("a\nb", 1), ("x", "")])
    assert capsys.readouterr().out == "A    LONGER\na b  1\nx\n"
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5 * 10**12)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "5000.0 GB"]


def said_on_a_terminal(*arguments, **environment):
    """What a command writes when its stdout is a terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen([*ADAPTERHUB, *arguments], stdout=its, stderr=its, env={**os.environ, **environment})
    os.close(its)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait(30) == 0
    return said


def test_colour_only_on_a_terminal_and_not_with_no_color():
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-9]")
    piped = subprocess.run([*ADAPTERHUB, "--help"], capture_output=True, check=True).stdout
    assert b"\x1b" not in piped
    assert colour.search(said_on_a_terminal("--help", TERM="xterm-256color"))
    assert not colour.search(said_on_a_terminal("--help", TERM="xterm-256color", NO_COLOR="1"))


# --- plugins --------------------------------------------------------------------------------------------------------


def test_plugins_list_and_show(run):
    from importlib.metadata import version

    listed = json.loads(run("plugins list --json")[1])["plugins"]
    ours = {"distribution": f"adapterhub {version('adapterhub')}", "enabled": True}
    assert {"group": "methods", "name": "lora", **ours} in listed
    theirs = {"distribution": "adapterhub-loreft 0.1.0", "enabled": True}
    assert {"group": "forms", "name": "subspace", **theirs} in listed
    out = run("plugins show lora")[1]
    assert re.search(r"^lora_alpha +float +16$", out, re.M) and "adapterhub" in out
    assert run("plugins show nothing")[0] == 3


# --- a tiny base ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path, tiny_model):
    """lora(seed, r) -> the folder of a random PEFT LoRA on the tiny base, which moves its logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    def make(seed, r=2):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model(), LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=False))
        folder = tmp_path / f"peft-{seed}"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def rows(tmp_path):
    lines = [{"prompt": f"{n} is ", "completion": "odd" if n % 2 else "even"} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_import_run_eval_merge_compress_compose_export(run, hub, lora, rows, tiny_folder, tmp_path):
    base = f"--base {shlex.quote(str(tiny_folder))}"
    for name, seed in (("me/a", 1), ("me/b", 2)):
        status, out, err = run(f"import {lora(seed)} --name {name} {base} --licence MIT")
        assert status == 0, err
        assert out.startswith(f"{name}@0.1.0  ")
    merged = json.loads(run("merge me/a me/b --weights 1,0.5 --name me/c --json")[1])["releases"]
    assert [(r["name"], r["version"]) for r in merged] == [("me/c", "0.1.0")]
    assert hub.resolve("me/c").manifest.recipe["weights"] == [1.0, 0.5]
    status, out, err = run("compress me/a --codec svd --set rank=1 --name me/small")
    assert status == 0, err
    assert hub.resolve("me/small").manifest.codecs[0].options["rank"] == 1
    assert run("compose '0.5*me/a + me/b' --name me/stack")[0] == 0
    assert hub.resolve("me/stack").manifest.compose == "0.5*me/a@0.1.0 + me/b@0.1.0"

    texts = {}
    for expression in ("", "me/a", "me/stack", "'0.5*me/a + me/b'"):
        status, out, err = run(f"run {expression} {base} --prompt '3 is ' --max-new-tokens 8 --json")
        assert status == 0, err
        texts[expression] = json.loads(out)["completion"]
    assert texts["me/stack"] == texts["'0.5*me/a + me/b'"] != texts[""] != texts["me/a"]
    sampled = [run(f"run me/a {base} --prompt '3 is ' --temperature 1 --seed {seed}")[1] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]

    status, out, err = run(f"eval me/a {base} --data {rows} --json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["schema_version"], result["n"], result["adapters"]) == (1, 8, "me/a")
    assert f"{result['loss']:.4f}" in run(f"eval me/a {base} --data {rows}")[1]
    assert result["loss"] != json.loads(run(f"eval {base} --data {rows} --json")[1])["loss"]

    assert run("export me/a --format peft", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert run("export me/a --format gguf", tmp_path / "out2")[0] == 2


def test_merge_with_its_base(run, hub, tiny_model, tiny_folder):
    import torch

    from adapterhub.adapters.publish import publish_tensors
    from adapterhub.bases.fingerprint import fingerprint
    from adapterhub.forms.dora import DoRA
    from adapterhub.sites import select, sites

    torch.manual_seed(0)
    base, sketch = fingerprint(tiny_model(), name="tiny")
    parts = {site.path: [DoRA.random(site)] for site in select(sites(tiny_model()), "query")}
    publish_tensors(hub, parts, name="me/a", base=base, sketch=sketch)
    status, _, err = run("merge me/a --weights 0.5 --name me/half")
    assert status == 1 and "--base" in err and "Traceback" not in err
    status, out, err = run(f"merge me/a --weights 0.5 --base {shlex.quote(str(tiny_folder))} --name me/half")
    assert status == 0 and out.startswith("me/half@0.1.0"), err
    assert {form for forms in hub.resolve("me/half").manifest.forms.values() for form in forms} == {"dense"}


def test_train_and_go_on(run, hub, rows, tiny_folder):
    common = f"train --base {shlex.quote(str(tiny_folder))} --data {rows} --steps 2 --batch-size 4 --json"
    status, out, err = run(f"{common} --method lora --set r=2 --set target_modules=q_proj,v_proj --name me/a --lr 0.01")
    assert status == 0, err
    assert json.loads(out)["releases"][0]["method"] == "lora"
    manifest = hub.resolve("me/a").manifest
    assert manifest.method.options["r"] == 2 and len(manifest.forms) == 4
    status, out, err = run(f"{common} --continue me/a@0.1.0 --eval-data {rows}")
    assert status == 0, err
    assert json.loads(out)["releases"][0]["version"] == "0.2.0"
    status, out, err = run(f"{common} --method lora --name me/b --on me/a")
    assert status == 0, err
    assert [(p.name, p.version, p.relation) for p in hub.resolve("me/b").manifest.parents] == [("me/a", "0.2.0", "on")]


def test_eval_of_another_base_only_by_force(run, hub, lora, rows, tiny_folder, tiny_saved, tiny_model, tmp_path):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=3))
    assert run(f"import {lora(1)} --name me/a --base", tiny_folder)[0] == 0
    line = f"eval me/a --base {other} --data {rows}"
    status, _, err = run(line)
    assert status == 1 and "--force" in err
    with pytest.warns(UserWarning, match="forced"):
        assert run(f"{line} --force")[0] == 0


def test_dtype_of_the_base(run, hub, tiny_saved, tiny_model, tmp_path, device):
    import torch

    base = tiny_saved(tmp_path / "half", tiny_model().to(torch.float16))
    fastest = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    for dtype, there in (("auto", fastest), ("stored", "float16"), ("bfloat16", "bfloat16")):
        assert hub.load(base, dtype=dtype, device=device).base.dtype == getattr(torch, there)
    status, _, err = run(f"run --base {base} --prompt x --dtype half")
    assert status == 2 and "stored" in err


def test_warnings_are_one_line_each(hub, lora, tiny_saved, tiny_model, tmp_path, monkeypatch, capsys):
    """A float16 copy of the base is accepted, with a warning that shows no line of Python."""
    import torch

    base = tiny_saved(tmp_path / "base", tiny_model())
    copy = tiny_saved(tmp_path / "copy", tiny_model().to(torch.float16))
    assert execute(["import", str(lora(1)), "--name", "me/a", "--base", str(base)]) == 0
    line = f"adapterhub run me/a --base {copy} --dtype float32 --prompt x --max-new-tokens 1"
    monkeypatch.setattr(sys, "argv", line.split())
    capsys.readouterr()
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    err = capsys.readouterr().err
    assert end.value.code == 0
    assert len(err.splitlines()) == 1 and err.startswith("warning: ") and "base" in err


def test_another_base_is_refused_unless_forced(run, hub, lora, tiny_saved, tiny_model, tiny_folder, tmp_path):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=5))
    assert run(f"import {lora(1)} --name me/a --base", tiny_folder)[0] == 0
    line = f"run me/a --base {other} --prompt x --max-new-tokens 1"
    status, out, err = run(line)
    assert (status, out) == (1, "") and err.startswith("error: ")
    assert run(f"{line} --force")[0] == 0


def test_chat_remembers_and_ends(run, hub, tiny_saved, tiny_model, tmp_path, monkeypatch):
    base = tiny_saved(tmp_path / "base", tiny_model())
    line = f"chat --base {base} --max-new-tokens 4"
    status, _, err = run(line)
    assert status == 2 and "chat template" in err
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/exit\nthree\n"))
    status, out, err = run(line)
    assert (status, err.count("> ")) == (0, 4)  # one, an empty line, two, /exit
    first, second = answers(base, ["one", "two"])
    assert out == f"{first}\n{second}\n"


def answers(base, questions):
    """The greedy answers by transformers alone, each question after all that was said before."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    text, given = "", []
    for question in questions:
        ids = tokenizer(text := f"{text}u:{question}|", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        given.append(clean(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
        text += f"a:{given[-1]}|"
    return given
