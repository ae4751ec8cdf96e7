"""The form `peft`: one of PEFT's layers, made again from its type, its options and its tensors wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec
import torch
from peft import __version__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.func import functional_call

from adapterhub import Modification, Site, Step
from adapterhub.errors import IncompatibleBase, IntegrityError, NotFoldable, UsageError
from adapterhub.formats.peft.config import REFUSED as REFUSED_OPTIONS
from adapterhub.formats.peft.lower import measured
from adapterhub.formats.peft.tuner import DROPPED, built, is_plain, peft_errors

TYPES = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
OUTSIDE = {
    "target_modules", "modules_to_save", "target_parameters", "trainable_token_indices", "bias", "ensure_weight_tying",
    *REFUSED_OPTIONS, *DROPPED,
}  # fmt: skip
"""PEFT's options that name modules, files or data, say how layers start, or change more than the layers themselves."""
MOST = 24
"""Trained tensors of one layer, and as many that do not train."""
TRAINED, KEPT = (tuple(f"{letter}{n}" for n in range(MOST)) for letter in "tk")


def check_options(kind: str, options: Mapping[str, Any], most: int) -> None:
    """Raise UsageError unless all are options of the type's layers, and plain values: no size above `most`."""
    known = {field.name for field in fields(TYPES[kind]) if not field.name.endswith("_pattern")} - OUTSIDE
    for key, value in options.items():
        if key not in known:
            wrong = f"{ascii(key)[:40]} is none of {kind}'s options, or none for the layers (modules, files, starts)"
            raise UsageError(wrong, f"it has: {', '.join(sorted(known))}")
        if not is_plain(key, value, most):
            raise UsageError(f"{key} is {ascii(value)[:40]}, no plain value of sane size", "give numbers or words")


def plain(weight: Tensor, bias: Tensor | None = None, embedding: bool = False) -> nn.Module:
    """A module of the base as PEFT meets it, whatever it is there: weight (outputs, inputs)."""
    outputs, inputs = weight.shape
    if embedding:
        return nn.Embedding(inputs, outputs, _weight=weight.mT.contiguous())
    made = nn.Linear(inputs, outputs, bias=bias is not None)
    made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return made


def layers(kind: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """PEFT's layers around these modules, by path. Raises HubError for what PEFT does not take, or if the base's weights change."""
    root, before = nn.Module(), {path: module.weight.detach().clone() for path, module in modules.items()}
    for path, module in modules.items():
        here, (*outer, last) = root, path.split(".")
        for name in outer:
            here = here._modules.setdefault(name, nn.Module())
        here.add_module(last, module)
    with peft_errors(f"type {kind} here", "give a config and target_modules that suit it (see PEFT's documentation)"):
        built(kind, {"target_modules": list(modules), **options}, root, trains=True)
        made = {path: root.get_submodule(path) for path in modules}
        for path, layer in made.items():
            _tried(layer)
            if not torch.equal(layer.base_layer.weight, before[path]):
                raise UsageError(f"with these options {kind} changes the base's weights", "leave out how it starts")
    return made


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """All its tensors but the base's, by PEFT's names. Indices that some types keep in a plain table become buffers first."""
    for name, table in list(vars(layer).items()):
        if isinstance(table, dict) and isinstance(table.get("default"), Tensor):
            setattr(layer, name, BufferDict(table))
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not name.startswith("base_layer.")}


def _tried(layer: nn.Module) -> Tensor:
    base = layer.base_layer
    return layer(torch.arange(3)[None] if isinstance(base, nn.Embedding) else torch.randn(1, 3, base.weight.shape[-1]))


class PeftLayer(Modification):
    """What one of PEFT's layers adds to its base's output, layer(x) - base(x), computed by PEFT with these tensors. It reads x
    and the base's own weight only, so whatever stacks with it adds up.

    config (n,) uint8: JSON, as `_Told` has it, else HubError. t0, t1, ...: what trained; k0, k1, ...: what did not
    (projections, indices). bias (outputs,): the base's own, if it has one."""

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
        told = _read(tensors)
        self.type, self.options, self.embedding, self.names = told.type, told.options, told.embedding, told.names
        self.lent: dict[str, tuple[list[PeftLayer], str]] = {}  # what another site holds: who, and by which name there
        self.here = [self]  # whichever copy of this holds the parameters: the last that was bound

    @classmethod
    def of(cls, kind: str, options: Mapping[str, Any], layer: nn.Module) -> PeftLayer:
        """Around a layer fresh from PEFT."""
        state, base = layer_state(layer), layer.base_layer
        _tried(layer).square().sum().backward()  # TinyLoRA's layers hold all others' tensors too: those get no gradient
        trained = [name for name, tensor in state.items() if tensor.grad is not None]
        kept = [name for name, tensor in state.items() if not tensor.requires_grad]
        layer.zero_grad()
        if max(len(trained), len(kept)) > MOST:
            raise UsageError(f"{kind} has more than {MOST} tensors at one site", "use another type")
        names = dict(zip(TRAINED, trained, strict=False)) | dict(zip(KEPT, kept, strict=False))
        told = msgspec.json.encode(_Told(kind, dict(options), isinstance(base, nn.Embedding), names))
        tensors = {key: state[name].detach() for key, name in names.items()}
        if isinstance(base, nn.Linear) and base.bias is not None:
            tensors["bias"] = base.bias.detach()
        made = cls(config=torch.frombuffer(bytearray(told), dtype=torch.uint8), **tensors)
        made.layer = layer
        return made

    def over(self, tensors: Mapping[str, Tensor]) -> PeftLayer:
        """The same layer with these tensors, none of them borrowed."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, tensors=dict(tensors), lent={})
        return copy

    def whole(self) -> dict[str, Tensor]:
        """Its tensors, with those that it borrows."""
        lent = {key: holder[0].tensors[there] for key, (holder, there) in self.lent.items()}
        return self.tensors | {key: tensor.to(self.config.device) for key, tensor in lent.items()}

    def _make(self, outputs: int, inputs: int) -> None:
        """PEFT's layer, if there is none yet. What it starts with does not matter: these tensors take its place."""
        if self.layer is None:
            with torch.random.fork_rng(devices=[]):
                base = plain(torch.randn(outputs, inputs), self.tensors.get("bias"), self.embedding)
                self.layer = layers(self.type, self.options, {"site": base})["site"]
        if not set(self.names.values()) <= layer_state(self.layer).keys():
            wrong = f"a layer of type {self.type} is more than its tensors, or PEFT {__version__} makes another"
            raise IncompatibleBase(wrong, "train without lower=never, or use the PEFT that made it")

    def check(self, site: Site) -> None:
        if not (site.linear or site.embedding) or self.embedding != site.embedding:
            raise IncompatibleBase(f"this layer of type {self.type} is for another kind of site", "use its own base")
        self._make(site.outputs, site.inputs)
        base = self.layer.base_layer
        made_for = (
            (base.embedding_dim, base.num_embeddings) if site.embedding else (base.out_features, base.in_features)
        )
        if made_for != (site.outputs, site.inputs):
            wrong = f"a layer of type {self.type} of {made_for[1]} to {made_for[0]} at a site of {site.inputs} to {site.outputs}"
            raise IncompatibleBase(wrong, "use its own base")
        whole, state = self.whole(), layer_state(self.layer)
        for key, name in self.names.items():  # VeRA's projections fit its largest layer, and each cuts out its own
            here, own = whole[key].shape, state[name].shape
            cut = key in KEPT and len(here) == len(own) and all(n >= least for n, least in zip(here, own, strict=True))
            if here != own and not cut:
                raise IncompatibleBase(f"{name} is {tuple(here)}, where {tuple(own)} belongs", "use its own base")
        tried = self.over(whole).to("cpu", torch.float32)
        tried._weight = torch.ones(site.outputs, site.inputs)  # zeros have no direction, which DoRA asks for
        with torch.no_grad():
            try:
                change = tried.delta_out(some(site), some(site), Step())
            except RuntimeError as error:  # a projection that cannot be cut so
                wrong = f"tensors of this layer of type {self.type} do not go together: {error}"
                raise IncompatibleBase(wrong, "get the adapter again from its source") from None
            if not change.isfinite().all():
                raise IncompatibleBase(f"this layer of type {self.type} overflows", "train it again: other options")

    def bind(self, weight: Tensor) -> None:
        self._make(*weight.shape)
        self._weight, self.here[0] = weight, self
        self.layer.base_layer.weight = nn.Parameter(weight[:0].detach(), requires_grad=False)  # it needs no copy
        self.layer.to(self.config.device)
        own = dict(self.layer.named_parameters())
        for key in self.names:
            if key in self.tensors and self.tensors[key].requires_grad:  # OSF projects its gradients
                for hook in (own[self.names[key]]._backward_hooks or {}).values():
                    self.tensors[key].register_hook(hook)

    def _dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        own = super()._dtype(name, wanted)  # as PEFT, which keeps its tensors in float32 beside a base in 16 bits
        return torch.promote_types(own, self.tensors[name].dtype) if own.is_floating_point else own

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        base = {"weight": self._weight.mT if self.embedding else self._weight}
        if "bias" in self.tensors:
            base["bias"] = self.tensors["bias"]
        if x.is_floating_point():
            base = {name: tensor.to(x) for name, tensor in base.items()}
        tensors, named = self.whole(), {f"base_layer.{name}": tensor for name, tensor in base.items()}
        named |= {name: tensors[key] for key, name in self.names.items()}
        self.layer.train(step.training)
        return functional_call(self.layer, named, (x,)) - functional_call(self.layer.base_layer, base, (x,))

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Measured on unit vectors, in float64. Raises NotFoldable for what is not linear."""
        if self._weight is None:
            raise NotFoldable("its change depends on the base's own weight", "give the base")
        exact, device, width = self.over(self.whole()).to(dtype=torch.float64), weight.device, weight.shape[1]
        change, shift = measured(lambda x: exact.delta_out(x.to(device), x, Step()).cpu(), width, self.embedding)
        return change.to(weight), shift.to(weight) if shift.any() else None

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
    """The config of a layer: names are PEFT's, of t0, t1, ..., k0, ...."""

    type: str
    options: dict[str, Any]
    embedding: bool
    names: dict[str, str]


def _read(tensors: Mapping[str, Tensor]) -> _Told:
    config, again = tensors["config"], "get the adapter again from its source"
    if config.dtype != torch.uint8 or config.ndim != 1 or len(config) > 1 << 16:
        raise IntegrityError("its config is no JSON of up to 65536 bytes", again)
    try:
        told = msgspec.json.decode(config.cpu().numpy().tobytes(), type=_Told)
    except (msgspec.DecodeError, RecursionError) as error:
        raise IntegrityError(f"its config is not right: {error}", again) from None
    if told.type not in TYPES or not tensors.keys() - {"config", "bias"} <= told.names.keys():
        raise IntegrityError(f"PEFT {__version__} has no such layers of type {ascii(told.type)[:40]}", "update PEFT")
    check_options(told.type, told.options, max([1024, *(n for tensor in tensors.values() for n in tensor.shape)]))
    return told
