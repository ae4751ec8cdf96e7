"""The form `peft`: one of PEFT's layers, made anew from its type, its options and its tensors wherever it runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from adapterhub_peft_make import TYPES, check_options, layer_state, layers, plain, reached, tables_of
from peft import __version__
from torch import Tensor, nn
from torch.func import functional_call

from adapterhub import Modification, Site, Step
from adapterhub.errors import IncompatibleBase, IntegrityError, NotFoldable, UsageError
from adapterhub.formats.peft_lower import LINEAR

MOST = 24
"""Trained tensors of one layer, and as many that do not train."""
TRAINED, KEPT = (tuple(f"{letter}{n}" for n in range(MOST)) for letter in "tk")
SCALING = ("IA3", "LN_TUNING")
"""Types that are lowered to gains of what stands at the site, where the layer itself takes what the base puts out."""


class PeftLayer(Modification):
    """What one of PEFT's layers adds to its base's output, layer(x) - base(x), computed by PEFT with these tensors. It reads x
    and the base's own weight only, so whatever stacks with it adds up.

    config (n,) uint8: JSON, {"type", "options", "embedding", "trained", "kept"}; the last two are PEFT's names of t0, t1, ...
    (what trained) and of k0, k1, ... (what did not: projections, indices); the options name the module "site". bias (outputs,):
    the base's own, if it has one. Raises IntegrityError for a config that is more than plain values of sane size."""

    form = "peft"
    additive = True
    stores = ("config", "bias", *TRAINED, *KEPT)
    optional = frozenset({"bias", *TRAINED, *KEPT})
    constants = frozenset({"config", "bias", *KEPT})
    layer: nn.Module | None = None
    """PEFT's, without the base's weight; copies of this modification share it."""
    _weight: Tensor | None = None

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.type, self.options, self.embedding, self.names = _read(tensors)
        self.lent: dict[str, tuple[list[PeftLayer], str]] = {}
        """Trained tensors that belong to another site of the same adapter: who holds each, and by which name."""
        self.here = [self]
        """Whichever copy of this holds the parameters: the last that was bound."""

    @classmethod
    def of(cls, kind: str, options: Mapping[str, Any], layer: nn.Module) -> PeftLayer:
        """Around a layer fresh from PEFT, which is left without the base's weight."""
        state, token = layer_state(layer), isinstance(layer.base_layer, nn.Embedding)
        names = {"trained": reached(layer), "kept": [n for n, tensor in state.items() if not tensor.requires_grad]}
        if max(map(len, names.values())) > MOST:
            raise UsageError(f"{kind} has more than {MOST} tensors at one site", "use another type")
        told = json.dumps({"type": kind, "options": options, "embedding": token, **names}, sort_keys=True)
        tensors = {"config": torch.frombuffer(bytearray(told.encode()), dtype=torch.uint8)}
        if isinstance(layer.base_layer, nn.Linear) and layer.base_layer.bias is not None:
            tensors["bias"] = layer.base_layer.bias.detach()
        for keys, here in ((TRAINED, names["trained"]), (KEPT, names["kept"])):
            tensors |= {key: state[name].detach() for key, name in zip(keys, here, strict=False)}
        made = cls(**tensors)
        made._around(layer)
        return made

    def over(self, tensors: Mapping[str, Tensor]) -> PeftLayer:
        """The same layer with other tensors."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, tensors=dict(tensors))
        return copy

    def whole(self) -> dict[str, Tensor]:
        """Its tensors, with those that it borrows."""
        return self.tensors | {key: holder[0].tensors[there] for key, (holder, there) in self.lent.items()}

    def _around(self, layer: nn.Module) -> None:
        if isinstance(layer.base_layer, nn.Linear | nn.Embedding):
            layer.base_layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.layer = layer

    def _make(self, outputs: int, inputs: int) -> None:
        """PEFT's layer, if there is none yet. What it starts with does not matter: these tensors take its place."""
        if self.layer is None:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                base = plain(torch.randn(outputs, inputs), self.tensors.get("bias"), self.embedding)
                layer = layers(self.type, self.options, {"site": base})["site"]
            if not set(self.names.values()) <= layer_state(layer).keys():
                raise IncompatibleBase(
                    f"PEFT {__version__} makes another layer of type {self.type}", "use the PEFT that it was made with"
                )
            self._around(layer)

    def check(self, site: Site) -> None:
        matrix = site.linear or site.embedding
        if self.embedding != site.embedding or (self.layer is None and not matrix):
            raise IncompatibleBase(f"this layer of type {self.type} is for another kind of site", "use its own base")
        self._make(site.outputs, site.inputs)
        tried = self.over(self.to("cpu", torch.float32).tensors)
        tried._weight = torch.zeros(site.outputs, site.inputs) if matrix else None
        with torch.no_grad():
            change = tried.delta_out(some(site), some(site), Step())
        if change.shape[-1] != site.outputs:
            raise IncompatibleBase(f"it changes {change.shape[-1]} outputs", "use the base that it was made for")

    def bind(self, weight: Tensor | None) -> None:
        if weight is not None:
            self._make(*weight.shape)
        self._weight, self.here[0] = weight, self
        self.layer.to(self.config.device)
        own = dict(self.layer.named_parameters())
        for key in self.names.keys() & self.tensors.keys():
            if self.tensors[key].requires_grad:  # OSF projects its gradients
                for hook in (own[self.names[key]]._backward_hooks or {}).values():
                    self.tensors[key].register_hook(hook)

    def _dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        own = super()._dtype(name, wanted)  # as PEFT, which keeps its tensors in float32 beside a base in 16 bits
        return torch.promote_types(own, self.tensors[name].dtype) if own.is_floating_point else own

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        base = {} if self._weight is None else {"weight": self._weight.mT if self.embedding else self._weight}
        if "bias" in self.tensors:
            base["bias"] = self.tensors["bias"]
        if x.is_floating_point():
            base = {name: tensor.to(x) for name, tensor in base.items()}
        named = {f"base_layer.{name}": tensor for name, tensor in base.items()}
        tensors, tables = self.whole(), tables_of(self.layer)
        for key, name in self.names.items():
            tensor = tensors[key]
            if key in self.lent:
                tensor = tensor.to(x.device, torch.promote_types(tensor.dtype, x.dtype))
            if name in tables:
                tables[name]["default"] = tensor
            else:
                named[name] = tensor
        self.layer.train(step.training)
        own = functional_call(self.layer.base_layer, base, (x,))
        if step.training and self.type in SCALING and (y - own).abs().max() > 1e-3 * own.abs().max():
            raise UsageError(
                f"{self.type} would scale the base's own output at a site where an adapter beneath it changes that",
                "choose other target_modules, or the built-in method ia3",
            )
        return functional_call(self.layer, named, (x,)) - own

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Measured on unit vectors, in float64. Raises NotFoldable for what is not linear."""
        if self._weight is None:
            raise NotFoldable("its change depends on the base's own weight", "give the base")
        exact, width = self.to(dtype=torch.float64), weight.shape[1]

        def run(x: Tensor) -> Tensor:
            return exact.delta_out(x[None].to(weight.device), x, Step())[0]

        if self.embedding:
            return run(torch.arange(width)).mT.to(weight.dtype), None
        shift = run(torch.zeros(1, width, dtype=torch.float64))
        change = (run(torch.eye(width, dtype=torch.float64)) - shift).mT
        x = torch.randn(7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = run(x)
        if not (y - (x.to(change) @ change.mT + shift)).abs().max() <= LINEAR * y.abs().max():
            raise NotFoldable(f"{self.type} is not linear in what goes in", "run it attached: --set lower=never")
        return change.to(weight.dtype), shift[0].to(weight.dtype) if shift.any() else None

    @classmethod
    def random(cls, site: Site) -> PeftLayer | None:
        if not site.linear:
            return None
        base = plain(0.2 * torch.randn(site.outputs, site.inputs))
        part = cls.of("VERA", {"r": 4}, layers("VERA", {"r": 4}, {"site": base})["site"])
        return part.over({key: torch.randn_like(t) if key in TRAINED else t for key, t in part.tensors.items()})


def some(site: Site) -> Tensor:
    """Something that may go in there, always the same: (1, tokens), or (1, tokens, inputs)."""
    if site.embedding:
        return torch.arange(site.inputs)[None]
    return torch.randn(1, 8, site.inputs, generator=torch.Generator().manual_seed(0))


class _Told(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    options: dict[str, Any]
    embedding: bool
    trained: list[str]
    kept: list[str]


def _read(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], bool, dict[str, str]]:
    """(type, options, whether at an embedding, {"t0": PEFT's name, ...}) as the config has them."""
    config, again = tensors["config"], "get the adapter again from its source"
    if config.dtype != torch.uint8 or config.ndim != 1 or len(config) > 1 << 16:
        raise IntegrityError("its config is no JSON of up to 65536 bytes", again)
    try:
        told = msgspec.json.decode(config.cpu().numpy().tobytes(), type=_Told)
    except (msgspec.DecodeError, RecursionError) as error:
        raise IntegrityError(f"its config is not right: {error}", again) from None
    names = dict(zip(TRAINED, told.trained, strict=False)) | dict(zip(KEPT, told.kept, strict=False))
    if told.type not in TYPES or not tensors.keys() - {"config", "bias"} <= names.keys():
        raise IntegrityError(f"PEFT {__version__} has no such layers of type {ascii(told.type)[:40]}", "update PEFT")
    check_options(told.type, told.options, max([1024, *(n for tensor in tensors.values() for n in tensor.shape)]))
    return told.type, told.options, told.embedding, names
