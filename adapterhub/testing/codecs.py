"""The laws of codecs. Each takes a codec's class and raises AssertionError, or Declined, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapterhub.adapters.adapter import modifications_of
from adapterhub.errors import CodecError, HubError
from adapterhub.files import durable
from adapterhub.kinds.codec import Codec, shapes_of
from adapterhub.tensors.file import dump, load
from adapterhub.testing.forms import Declined
from adapterhub.testing.generators import untouched
from adapterhub.transform.compress import site_errors


def sample(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An adapter as trained ones are: low rank (rank 8, of which 5 are used, so that an SVD finds something), and one of
    each other form with its integers; normally distributed, small and large."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for layer in range(4):
        for site, outputs, inputs in (("q_proj", 96, 64), ("down_proj", 64, 160)):
            prefix = f"model.layers.{layer}.{site}.low_rank.0"
            mixed = torch.linalg.qr(torch.randn(8, 8)).Q[:, :5] @ torch.randn(5, inputs)
            tensors[f"{prefix}.up"] = (torch.randn(outputs, 8) * 10.0**-layer).to(dtype)
            tensors[f"{prefix}.down"] = (mixed * 0.03).to(dtype)
            tensors[f"{prefix}.scale"] = torch.tensor(2.0, dtype=dtype)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "mlp.bottleneck": {"down": (24, 64), "down_bias": (24,), "up": (64, 24), "up_bias": (64,), "scale": ()},
        "o_proj.dense": {"weight": (64, 96), "bias": (64,)},
        "k_proj.dora": {"up": (64, 4), "down": (4, 64), "magnitude": (64,), "scale": ()},
        "v_proj.sparse": {"values": (300,)},
        "self_attn.prefix": {"keys": (2, 3, 16), "values": (2, 3, 16)},
        "up_proj.affine": {"gain": (160,), "shift": (160,)},
    }
    for at, named in shapes.items():
        tensors |= {f"model.layers.1.{at}.0.{key}": torch.randn(shape).to(dtype) for key, shape in named.items()}
    integers = {
        "mlp.bottleneck.0.parallel": torch.tensor(1, dtype=torch.uint8),
        "mlp.bottleneck.0.activation": torch.tensor(1, dtype=torch.uint8),
        "v_proj.sparse.0.index": torch.arange(0, 32 * 64, 6, dtype=torch.int32)[:300].clone(),
        "v_proj.sparse.0.shape": torch.tensor([32, 64]),
        "self_attn.prefix.0.shift": torch.tensor(3),
        "up_proj.affine.0.side": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors | {f"model.layers.1.{name}": tensor for name, tensor in integers.items()}


def _encoded(codec: type[Codec], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return codec().encode(tensors, codec.Config())


def _round_trip(codec: type[Codec], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through the bytes of a file, as a hub does it."""
    return codec().decode(load(dump(_encoded(codec, tensors))))


def kept(codec: type[Codec], device: str) -> None:
    """Names, dtypes and shapes come back, in float32, and in bf16 and fp16 if the codec takes them; integers bit for
    bit; what goes in is left alone. With `other_forms`: every site comes back, in forms that stand, in the dtypes it had."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = sample(dtype)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            decoded = _round_trip(codec, tensors)
        except CodecError as reason:
            assert dtype != torch.float32, f"refuses an adapter in float32: {reason}"
            continue
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]), f"encode changed {name} in place"
        if codec.other_forms:
            sites = [set(modifications_of(named)) for named in (tensors, decoded)]
            assert sites[0] == sites[1], f"sites differ: {sorted(sites[0] ^ sites[1])}"
            kinds = {tensor.dtype for tensor in decoded.values() if tensor.is_floating_point()}
            assert kinds <= {dtype}, f"an adapter in {dtype} comes back in {kinds}"
        else:
            assert set(decoded) == set(tensors), f"names differ: {sorted(set(decoded) ^ set(tensors))}"
        for name, tensor in ((name, tensor) for name, tensor in tensors.items() if name in decoded):
            got = decoded[name]
            if codec.other_forms and ".sparse." in name:
                continue
            assert got.dtype == tensor.dtype, f"{name} was {tensor.dtype}, comes back {got.dtype}"
            same = codec.reshapes or got.shape == tensor.shape
            assert same, f"{name} was {tensor.shape}, comes back {got.shape}"
            assert tensor.is_floating_point() or torch.equal(got, tensor), f"the integers of {name} changed"


def tolerance(codec: type[Codec], device: str) -> None:
    """decode(encode(t)) is t bit for bit if lossless, else within the declared relative error, tensor by tensor (of the
    change at each site for a codec that reshapes)."""
    tensors = sample()
    decoded = _round_trip(codec, tensors)
    if codec.lossless:
        changed = [name for name, tensor in tensors.items() if not torch.equal(decoded[name], tensor)]
        assert not changed, f"declared lossless, but changed: {changed}"
    elif codec.reshapes or codec.other_forms:
        errors = site_errors(modifications_of(tensors), modifications_of(decoded))
        for path, (error, _) in errors.items():
            assert error <= codec.tolerance, (
                f"the change at {path} is off by {error:.2g}, declared {codec.tolerance:.2g}"
            )
    else:
        for name, tensor in tensors.items():
            wanted, got = tensor.double(), decoded[name].double()
            error, size = float((got - wanted).norm()), float(wanted.norm())
            assert error <= codec.tolerance * size, (
                f"{name} is off by {error:.2g} of {size:.2g}, declared {codec.tolerance:.2g}"
            )


def smaller(codec: type[Codec], device: str) -> None:
    """The file gets smaller; a codec that finds nothing to save says so with a CodecError and a hint."""
    tensors = sample()
    try:
        encoded = _encoded(codec, tensors)
    except CodecError as reason:
        assert reason.hint, "a refusal must say what to do"
        raise Declined(f"refuses the sample: {reason}") from None
    before, after = len(dump(tensors)), len(dump(encoded))
    assert after < before, f"{before} bytes became {after}"


def deterministic(codec: type[Codec], device: str) -> None:
    """Equal tensors give equal bytes: whatever their order, their memory layout and the run."""
    tensors = sample()
    shuffled = {name: _strided(tensors[name]) for name in sorted(tensors, reverse=True)}
    first, again = dump(_encoded(codec, tensors)), dump(_encoded(codec, tensors))
    assert first == again, "encoding twice gives unlike bytes"
    assert first == dump(_encoded(codec, shuffled)), "bytes depend on the order or the memory layout of the tensors"


def _strided(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor


def odd(codec: type[Codec], device: str) -> None:
    """Empty, 0-d, one-entry, all-zero, constant and huge-ranged tensors come back finite in shape and dtype, or are
    refused with a CodecError; no adapter at all likewise."""
    prefix = "model.layers.0.q_proj.other.0"
    shapes = {"empty": (0, 8), "nothing": (), "one": (1, 1), "zeros": (300,), "line": (1000, 1)}
    tensors = {f"{prefix}.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    tensors[f"{prefix}.constant"] = torch.full((40, 10), -3.0)
    tensors[f"{prefix}.range"] = torch.logspace(-30, 30, 500)
    for case in ({}, tensors, *({name: tensor} for name, tensor in tensors.items())):
        try:
            decoded = _round_trip(codec, case)
        except CodecError:
            continue
        assert set(decoded) == set(case), f"names differ: {sorted(set(decoded) ^ set(case))}"
        for name, tensor in case.items():
            assert decoded[name].shape == tensor.shape and decoded[name].dtype == tensor.dtype, f"{name} changed shape"
            assert decoded[name].isfinite().all(), f"{name} is no longer finite"
            assert tensor.any() or not decoded[name].any(), f"{name} was zero and is not"


def bounded(codec: type[Codec], device: str) -> None:
    """It tells what decoding gives before it gives it, of sound files and of damaged ones, and telling takes no memory to speak of:
    so a small file cannot ask for more than the sites account for."""
    silent = codec.decode is not Codec.decode and codec.gives is Codec.gives
    assert not silent, "it has a decode of its own and no gives: nobody can bound what a hostile file makes it allocate"
    large = {"model.layers.2.o_proj.dense.0.weight": torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))}
    encoded = load(dump(_encoded(codec, sample() | large)))
    with _Tally() as tally:
        codec().gives(encoded)
    held = sum(tensor.nbytes for tensor in encoded.values())
    assert tally.bytes <= 1.5 * held + (64 << 10), f"telling takes {tally.bytes} bytes, the file has {held}"
    encoded = load(dump(_encoded(codec, sample())))
    for case in (encoded, *_damaged(encoded)):
        try:
            told = codec().gives(case)
        except HubError:
            told = None
        try:
            decoded = codec().decode(case)
        except HubError:
            continue
        unlike = "a damaged file comes out otherwise than it tells" if case is not encoded else "it tells other shapes"
        assert shapes_of(decoded) == told, unlike


class _Tally(TorchDispatchMode):
    """Counts the bytes that torch and Python allocate inside."""

    def __enter__(self) -> _Tally:
        self.bytes = 0
        self._traced = tracemalloc.is_tracing()
        if not self._traced:
            tracemalloc.start()
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.bytes += tracemalloc.get_traced_memory()[1] - self._before
        if not self._traced:
            tracemalloc.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        owned = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and id(result.untyped_storage()) not in owned:
            self.bytes += result.nbytes
        return result


def hostile(codec: type[Codec], device: str) -> None:
    """Damaged files are decoded to something or refused with a HubError; nothing else ever comes out."""
    for case in _damaged(load(dump(_encoded(codec, sample())))):
        try:
            codec().decode(case)
        except HubError:
            continue
        except Exception as error:
            raise AssertionError(f"a damaged file gave {type(error).__name__}: {error}") from error


def _damaged(encoded: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = [{k: t for k, t in encoded.items() if k != name} for name in list(encoded)[:8]]
    for name, tensor in list(encoded.items())[:8]:
        if tensor.ndim:
            cases.append({**encoded, name: tensor[: len(tensor) // 2].clone()})
        for _ in range(20 if tensor.dtype in (torch.uint8, torch.int8) and tensor.ndim else 0):
            damaged = tensor.clone()
            place = torch.randint(tensor.numel(), (3,), generator=generator)
            damaged.view(-1)[place] = torch.randint(256, (3,), generator=generator, dtype=torch.uint8).to(tensor.dtype)
            cases.append({**encoded, name: damaged})
    return cases


def generators(codec: type[Codec], device: str) -> None:
    """It leaves the global generators of python, numpy and torch alone."""
    tensors = sample()
    with untouched("encode"):
        encoded = _encoded(codec, tensors)
    with untouched("decode"):
        codec().decode(load(dump(encoded)))


FRESH = """
import sys
from importlib import import_module
from pathlib import Path
from adapterhub.tensors.file import dump, load
module, name, folder = sys.argv[1:]
codec, folder = import_module(module), Path(folder)
for part in name.split("."):
    codec = getattr(codec, part)
(folder / "decoded").write_bytes(dump(codec().decode(load(folder / "encoded"))))
(folder / "again").write_bytes(dump(codec().encode(load(folder / "sample"), codec.Config())))
"""


def fresh_process(codec: type[Codec], device: str) -> None:
    """Another process, of another hash seed, decodes what this one encoded to the same bytes, and encodes to the same."""
    try:
        importable = attrgetter(codec.__qualname__)(sys.modules[codec.__module__]) is codec
    except (KeyError, AttributeError):
        importable = False
    if not importable:
        raise Declined("it is not a class that another process can import from its module")
    tensors = sample()
    encoded = _encoded(codec, tensors)
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with TemporaryDirectory() as folder:
        for name, named in (("sample", tensors), ("encoded", encoded)):
            durable.write_bytes(Path(folder) / name, dump(named))
        command = [sys.executable, "-c", FRESH, codec.__module__, codec.__qualname__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"in a fresh process it fails: {(done.stderr.splitlines() or ['no words'])[-1]}"
        decoded, again = load(Path(folder) / "decoded"), (Path(folder) / "again").read_bytes()
    here = codec().decode(load(dump(encoded)))
    unlike = [
        n for n in here.keys() | decoded.keys() if n not in here or n not in decoded or not _equal(here[n], decoded[n])
    ]
    assert not unlike, f"a fresh process decodes {min(unlike)} to something else: what it needs is not in the tensors"
    assert again == dump(encoded), "a fresh process encodes to other bytes"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


LAWS = (kept, tolerance, smaller, deterministic, odd, bounded, hostile, generators, fresh_process)
