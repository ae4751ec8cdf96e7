"""Attaching: one pair of hooks per site, placed once, whatever the number of adapters; a plan says what runs where.

The hooks also hold the promises of a batch: the rows are the rows given, positions come from the mask, streaming state
belongs to its key-value cache, and a modification whose site never ran is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapterhub import attention
from adapterhub.attention import Memory
from adapterhub.errors import BatchError, NotFoldable
from adapterhub.modification import Modification, Step
from adapterhub.sites import family, matrix

GIVEN = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "decoder_input_ids", "decoder_inputs_embeds")
"""What a model may be called with, rows first."""


@dataclass(eq=False)
class Plan:
    """What runs at each site, for a batch of `rows` rows (None: any batch, all rows alike)."""

    sites: Mapping[str, Modification] = field(default_factory=dict)
    """By module."""
    rows: int | None = None
    memories: Callable[[], Mapping[str, Memory]] = dict
    """Prefixes, by attention module; gathered anew for each forward pass while they train."""
    attending: frozenset[str] = frozenset()
    """The attention modules among them."""
    advances: tuple[int, ...] = ()
    """How many positions each row's tokens move up; empty: none moves."""
    key: object = field(default_factory=object)
    """What it was made from: plans of one key do the same."""
    checked: bool = False
    """Every site of it has run once."""

    @property
    def stateful(self) -> bool:
        return any(modification.stateful for modification in self.sites.values())


@dataclass
class _Sequences:
    """The streaming state that belongs to one key-value cache: how many tokens it has seen, under which plan."""

    plan: Plan
    seen: int = 0
    states: dict[str, dict] | None = None
    """By site; None where gradients are on: a layer that a checkpoint runs again must start as it did the first time."""


@dataclass
class _Forward:
    """One forward pass: what its hooks need. A checkpointed layer that runs again during backward gets the same one."""

    root: nn.Module
    """The model, or its encoder when that runs by itself."""
    plan: Plan
    mask: Tensor | None
    sequences: _Sequences
    training: bool
    memories: Mapping[str, Memory]
    running: dict[str, list[tuple[Modification, Step]]] = field(default_factory=dict)
    """By site: modifications whose input has gone in and whose output has not come out yet."""
    ran: set[str] = field(default_factory=set)


class Attachment:
    """The hooks on one base model; get it with `Attachment.of(base)`: there is one, whoever uses the base."""

    @classmethod
    def of(cls, base: nn.Module) -> Attachment:
        return base.__dict__.get("_adapterhub") or cls(base)

    def __init__(self, base: nn.Module):
        self.base = base
        self._plan: Plan | None = None
        self._training = False
        self._forward: _Forward | None = None
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._takes_positions = (
            "position_ids" in inspect.signature(base.forward).parameters
            and not family(base.config.model_type).own_positions
        )
        self._encoder = ""
        self._hooks: dict[str, list] = {}
        self._attending: set[str] = set()
        """Attention modules that ask for memories."""
        self.closed = False
        """The base's weights are others now (folded): whoever holds this attachment must load again."""
        base.__dict__["_adapterhub"] = self

    @contextmanager
    def running(self, plan: Plan, training: bool = False) -> Iterator[None]:
        """Forward passes inside run this plan (training: with dropout); those outside run the bare base."""
        if not self._hooks:
            whole = [self.base]
            if self.base.config.is_encoder_decoder:  # generate calls the encoder by itself
                encoder = self.base.get_encoder()
                self._encoder = next(path for path, module in self.base.named_modules() if module is encoder)
                whole.append(encoder)
            self._hooks[""] = [
                hook
                for module in whole
                for hook in (
                    module.register_forward_pre_hook(self._before_model, with_kwargs=True),
                    module.register_forward_hook(self._after_model, with_kwargs=True),
                )
            ]
        if plan.attending:
            attention.use(self.base)
        for path in plan.attending - self._attending:
            self._remember(path)
        for path in plan.sites.keys() - self._hooks.keys():
            self._hooks[path] = self._hook(path)
        previous, self._plan, self._training = (self._plan, self._training), plan, training
        try:
            yield
        finally:
            (self._plan, self._training), self._forward = previous, None

    def detach(self) -> None:
        """Remove every hook: the base is as it was."""
        for pair in self._hooks.values():
            for hook in pair:
                hook.remove()
        self._hooks.clear()
        for path in self._attending:
            del self.base.get_submodule(path).__dict__["_adapterhub_memory"]
        self._attending.clear()
        attention.restore(self.base)

    def close(self) -> None:
        """Detach for good: the base has been changed."""
        self.detach()
        self.closed = True
        self.base.__dict__.pop("_adapterhub", None)

    # --- the model's hooks -------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict):
        if self._forward is not None and module is not self.base:
            return None  # the encoder, inside the whole model's forward pass
        self._forward = None
        plan = self._plan
        if plan is None:
            return None
        given = next((v for v in (*map(kwargs.get, GIVEN), *args[:1]) if isinstance(v, Tensor)), None)
        if given is None or given.ndim < 2:
            raise BatchError("the model was given no batch", "give input_ids of (rows, tokens)")
        rows, tokens = given.shape[:2]
        if plan.rows not in (None, rows):
            raise BatchError(
                f"adapters were given for {plan.rows} rows, the batch has {rows}",
                "give one adapter expression (or None) for each row; beams are not supported",
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        cache = kwargs.get("past_key_values")
        memories = plan.memories()
        if plan.stateful and self.base.config.is_encoder_decoder:
            raise BatchError("a form with streaming state does not run in an encoder-decoder", "leave that adapter out")
        if memories and getattr(cache, "is_compileable", False):
            raise BatchError("a prefix does not run with a static cache", "leave cache_implementation out")
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[0] != rows:
                raise BatchError(
                    f"the attention mask has {mask.shape[0]} rows, the batch has {rows}", "give one mask per row"
                )
            if self._takes_positions and kwargs.get("position_ids") is None and mask.shape[1] == seen + tokens:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                kwargs["position_ids"] = positions[:, -tokens:]
            mask = None if self.base.config.is_encoder_decoder else mask[:, -tokens:].bool()
        elif mask is not None and plan.stateful:
            raise BatchError(
                "a form with streaming state needs a two-dimensional attention mask", "give (rows, tokens)"
            )
        else:
            mask = None
        if plan.advances:
            self._advance(plan, kwargs, seen, tokens, given)
        sequences = self._continued(plan, cache, seen) if seen else None
        if sequences is None:
            sequences = _Sequences(plan, states=None if torch.is_grad_enabled() else {})
        sequences.seen = seen + tokens
        self._forward = _Forward(module, plan, mask, sequences, self._training, memories)
        if torch.is_grad_enabled():
            self._follow_checkpoints()
        return args, kwargs

    def _advance(self, plan: Plan, kwargs: dict, seen: int, tokens: int, given: Tensor) -> None:
        """Move the tokens' positions up by what the prefixes before them count."""
        if not self._takes_positions:
            raise BatchError(
                "a prefix moves the positions of its rows, and this model takes no position_ids",
                "leave that adapter out",
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + tokens, device=given.device)[None]
        kwargs["position_ids"] = positions + torch.tensor(plan.advances, device=positions.device)[:, None]

    def _continued(self, plan: Plan, cache: object, seen: int) -> _Sequences | None:
        """The state left with this cache; None if no form here keeps any."""
        if not plan.stateful:
            return None
        known = self._by_cache.get(cache)
        if known is None or known.plan.key != plan.key or known.seen != seen or known.states is None:
            raise BatchError(
                "this key-value cache was not filled by these adapters up to here, and one of them keeps streaming state",
                "start again from the whole text under torch.no_grad(); decoding that cuts the cache is not supported",
            )
        return known

    def _follow_checkpoints(self) -> None:
        """Let a layer that a checkpoint runs again during backward find the forward pass it belongs to."""
        for layer in self.base.modules():
            checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None and not hasattr(checkpoint, "followed"):

                def followed(function, *args, _checkpoint=checkpoint, **kwargs):
                    forward = self._forward

                    def again(*args, **kwargs):
                        previous, self._forward = self._forward, forward
                        try:
                            return function(*args, **kwargs)
                        finally:
                            self._forward = previous

                    return _checkpoint(again, *args, **kwargs)

                followed.followed = True
                layer._gradient_checkpointing_func = followed

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output):
        if self._forward is None or self._forward.root is not module:
            return None
        forward, self._forward = self._forward, None
        if module is not self.base:
            return None
        missed = (forward.plan.sites.keys() | forward.memories.keys()) - forward.ran
        if kwargs.get("encoder_outputs") is not None:  # the encoder ran before, by itself
            missed = {path for path in missed if not path.startswith(f"{self._encoder}.")}
        if missed and not forward.plan.checked:
            raise BatchError(
                "the model read these modules' weights without calling them, so their adapters never ran:\n  "
                + "\n  ".join(sorted(missed)),
                "leave these sites out (target_modules)",
            )
        forward.plan.checked = True
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._by_cache[cache] = forward.sequences
        return None

    # --- a site's hooks ----------------------------------------------------------------------------------------

    def _remember(self, path: str) -> None:
        """Let the attention kernel find what the rows of the pass at hand attend to besides their tokens."""

        def find() -> Memory | None:
            forward = self._forward
            memory = forward and forward.memories.get(path)
            if memory is not None:
                forward.ran.add(path)
            return memory

        self._attending.add(path)
        self.base.get_submodule(path).__dict__["_adapterhub_memory"] = find

    def _hook(self, path: str) -> list:
        module = self.base.get_submodule(path)

        def before(module: nn.Module, args: tuple, kwargs: dict):
            _own_weight(module)
            forward = self._forward
            if forward is None and self._plan is not None and path in self._plan.sites:
                raise BatchError(
                    f"{path} was called outside of the model's own forward pass, where no rows are known",
                    "call the model, not a part of it",
                )
            modification = forward and forward.plan.sites.get(path)
            if modification is None:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            if forward.plan.rows not in (None, x.shape[0]):
                raise BatchError(
                    f"{path} sees {x.shape[0]} rows where adapters were given for {forward.plan.rows}",
                    "give one adapter expression (or None) for each row; beams are not supported",
                )
            modification = modification.to(x.device, x.dtype if x.is_floating_point() else module.weight.dtype)
            if modification.folds and torch.is_grad_enabled() and _with_weight(module, modification):
                forward.running.setdefault(path, []).append((_NOTHING, Step()))
                return None
            keeps = modification.stateful and forward.sequences.states is not None
            step = Step(forward.mask, forward.sequences.states.setdefault(path, {}) if keeps else {}, forward.training)
            forward.running.setdefault(path, []).append((modification, step))
            if not modification.changes_input:
                return None
            change = modification.delta_in(x, step)
            if change is None:
                return None
            x = x + change
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def after(module: nn.Module, args: tuple, kwargs: dict, output):
            forward = self._forward
            if forward is None or path not in forward.plan.sites:
                return None
            _own_weight(module)
            modification, step = forward.running[path].pop()
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            change = modification.delta_out(x, y, step)
            if path not in forward.memories:
                forward.ran.add(path)
            if change is None:
                return None
            y = y + change.to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]


_NOTHING = Modification()


def _with_weight(module: nn.Module, modification: Modification) -> bool:
    """Let the module compute with the weight that the modification makes of its own, in the graph, for this one call: a
    change that trains (dense, sparse) is cheaper so than beside it. False if it is no change of a weight after all."""
    weight, bias = matrix(module), getattr(module, "bias", None)
    try:
        weight_change, bias_change = modification.delta_weight(weight, bias)
    except NotFoldable:
        return False
    if weight_change is not None:
        changed = weight + weight_change
        # An instance's own attribute comes before its parameter of that name.
        module.__dict__["weight"] = changed if isinstance(module, nn.Linear) else changed.mT
    if bias_change is not None:
        module.__dict__["bias"] = bias_change if bias is None else bias + bias_change
    return True


def _own_weight(module: nn.Module) -> None:
    module.__dict__.pop("weight", None)
    module.__dict__.pop("bias", None)
