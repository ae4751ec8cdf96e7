"""Attaching: what a base needs so that adapters run on it, placed once, whatever their number; a plan says what runs where.

It also holds the promises of a batch: the rows are the rows given, positions come from the mask, streaming state
belongs to its key-value cache, and a modification whose site never ran is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from adapterhub.data.padding import Padding
from adapterhub.errors import BatchError, UnsafeFile
from adapterhub.runtime import attention, hooks
from adapterhub.runtime.forward import Call, Followed, Forward, Plan, Sequences, call_of, called, current, enter
from adapterhub.sites import Site, Tap, layer_of, sites, tapped

GIVEN = (
    "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids", "decoder_inputs_embeds"
)  # fmt: skip
"""What a model may be called with, rows first."""
_LOCK = RLock()
_KNOWN: WeakValueDictionary[int, Attachment] = WeakValueDictionary()
"""By the base's identity. What lies in a base are functions that find an attachment through the call: a copy's find none."""


class Attachment:
    """One base model that adapters run on; get it with `Attachment.of(base)`: there is one, whoever uses the base."""

    @classmethod
    def of(cls, base: nn.Module) -> Attachment:
        with _LOCK:
            known = _KNOWN.get(id(base)) or cls(base)
            return _KNOWN.setdefault(id(base), known)

    def __init__(self, base: nn.Module):
        self.base = base
        self.paths: dict[nn.Module, str] = {}
        """The modules where adapters may act by now."""
        self.closed = False
        """The base's weights are others now (folded): whoever holds this attachment must load again."""
        self._roots = [base]
        self._encoder = ""
        if base.config.is_encoder_decoder:  # generate calls the encoder by itself
            encoder = base.get_encoder()
            self._encoder = next(path for path, module in base.named_modules() if module is encoder) + "."
            self._roots.append(encoder)
        self._padding = Padding(base)
        self._layers = getattr(base.config.get_text_config(), "num_hidden_layers", None)
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._taps: dict[Tap, Site] = {}
        """The site that each reads."""

    @contextmanager
    def running(self, plan: Plan, training: bool = False) -> Iterator[None]:
        """Forward passes inside run this plan (training: with dropout); those outside run the bare base."""
        self._place(plan)
        with called(Call(self, plan, training), self._roots):
            yield

    def _place(self, plan: Plan) -> None:
        """Let adapters act wherever the plan says that something happens."""
        if plan.placed is self.paths and all(map(hooks.placed, self.paths)):
            return
        with _LOCK:
            for tap in plan.taps:
                if tap not in self._taps:
                    self._taps[tap] = tapped(sites(self.base), tap)
            wanted = plan.sites.keys() | plan.attending | {self._taps[tap].module for tap in plan.taps}
            for root in self._roots:
                if _before_model not in root._forward_pre_hooks.values():
                    root.register_forward_pre_hook(_before_model, with_kwargs=True)
                    root.register_forward_hook(_after_model, with_kwargs=True)
            if plan.attending:
                attention.use(self.base)
            for module in self.paths:
                hooks.place(module)  # where something else has given it a forward since
            for path in sorted(wanted - set(self.paths.values())):
                module = self.base.get_submodule(path)
                hooks.place(module)
                self.paths[module] = path
            plan.placed = self.paths

    def detach(self) -> None:
        """Take everything off: the base is as it was."""
        with _LOCK:
            for module in self.base.modules():
                hooks.remove(module)
                for hooked in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [key for key, hook in hooked.items() if hook in (_before_model, _after_model)]:
                        for table in (hooked, module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                            table.pop(key, None)
                checkpoint = module.__dict__.get("_gradient_checkpointing_func")
                if isinstance(checkpoint, Followed):
                    module._gradient_checkpointing_func = checkpoint.checkpoint
            self.paths = {}
            attention.restore(self.base)

    def close(self) -> None:
        """Detach for good: the base has been changed."""
        self.detach()
        self.closed = True
        with _LOCK:
            _KNOWN.pop(id(self.base), None)

    # --- one forward pass --------------------------------------------------------------------------------------

    def begin(self, root: nn.Module, plan: Plan, training: bool, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Enter a forward pass under the plan. Returns the model's arguments as the pass needs them."""
        key, given, args, kwargs = _given(root, args, kwargs)
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
        cache, memories, mask = kwargs.get("past_key_values"), plan.memories(), kwargs.get("attention_mask")
        both, flat = self.base.config.is_encoder_decoder, isinstance(mask, Tensor) and mask.ndim == 2
        self._require_able(plan, bool(memories), kwargs)
        seen = cache.get_seq_length() if cache is not None else 0
        ids = (kwargs[key] if key else args[0]) if key in ("", "input_ids") and given.ndim == 2 else None
        kwargs = self._padding.accounted(mask if flat else None, rows, seen, tokens, kwargs, ids)
        if plan.advances:
            kwargs = self._padding.advanced(plan.advances, kwargs, seen, tokens, given.device)
        self._padding.context.check_pass(seen, tokens, max(plan.advances, default=0), kwargs)
        sequences = self._continued(plan, cache, seen) if seen else None
        if sequences is None:
            sequences = Sequences(plan, states=None if torch.is_grad_enabled() else {})
        sequences.seen = seen + tokens
        forward = Forward(
            root=root,
            plan=plan,
            paths=self.paths,
            mask=mask[:, -tokens:].bool() if flat and not both else None,
            encoder_mask=mask.bool() if flat and both else None,
            encoder=self._encoder,
            shape=(rows, tokens) if not both and (ids is not None or key == "inputs_embeds") else None,
            sequences=sequences,
            training=training,
            memories=memories,
            begins=not seen,
            outer=current(),
            taps=self._tapped_at(plan),
        )
        enter(forward)
        if torch.is_grad_enabled():
            self._follow_checkpoints()
        return args, kwargs

    def _require_able(self, plan: Plan, remembers: bool, kwargs: dict) -> None:
        """Raise BatchError for a call that this plan cannot run in."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if plan.taps and isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise BatchError(
                "an adapter reads other sites' states, and at its site only chosen tokens would stand",
                "give logits_to_keep as a number: the last tokens",
            )
        if plan.stateful and self.base.config.is_encoder_decoder:
            raise BatchError("a form with streaming state runs in no encoder-decoder", "leave that adapter out")
        if remembers and getattr(cache, "is_compileable", False):
            raise BatchError("a prefix does not run with a static cache", "leave cache_implementation out")
        if remembers and (kwargs.get("output_attentions") or getattr(self.base.config, "output_attentions", False)):
            raise BatchError("with a prefix an attention gives no weights", "leave output_attentions out")
        flat = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        if not flat and (plan.stateful or plan.bidirectional):
            raise BatchError("a form that reads other tokens needs a mask of two dimensions", "give (rows, tokens)")

    def _tapped_at(self, plan: Plan) -> dict[str, dict[Tap, Site]]:
        found: dict[str, dict[Tap, Site]] = {}
        for tap in plan.taps:
            found.setdefault(self._taps[tap].module, {})[tap] = self._taps[tap]
        return found

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
            if checkpoint is not None and not isinstance(checkpoint, Followed):
                layer._gradient_checkpointing_func = Followed(checkpoint)

    def end(self, forward: Forward, kwargs: dict, output):
        """Leave a forward pass: what was promised of it is checked."""
        checked = forward.plan.checked
        if not checked:
            forward.check_range()
        self._check_ran(forward, kwargs)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._by_cache[cache] = forward.sequences
        if forward.plan.lanes is None:
            return None
        if getattr(output, "logits", None) is None:
            raise BatchError("an ensemble weighs logits, and this model gives none", "use a model with a head")
        lanes, output["logits"] = output.logits, forward.plan.lanes.combine(output.logits)
        if not (checked or lanes.is_meta) and lanes.isfinite().all() and not output.logits.isfinite().all():
            raise UnsafeFile("the ensemble's weights take its logits out of range", "give smaller weights")
        return output

    def _check_ran(self, forward: Forward, kwargs: dict) -> None:
        """Raise BatchError for a site that was not called."""
        missed = (forward.plan.sites.keys() | forward.memories.keys()) - forward.ran
        embedded = kwargs.get("inputs_embeds") is not None and {path for path in missed if _embeds(self.base, path)}
        if embedded:
            raise BatchError(
                f"inputs_embeds take the place of {min(embedded)}, where an adapter acts: it had no say",
                "give input_ids, or leave that site out (target_modules)",
            )
        if kwargs.get("encoder_outputs") is not None:  # the encoder ran before, by itself
            missed = {path for path in missed if not path.startswith(self._encoder)}
        layers = getattr(self.base.config.get_text_config(), "num_hidden_layers", None)
        early = layers != self._layers and not self._encoder
        if early:  # the layers above an early exit draft nothing
            missed = {path for path in missed if not _above(path, layers)}
        dropped = forward.plan.checked and self.base.training  # training may leave out layers by chance
        if missed and forward.begins and not dropped:
            words = "\n  ".join(sorted(missed))
            raise BatchError(
                f"the model read these modules' weights without calling them, so their adapters never ran:\n  {words}",
                "leave these sites out (target_modules)",
            )
        forward.plan.checked |= not (missed or early)


def _above(path: str, layers: int) -> bool:
    """Whether a module lies in a layer that an early exit leaves out."""
    return (layer_of(path) or 0) >= layers


def _embeds(base: nn.Module, path: str) -> bool:
    return base.get_submodule(path) is base.get_input_embeddings()


@cache
def _names(model: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a model's forward takes, in order."""
    return tuple(inspect.signature(model.forward).parameters)[1:]


def _given(root: nn.Module, args: tuple, kwargs: dict) -> tuple[str, Tensor, tuple, dict]:
    """What the model is given: its name ("" for the first of `args`), the tensor, and the arguments, by name if several."""
    if len(args) > 1:
        kwargs, args = {**dict(zip(_names(type(root)), args, strict=False)), **kwargs}, ()
    named = [*((name, kwargs.get(name)) for name in GIVEN), *(("", value) for value in args)]
    key, given = next(((name, value) for name, value in named if isinstance(value, Tensor)), ("", None))
    if given is None or given.ndim < 2:
        raise BatchError("the model was given no batch", "give input_ids of (rows, tokens)")
    return key, given, args, kwargs


# The hooks of every base and of its copies: functions of this module, which know their model by being called with it.


def _before_model(module: nn.Module, args: tuple, kwargs: dict):
    call, now = call_of(module), current()
    if call is None:
        return None
    if now is not None and call_of(now.root) is call:
        if now.root is call.attachment.base and module is not now.root:
            return None  # the encoder, inside the whole model's forward pass
        enter(now.outer)  # an error ended that pass
    return call.attachment.begin(module, call.plan, call.training, args, kwargs)


def _after_model(module: nn.Module, args: tuple, kwargs: dict, output):
    now = current()
    if now is None or now.root is not module:
        return None
    enter(now.outer)
    call = call_of(module)
    if call is not None and module is call.attachment.base:
        return call.attachment.end(now, kwargs, output)
    if not now.plan.checked:
        now.check_range()
    return None
