"""Every test in a place of its own; shared fixtures: a tiny Llama with grouped queries, in memory and as a folder; the devices."""

import os
import tempfile
from pathlib import Path

import isolation
import pytest

CLONE = Path(__file__).resolve().parent
BEFORE = pytest.StashKey[tuple[list[Path], isolation.Seen]]()
CHANGED = pytest.StashKey[list[str]]()


def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole suite; one for a file or a test, which is quicker, and for slow ones, which take all cores."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    return 2 if whole and "not slow" in config.option.markexpr else 0


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Before any test is imported: look at what belongs to the user (in the process that the user started, once), then
    be another user."""
    config = session.config
    if not hasattr(config, "workerinput"):
        places = isolation.places(CLONE)
        config.stash[BEFORE] = places, isolation.snapshot(places)
    home = tempfile.TemporaryDirectory(prefix="adapterhub-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    for folder in (home.name, config.option.basetemp or home.name):
        if found := isolation.above(Path(folder).resolve()):
            raise pytest.UsageError(
                f"every test would see {found}: move it away, or set TMPDIR and --basetemp elsewhere"
            )
    isolation.move_in(Path(home.name).resolve())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of fixtures and of what tests start, too


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail if anything changed outside of the tests' own folders."""
    if BEFORE in session.config.stash:
        places, before = session.config.stash[BEFORE]
        session.config.stash[CHANGED] = isolation.changed(before, isolation.snapshot(places))
        if session.config.stash[CHANGED] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if there := config.stash.get(CHANGED, []):
        terminalreporter.section("changed outside of the tests' own folders", red=True)
        terminalreporter.line("A test did it, or somebody else meanwhile. Tests write below tmp_path.")
        terminalreporter.line("\n".join([*there[:30], *([f"and {len(there) - 30} more"] if len(there) > 30 else [])]))


@pytest.fixture(autouse=True)
def _threads(request):
    """One thread: tiny models gain nothing from more, and equal bits need equal threads. Slow tests take what there is."""
    import torch

    torch.set_num_threads(1 if request.node.get_closest_marker("slow") is None else os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment():
    """What a test sets of our settings, and of those that our libraries read, must not reach the next one."""
    before = isolation.settings()
    yield
    after = isolation.settings()
    for name in {*before, *after}:
        os.environ.pop(name, None)
    os.environ.update(before)
    assert after == before, "a test left settings changed in the environment"


@pytest.fixture(scope="session", autouse=True)
def _outside_of_the_clone(tmp_path_factory):
    """Fixtures of a module work outside of the clone, too."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.chdir(here)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path_factory):
    """Each test has a working directory, a hub of its user and settings of its own."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp(), ignore_cleanup_errors=True) as folder:
        own = Path(folder)
        monkeypatch.setenv("ADAPTERHUB_HOME", str(own / "hub"))
        monkeypatch.setenv("ADAPTERHUB_CONFIG", str(own / "config"))
        (own / "work").mkdir()
        monkeypatch.chdir(own / "work")
        yield


def make_tiny(seed=0, vocabulary=96, **changes):
    """A random Llama: 2 layers, width 32, 4 heads over 2 key-value heads. float32, eval."""
    from adapterhub.testing.bed import tiny_llama

    return tiny_llama(seed, vocabulary, **changes)


@pytest.fixture
def tiny_model():
    """tiny_model(seed=0, **config changes) -> LlamaForCausalLM."""
    return make_tiny


def save_tiny(folder, model):
    """The model and a character tokenizer in a folder."""
    from adapterhub.testing.bed import tiny_tokenizer

    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with the tiny Llama (seed 0) and its tokenizer: a base for `--base PATH`."""
    return save_tiny(tmp_path_factory.mktemp("tiny-llama"), make_tiny())


@pytest.fixture
def tiny_saved():
    """tiny_saved(folder, model) -> folder."""
    return save_tiny


def _devices():
    import torch

    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_generate_tests(metafunc):
    """`device` runs over the devices present; the CUDA ones carry the mark gpu."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(
            "device",
            [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in _devices()],
        )
