"""The runtime: a base model with composed adapters on it, each row of a batch its own; inference and continued tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterhub.adapters.fit import check_fit
from adapterhub.adapters.names import named_tensors
from adapterhub.bases import loading, resolution
from adapterhub.bases.device import precision
from adapterhub.bases.fingerprint import Fingerprint, fingerprint
from adapterhub.data.batches import pad_left, pad_token
from adapterhub.data.context import Context
from adapterhub.data.encoding import opened
from adapterhub.errors import NotFoldable, UsageError
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.ensemble import repeated
from adapterhub.runtime.fold import fold
from adapterhub.runtime.forward import Plan
from adapterhub.runtime.plan import assemble, batch, copied, furthest, placed, stacked
from adapterhub.runtime.plan_cache import PlanCache
from adapterhub.runtime.residents import Residents
from adapterhub.sites import sites
from adapterhub.spec.expression import Ensemble, Node, Ref, references
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference, check_name, check_version
from adapterhub.store.expand import pin
from adapterhub.store.releases import Releases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Adapters = str | Sequence[str | None] | None
"""One expression for all rows, or one (or None, the bare base) for each row. None: what the model runs by default."""


def load(
    hub: Releases,
    base: object,
    expression: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trainable: Sequence[str] = (),
    force: bool = False,
) -> Model:
    """A base with an expression's adapters on it. base: known name, folder, repo id, or a loaded transformers model, which
    is frozen (then dtype and device are its own). dtype: as in `train`. force loads adapters that were made for another base.

    Raises NotFound, IncompatibleBase, ExpressionError, PluginError; UsageError for a trainable that is not in it."""
    if isinstance(base, nn.Module):
        model, print_of_base = base.requires_grad_(False), fingerprint(base)
        origin = base.config.name_or_path
        tokenizer = loading.load_tokenizer(resolution.ResolvedBase(origin, Path(origin))) if origin else None
    else:
        resolved = resolution.resolve(base)
        model = loading.load_model(resolved, "auto" if dtype == "stored" else precision(dtype, device), device)
        tokenizer, print_of_base = loading.load_tokenizer(resolved), fingerprint(resolved)
    loaded = Model(model, tokenizer, hub=hub, fingerprint=print_of_base, force=force)
    loaded.use(expression, trainable)
    return loaded


class Model:
    """A transformers model that runs adapters. Several threads may call it, and several models on one base, at once; `use`,
    training and what changes the base (`fold`, `detach`) are for one thread while no other calls."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        hub: Releases | None = None,
        fingerprint: Fingerprint | None = None,
        force: bool = False,
    ):
        self.base, self.tokenizer, self.hub, self.fingerprint = base, tokenizer, hub, fingerprint
        self.sites, self.context = sites(base), Context.of(base)
        self._residents = Residents(base, self.sites, hub, fingerprint, force)
        self._attachment = Attachment.of(base)
        self._attached = True
        self._training_mode = False
        self._default: str | None = None
        self._trainable: dict[str, Modifications] = {}  # by "name@version"; they hold nn.Parameters
        self._new: Modifications = {}
        self._bare = False  # True inside of `without_new`
        self._plans = PlanCache.beside(self.base)
        self._looked_up = 0  # how often names were: a cache that was filled before is not continued after

    @property
    def device(self) -> torch.device:
        return self.base.device

    # --- what runs ---------------------------------------------------------------------------------------------

    def use(self, expression: str | None, trainable: Sequence[str] = ()) -> None:
        """What runs where a call names no adapters. Tensors of the trainable ones become float32 parameters (those that
        train already stay the same parameters). Names are looked up again. Refused, it changes nothing."""
        self._require_attached()
        self._residents.forget()
        self._looked_up += 1
        node = self._residents.node(expression)
        leaves = {str(ref) for ref in references(node)} if node else set()
        chosen: dict[str, Modifications] = {}
        for text in trainable:
            key = str(pin(self.hub, Ref(Reference.parse(text))))
            if key not in leaves:
                raise UsageError(f"{text!r} is not in {expression!r}, so it cannot be trained there", "add it: 'a + b'")
            chosen[key] = self._trainable.get(key) or self._residents.trainable(key)
        before = self._default, self._trainable
        self._default, self._trainable = expression, chosen
        self._plans.clear()
        try:
            self._plan(expression, None)  # what does not fit is refused here, not at the first call
        except BaseException:
            self._default, self._trainable = before
            self._plans.clear()
            raise

    def attach_new(self, modifications: Mapping[str, Modification | Sequence[Modification]]) -> None:
        """Put fresh modifications, to be trained, on top of what runs by default."""
        parts = {path: [part] if isinstance(part, Modification) else list(part) for path, part in modifications.items()}
        check_fit(parts, self.sites, "the new adapter")
        self._new = self._residents.parameters(parts)
        self._plans.clear()

    def parts(self, expression: str | None) -> Modifications:
        """What an expression (no ensemble) does at each site."""
        return assemble(self._residents.node(expression), self._adapter, join=False)

    def _adapter(self, key: str) -> Modifications:
        return self._trainable.get(key) or self._residents.get(key)

    def _program(self, node: Node | None) -> Modifications:
        """What a row runs at each module, new modifications on top included."""
        parts = assemble(node, self._adapter, not self._trains, self.sites)
        return stacked([parts, placed(self._new, self.sites)]) if self._new and not self._bare else parts

    @contextmanager
    def without_new(self) -> Iterator[None]:
        """Calls inside run what lies beneath alone, without gradients or dropout: the reference on the same resident base."""
        before, trained, self._bare = self._bare, self._training_mode, True
        self.training_mode(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self._bare = before
            self.training_mode(trained)

    @property
    def _trains(self) -> bool:
        return bool(self._trainable or self._new)

    def _plan(self, adapters: Adapters, rows: int | None) -> Plan:
        asked = (adapters,) if isinstance(adapters, str | None) else tuple(adapters)
        key = (asked, rows, self._bare, self._looked_up)

        def make() -> tuple[Plan, int]:
            nodes = [self._residents.node(one) for one in asked]
            with torch.inference_mode(False), torch.set_grad_enabled(self._trains):  # kept for calls in other modes
                plan = batch(nodes, self._program, rows, key, self._trains)
            names = {str(each) for node in nodes if node for each in references(node)}
            return plan, 0 if self._trains else copied(plan, map(self._adapter, names))

        return self._plans.get(key, make)

    @contextmanager
    def running(self, adapters: Adapters = None, rows: int | None = None):
        """Calls of `self.base` inside run these adapters (`rows`: how many rows a single expression is for)."""
        self._require_attached()
        if adapters is None:
            adapters = self._default
        if not isinstance(adapters, str | None):
            if not isinstance(adapters, list | tuple) or not all(isinstance(row, str | None) for row in adapters):
                raise UsageError(f"adapters is {adapters!r}", "give an expression, or a list with one (or None) a row")
            rows = len(adapters)
        with self._attachment.running(self._plan(adapters, rows), self._training_mode):
            yield

    def _require_attached(self) -> None:
        if not self._attached or self._attachment.closed:
            raise UsageError("this model is detached or folded", "use the transformers model you got, or load it again")

    def keeps_state(self, adapters: Adapters = None) -> bool:
        """Whether a key-value cache of these adapters cannot be repeated or cut: it has streaming state, or lanes."""
        return (plan := self._planned(adapters)).stateful or plan.for_rows is not None

    def advance(self, adapters: Adapters = None) -> int:
        """How many positions these adapters' prefixes take before the tokens, at most."""
        return furthest(self._planned(adapters))

    def _planned(self, adapters: Adapters) -> Plan:
        adapters = self._default if adapters is None else adapters
        return self._plan(adapters, None if isinstance(adapters, str | None) else len(adapters))

    # --- calls, as transformers has them -----------------------------------------------------------------------

    def __call__(self, *args, adapters: Adapters = None, **kwargs):
        """The base's forward pass with these adapters; the logits are at `.logits`, (rows, tokens, vocabulary)."""
        with self.running(adapters):
            return self.base(*args, **kwargs)

    def generate(self, *args, adapters: Adapters = None, **kwargs) -> Tensor:
        """transformers' generate. num_return_sequences repeats each row's adapters with it; beams are refused."""
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.base.generation_config
        repeats = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
        if adapters is not None and not isinstance(adapters, str):
            adapters = [expression for expression in adapters for _ in range(repeats)]
            if self.base.config.is_encoder_decoder:  # its encoder runs before transformers repeats the rows
                args, kwargs = repeated(args, kwargs, repeats)
        with torch.no_grad(), self.running(adapters):
            self.context.check_call(config, args, kwargs, self.advance(adapters))
            return self.base.generate(*args, **kwargs)

    def complete(
        self, texts: Sequence[str], adapters: Adapters = None, max_new_tokens: int = 20, **kwargs
    ) -> list[str]:
        """Texts in, their continuations out (greedy unless options of `generate` say else)."""
        if self.tokenizer is None:
            raise UsageError("this base has no tokenizer", "tokenise yourself and call generate(input_ids=...)")
        if isinstance(texts, str) or not texts:
            raise UsageError(f"texts is {texts!r}", "give a list of at least one text")
        if not all(ids := [opened(self.tokenizer, text) for text in texts]):
            raise UsageError("an empty text gives the model nothing to go on from", "give at least one token each")
        pad = pad_token(self.tokenizer)
        batch, mask = (tensor.to(self.device) for tensor in pad_left(ids, pad))
        kwargs = {"do_sample": False, "pad_token_id": pad, "max_new_tokens": max_new_tokens, **kwargs}
        out = self.generate(input_ids=batch, attention_mask=mask, adapters=adapters, **kwargs)
        start = 0 if self.base.config.is_encoder_decoder else batch.shape[1]
        return self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)

    # --- training ----------------------------------------------------------------------------------------------

    def training_mode(self, on: bool) -> None:
        """Dropout in the adapters and in the base."""
        self._training_mode = on
        self.base.train(on)

    def trainable_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by stored name, prefixed where several adapters train."""
        together = [*self._trainable.items(), *([("new", self._new)] if self._new else [])]
        named = [(key, name, t) for key, parts in together for name, t in named_tensors(parts).items()]
        prefix = len(together) > 1
        return {f"{key}:{name}" if prefix else name: t for key, name, t in named if isinstance(t, nn.Parameter)}

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.trainable_tensors().values())

    def new_modifications(self) -> Modifications:
        return self._new

    @torch.no_grad()
    def after_step(self) -> None:
        """In a loop of your own, after each optimiser step: what methods keep true (LoReFT's R stays orthonormal)."""
        for key, parts in self._trainable.items():
            if (method := self._residents.method(key)) is not None:
                method.after_step({path: part for path, [part] in parts.items()})

    def _trainable_key(self, text: str) -> str:
        wanted = Reference.parse(text)
        for key in self._trainable:
            if wanted.name == key.partition("@")[0] and wanted.at in (None, key.partition("@")[2]):
                return key
        raise UsageError(f"{text!r} is not trainable here", f"trainable: {', '.join(self._trainable) or 'nothing'}")

    def save(self, name: str, version: str | None = None) -> Release:
        """A new version of a trainable adapter, with its tensors as they are now, made from the one it goes on from."""
        from adapterhub.adapters.publish import publish_next

        if version is not None:
            check_version(version)
        key = self._trainable_key(check_name(name))
        node = self._residents.node(self._default)
        return publish_next(self.hub, key, self._trainable[key], node, self.fingerprint, version)

    # --- for good ----------------------------------------------------------------------------------------------

    def fold(self) -> PreTrainedModel:
        """The default expression folded into the base's weights, for good; returns the plain model. See adapterhub.runtime.fold."""
        self._require_attached()
        node = self._residents.node(self._default)
        if isinstance(node, Ensemble):
            raise NotFoldable(f"{node} weighs whole models, which is no change of one", "run it attached")
        fold(self.base, self._program(node))
        self._attachment.close()
        return self.base

    def detach(self) -> PreTrainedModel:
        """Take everything off again; returns the plain transformers model. This Model takes no more calls."""
        self._attachment.detach()
        self._attached = False
        return self.base
