"""Attaching: one pair of hooks per site, placed once, whatever the number of adapters; a plan says what runs where.

The hooks also hold the promises of a batch: the rows are the rows given, positions come from the mask, streaming state
belongs to its key-value cache, and a modification whose site never ran is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapterhub import attention, hooks
from adapterhub.errors import BatchError
from adapterhub.forward import Forward, Plan, Sequences
from adapterhub.modification import Tap
from adapterhub.sites import Site, family, sites, tapped

GIVEN = (
    "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids", "decoder_inputs_embeds"
)  # fmt: skip
"""What a model may be called with, rows first."""


class Attachment:
    """The hooks on one base model; get it with `Attachment.of(base)`: there is one, whoever uses the base."""

    @classmethod
    def of(cls, base: nn.Module) -> Attachment:
        return base.__dict__.get("_adapterhub") or cls(base)

    def __init__(self, base: nn.Module):
        self.base = base
        self.plan: Plan | None = None
        self._training = False
        self.forward: Forward | None = None
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._takes_positions = (
            "position_ids" in inspect.signature(base.forward).parameters
            and not family(base.config.model_type).own_positions
        )
        self._window = getattr(base.config.get_text_config(), "sliding_window", None)
        self._encoder = ""
        self._hooks: dict[str, list] = {}
        self._taps: dict[Tap, Site] = {}
        """The site that each reads."""
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
        self._place(plan)
        previous, self.plan, self._training = (self.plan, self._training), plan, training
        try:
            yield
        finally:
            (self.plan, self._training), self.forward = previous, None

    def _place(self, plan: Plan) -> None:
        """Hooks wherever the plan says that something happens."""
        if plan.attending:
            attention.use(self.base)
        for path in plan.attending - self._attending:
            self._attending.add(path)
            hooks.remember(self, path)
        for tap in plan.taps:
            if tap not in self._taps:
                self._taps[tap] = tapped(sites(self.base), tap)
        read = {self._taps[tap].module for tap in plan.taps}
        for path in (plan.sites.keys() | read) - self._hooks.keys():
            self._hooks[path] = hooks.site_hooks(self, path)

    def tapped_at(self, path: str) -> dict[Tap, Site]:
        """The taps of the pass at hand at this module, and the site that each reads."""
        return {tap: self._taps[tap] for tap in self.forward.plan.taps if self._taps[tap].module == path}

    def in_encoder(self, path: str) -> bool:
        """Whether it lies in the encoder of a model that has a decoder too."""
        return bool(self._encoder) and path.startswith(f"{self._encoder}.")

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
        if self.forward is not None and module is not self.base:
            return None  # the encoder, inside the whole model's forward pass
        self.forward = None
        plan = self.plan
        if plan is None:
            return None
        given = next((v for v in (*map(kwargs.get, GIVEN), *args[:1]) if isinstance(v, Tensor)), None)
        if given is None or given.ndim < 2:
            raise BatchError("the model was given no batch", "give input_ids of (rows, tokens)")
        rows, tokens = given.shape[:2]
        if plan.for_rows is not None:
            plan = plan.for_rows(rows)
            self._place(plan)
        if plan.rows not in (None, rows):
            raise BatchError(
                f"adapters were given for {plan.rows} rows, the batch has {rows}",
                "give one adapter expression (or None) for each row; beams are not supported",
            )
        if plan.lanes is not None:
            args, kwargs = plan.lanes.spread(args, kwargs)
            rows = len(plan.lanes.rows)
        if plan.taps and isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise BatchError(
                "an adapter reads other sites' states, and at its site only chosen tokens would stand",
                "give logits_to_keep as a number: the last tokens",
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        flat = self.base.config.is_encoder_decoder and isinstance(mask, Tensor) and mask.ndim == 2
        encoder_mask = mask.bool() if flat else None
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
            if seen and self._window and mask.shape[1] > self._window and (mask.diff(dim=1) < 0).any():
                raise BatchError(
                    "padding stands between a row's tokens, and this model's sliding window counts it",
                    "pad on the left",
                )
            if self._takes_positions and kwargs.get("position_ids") is None and mask.shape[1] == seen + tokens:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                kwargs["position_ids"] = positions[:, -tokens:]
            mask = None if self.base.config.is_encoder_decoder else mask[:, -tokens:].bool()
        elif mask is not None and (plan.stateful or plan.bidirectional):
            raise BatchError(
                "a form that reads other tokens needs a two-dimensional attention mask", "give (rows, tokens)"
            )
        else:
            mask = None
        if plan.advances:
            self._advance(plan, kwargs, seen, tokens, given)
        sequences = self._continued(plan, cache, seen) if seen else None
        if sequences is None:
            sequences = Sequences(plan, states=None if torch.is_grad_enabled() else {})
        sequences.seen = seen + tokens
        self.forward = Forward(module, plan, mask, encoder_mask, sequences, self._training, memories, begins=not seen)
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

    def _continued(self, plan: Plan, cache: object, seen: int) -> Sequences | None:
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
                    forward = self.forward

                    def again(*args, **kwargs):
                        previous, self.forward = self.forward, forward
                        try:
                            return function(*args, **kwargs)
                        finally:
                            self.forward = previous
                            hooks.own_weights(self.base, forward)  # it ends as soon as it has what backward needs

                    return _checkpoint(again, *args, **kwargs)

                followed.followed = True
                layer._gradient_checkpointing_func = followed

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output):
        if self.forward is None or self.forward.root is not module:
            return None
        forward, self.forward = self.forward, None
        if module is not self.base:
            return None
        missed = (forward.plan.sites.keys() | forward.memories.keys()) - forward.ran
        if kwargs.get("encoder_outputs") is not None:  # the encoder ran before, by itself
            missed = {path for path in missed if not path.startswith(f"{self._encoder}.")}
        dropped = forward.plan.checked and self.base.training  # training may leave out layers by chance
        if missed and forward.begins and not dropped:
            raise BatchError(
                "the model read these modules' weights without calling them, so their adapters never ran:\n  "
                + "\n  ".join(sorted(missed)),
                "leave these sites out (target_modules)",
            )
        forward.plan.checked |= not missed
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._by_cache[cache] = forward.sequences
        if forward.plan.lanes is None:
            return None
        if getattr(output, "logits", None) is None:
            raise BatchError("an ensemble weighs logits, and this model gives none", "use a model with a head")
        output["logits"] = forward.plan.lanes.combine(output.logits)
        return output
