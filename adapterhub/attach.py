"""Attaching: one pair of hooks per site, placed once, whatever the number of adapters; a plan says what runs where.

The hooks also hold the promises of a batch: the rows are the rows given, positions come from the mask, streaming state
belongs to its key-value cache, and a modification whose site never ran is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapterhub.errors import BatchError
from adapterhub.modification import Modification, Step


@dataclass(eq=False)
class Plan:
    """What runs at each site, for a batch of `rows` rows (None: any batch, all rows alike)."""

    sites: Mapping[str, Modification] = field(default_factory=dict)
    rows: int | None = None
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


class Attachment:
    """The hooks on one base model."""

    def __init__(self, base: nn.Module):
        self.base = base
        self.training = False
        self._plan = Plan()
        self._mask: Tensor | None = None
        self._sequences: _Sequences | None = None
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._steps: dict[str, list[tuple[Modification, Step]]] = {}
        self._ran: set[str] = set()
        parameters = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._hooks = {
            "": [
                base.register_forward_pre_hook(self._before_model, with_kwargs=True),
                base.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        }

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Forward passes inside run this plan. It stays in force afterwards when gradients are on: checkpointed
        layers run again during backward."""
        for path in plan.sites.keys() - self._hooks.keys():
            self._hooks[path] = self._hook(path)
        previous, self._plan = self._plan, plan
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self._plan = previous

    def detach(self) -> None:
        """Remove every hook: the base is as it was."""
        for pair in self._hooks.values():
            for hook in pair:
                hook.remove()
        self._hooks.clear()

    # --- the model's hooks -------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict):
        self._ran.clear()
        self._steps.clear()
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        rows, tokens = given.shape[:2]
        if self._plan.rows not in (None, rows):
            raise BatchError(
                f"adapters were given for {self._plan.rows} rows, the batch has {rows}",
                "give one adapter expression (or None) for each row; beams are not supported",
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        cache = kwargs.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[0] != rows:
                raise BatchError(
                    f"the attention mask has {mask.shape[0]} rows, the batch has {rows}", "give one mask per row"
                )
            if self._takes_positions and kwargs.get("position_ids") is None and mask.shape[1] == seen + tokens:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                kwargs["position_ids"] = positions[:, -tokens:]
            self._mask = mask[:, -tokens:].bool()
        elif mask is not None and self._plan.stateful:
            raise BatchError(
                "a form with streaming state needs a two-dimensional attention mask", "give (rows, tokens)"
            )
        else:
            self._mask = None
        self._sequences = self._continued(cache, seen) if seen else None
        if self._sequences is None:
            self._sequences = _Sequences(self._plan, states=None if torch.is_grad_enabled() else {})
        self._sequences.seen = seen + tokens
        return args, kwargs

    def _continued(self, cache: object, seen: int) -> _Sequences | None:
        """The state left with this cache; None if no form here keeps any."""
        if not self._plan.stateful:
            return None
        known = self._by_cache.get(cache)
        if known is None or known.plan is not self._plan or known.seen != seen or known.states is None:
            raise BatchError(
                "this key-value cache was not filled by these adapters up to here, and one of them keeps streaming state",
                "start again from the whole text under torch.no_grad(); decoding that cuts the cache is not supported",
            )
        return known

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output):
        missed = self._plan.sites.keys() - self._ran
        if missed and not self._plan.checked:
            raise BatchError(
                "the model read these modules' weights without calling them, so their adapters never ran:\n  "
                + "\n  ".join(sorted(missed)),
                "leave these sites out (target_modules)",
            )
        self._plan.checked = True
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._by_cache[cache] = self._sequences
        return output

    # --- a site's hooks ----------------------------------------------------------------------------------------

    def _hook(self, path: str) -> list:
        module = self.base.get_submodule(path)

        def before(module: nn.Module, args: tuple, kwargs: dict):
            modification = self._plan.sites.get(path)
            if modification is None:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            if self._plan.rows not in (None, x.shape[0]):
                raise BatchError(
                    f"{path} sees {x.shape[0]} rows where adapters were given for {self._plan.rows}",
                    "give one adapter expression (or None) for each row; beams are not supported",
                )
            modification = modification.to(x.device, x.dtype)
            step = Step(self._mask, self._state(path, modification), self.training)
            self._steps.setdefault(path, []).append((modification, step))
            if not modification.changes_input:
                return None
            change = modification.delta_in(x, step)
            if change is None:
                return None
            x = x + change
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def after(module: nn.Module, args: tuple, kwargs: dict, output):
            if self._plan.sites.get(path) is None:
                return None
            modification, step = self._steps[path].pop()
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            change = modification.delta_out(x, y, step)
            self._ran.add(path)
            if change is None:
                return None
            y = y + change.to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _state(self, path: str, modification: Modification) -> dict:
        if not modification.stateful or self._sequences.states is None:
            return {}
        return self._sequences.states.setdefault(path, {})
