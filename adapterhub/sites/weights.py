"""The weight of one module: whether it is plain, what its numbers are, how wide the module is. Nothing else asks a module for these.

A weight is *plain* if it is the module's own parameter or buffer, exactly a torch.Tensor or nn.Parameter, strided, of 16 to 64 bit
floating numbers, and (outputs, inputs) as the module multiplies. Quantised, sharded, pruned and parametrised weights are not. Their
modules run, and so does what adapters do beside them; but nothing can be added into such a weight, and what is read off its
tensor may be codes. `values` asks whoever made it for the numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING

from adapterhub.errors import IncompatibleBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FLOATS = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")
"""The types that models compute in. Others (float8, integers) only store."""
NAMES = (("out_features", "in_features"), ("outfeatures", "infeatures"))
"""How linear layers that are no nn.Linear state their widths (HQQ, AWQ and GPTQ; AutoGPTQ)."""


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer, (width, vocabulary) of an embedding, as the module states them: a packed weight has
    another shape. None for any other module; a layer that holds further modules is another."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    weight = stored(module)
    if _forward_is_torchs(module) and type(weight) in (torch.Tensor, nn.Parameter) and weight.ndim == 2:
        outputs, inputs = weight.mT.shape if transposed(module) else weight.shape  # whatever it was made with
        return outputs, inputs
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if embeds(module):
        return module.embedding_dim, module.num_embeddings
    if not isinstance(module, nn.Linear) and next(module.children(), None) is not None:
        return None
    stated = [[getattr(module, name, None) for name in names] for names in NAMES]
    return next(((out, into) for out, into in stated if type(out) is int and type(into) is int), None)


def embeds(module: nn.Module) -> bool:
    """Whether it is an embedding: what goes in are ids, and its weight is stored as (vocabulary, width)."""
    return all(type(getattr(module, name, None)) is int for name in ("num_embeddings", "embedding_dim"))


def matrix(module: nn.Module) -> Tensor | None:
    """The module's plain weight as (outputs, inputs), a view: of a Conv1D and of an embedding the transpose of what is stored. On the
    meta device where the module is a skeleton's or its weight is offloaded. None for what is no linear layer or embedding, and
    where the weight is not plain (`unlike`)."""
    if widths(module) is None or unlike(module):
        return None
    weight = stored(module)
    return weight.mT if transposed(module) else weight


def unlike(module: nn.Module) -> str:
    """How a linear layer or an embedding keeps its weight if that is not plain, in words; "" if it is plain."""
    import torch

    weight, kind = stored(module), type(module).__name__
    if weight is None:
        computed = isinstance(getattr(module, "weight", None), torch.Tensor)
        return (
            f"this {kind} computes its weight anew at each call"
            if computed
            else f"this {kind} has no tensor named weight"
        )
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if str(weight.dtype) not in FLOATS or weight.layout is not torch.strided:
        return f"its weight is kept in {weight.dtype}, {weight.layout}".replace("torch.", "").removesuffix(", strided")
    outputs, inputs = widths(module)
    if weight.shape != ((inputs, outputs) if transposed(module) else (outputs, inputs)):
        return f"its weight is packed into the shape {tuple(weight.shape)}"
    return ""


def values(module: nn.Module) -> Tensor:
    """The numbers that a linear layer or an embedding multiplies with, (outputs, inputs), plain and detached: a view of a plain
    weight, else a dequantised copy, from the tensor's own `dequantize` or `full_tensor`, from bitsandbytes, or from the
    module's `dequantize`. An offloaded weight is fetched.

    Raises IncompatibleBase where nobody says what the numbers are."""
    import torch

    with fetched(module), torch.no_grad():
        weight = matrix(module)
        weight = _dequantised(module) if weight is None else weight.detach()
        if weight.is_meta:
            raise IncompatibleBase(
                f"the weight of this {type(module).__name__} is on the meta device: it has no numbers",
                "load the base with its weights",
            )
    return weight


def computes(module: nn.Module) -> bool:
    """Whether the module does no more with its plain weight (and bias) than multiply; an embedding may scale what it looks up. Tried
    on single inputs, unless the class says it: a linear layer may round its weight at each call, or use only a part."""
    import torch

    weight, bias = matrix(module), getattr(module, "bias", None)
    if weight is None:
        return False
    if weight.is_meta or (_forward_is_torchs(module) and not _forward_is_given(module)):
        return True
    inputs = weight.shape[1]
    places = torch.arange(0, inputs, max(1, inputs // 8), device=weight.device)
    given = places if embeds(module) else torch.nn.functional.one_hot(places, inputs).to(weight.dtype)
    wanted = weight.mT[places] * getattr(module, "embed_scale", 1.0) + (0 if bias is None else bias)
    try:
        with torch.no_grad():
            found = module.forward(given[None])
    except Exception:  # somebody's own layer, which takes other inputs
        return False
    rounding = 4 * torch.finfo(weight.dtype).eps
    return found.shape == wanted[None].shape and torch.allclose(found[0], wanted, rtol=rounding, atol=0)


def odd(model: nn.Module) -> dict[str, nn.Module]:
    """{path: linear layer or embedding} of those whose weight is not plain."""
    return {path: module for path, module in model.named_modules() if widths(module) is not None and unlike(module)}


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The type that a module or a model computes in: that of its first tensor in one of FLOATS; None if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if str(tensor.dtype) in FLOATS), None)


def compute_device(module: nn.Module) -> torch.device | None:
    """The device of its first tensor that is on a real one; None if there is none (all offloaded, or no tensors)."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), None)


def stored(module: nn.Module) -> Tensor | None:
    """The weight that the module has registered: not what stands in its place for one call, and not what is computed at each."""
    found = module._parameters.get("weight")
    return module._buffers.get("weight") if found is None else found


def transposed(module: nn.Module) -> bool:
    """Whether its weight is stored as (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or embeds(module)


def fetched(module: nn.Module) -> AbstractContextManager:
    """Inside, a weight that accelerate has offloaded is where the module computes."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _forward_is_torchs(module: nn.Module) -> bool:
    """Whether its class computes as nn.Linear, nn.Embedding or Conv1D: then its weight is what it looks like."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward)


def _forward_is_given(module: nn.Module) -> bool:
    """Whether something has put another forward on it. That of `hooks` passes on to the module's own."""
    given = module.__dict__.get("forward")
    return given is not None and (not getattr(given, "passes_on", False) or "_adapterhub_before" in module.__dict__)


def _dequantised(module: nn.Module) -> Tensor:
    """The numbers of a weight that is not plain, (outputs, inputs)."""
    import torch

    name, why = type(module).__name__, unlike(module)
    try:
        found = _asked(module)
    except Exception as error:  # another library's, which may lack a kernel, a device or a state
        found, why = None, f"{why}, and reading it fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
    outputs, inputs = widths(module)
    stored = (inputs, outputs) if transposed(module) else (outputs, inputs)
    plain = isinstance(found, torch.Tensor) and str(found.dtype) in FLOATS and found.shape == stored
    if not plain or type(found.detach()) is not torch.Tensor:
        raise IncompatibleBase(
            f"what numbers this {name} multiplies with is not known: {why}", "load the base unquantised"
        )
    return found.detach().mT if transposed(module) else found.detach()


def _asked(module: nn.Module) -> Tensor | None:
    import torch

    weight = getattr(module, "weight", None)
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from peft.utils.integrations import dequantize_bnb_weight

        scales = getattr(weight, "SCB", None)  # which its module takes over at the first call
        scales = module.state.SCB if scales is None and hasattr(module, "state") else scales
        return dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=scales))
    if type(weight) in (torch.Tensor, torch.nn.Parameter) and stored(module) is None:
        return weight.detach()  # computed from others, of this call
    for method in ("dequantize", "full_tensor"):
        if (own := getattr(type(weight), method, None)) is not None and own is not getattr(torch.Tensor, method, None):
            return own(weight)
    return module.dequantize() if callable(getattr(module, "dequantize", None)) else None
