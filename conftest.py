"""Shared fixtures: a tiny Llama with grouped queries, in memory and as a folder; the devices present."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ADAPTERHUB_PLUGINS"] = "*"  # here every installed plugin may run, in what tests start, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of fixtures and of what tests start, too

import pytest


def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole suite; one for a file or a test, which is quicker, and for slow ones, which take all cores."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    return 2 if whole and "not slow" in config.option.markexpr else 0


@pytest.fixture(autouse=True)
def _threads(request):
    """One thread: tiny models gain nothing from more, and equal bits need equal threads. Slow tests take what there is."""
    import torch

    torch.set_num_threads(1 if request.node.get_closest_marker("slow") is None else os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path_factory):
    """No test sees the user's hub; torch's generator starts alike."""
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("ADAPTERHUB_CONFIG", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv("FORCE_COLOR", raising=False)


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
