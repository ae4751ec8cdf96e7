"""How many tokens a base can read at once: rows, prompts and what is generated stay within it.

Learned positions end: token n + 1 of a base that has n of them is an index error in the middle of a forward pass, so it is refused
before. Rotary and relative positions do not end: beyond what a base was trained for it still computes, and a warning says so.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterhub.errors import BatchError, ContextWarning, UsageError
from adapterhub.sites import family

if TYPE_CHECKING:
    from adapterhub.data.encoding import Example

ABSOLUTE = re.compile(r"(^|\.)(wpe|\w*position\w*embed\w*|\w*embed\w*position\w*)$")
"""Modules that give each place of a row a vector of its own, learned or of waves."""
_ENDS = {"mpt": "max_seq_len", "ctrl": "n_positions"}
"""Architectures whose table of biases or waves is no module, and what their configs call its length."""
_OTHERS = ("vision", "visual", "image", "patch", "audio", "speech")
"""Parts of a path under which positions are not those of tokens."""


@dataclass(frozen=True)
class Context:
    """The bounds of one base; None: none."""

    both: bool
    """Whether it has an encoder and a decoder."""
    learned: int | None
    """Positions that a decoder's, or the only, tokens can have."""
    encoder: int | None
    """The same of an encoder's tokens, where a model has both halves."""
    trained: int | None
    """Tokens that its config names as the most, where positions do not end (`max_position_embeddings`)."""

    @classmethod
    def of(cls, base: nn.Module) -> Context:
        config, own = base.config.get_text_config(), family(base.config.model_type).own_positions
        both, counts = base.config.is_encoder_decoder, {"encoder": [], "decoder": []}
        for path, module in base.named_modules():
            if any(part in path for part in _OTHERS):
                continue
            half = "encoder" if both and "encoder." in f"{path}." else "decoder"
            if ABSOLUTE.search(path) and isinstance(module, nn.Embedding):
                before = getattr(module, "offset", 0) or (module.padding_idx + 1 if own and module.padding_idx else 0)
                counts[half].append(module.num_embeddings - before)
            elif isinstance(table := getattr(module, "embed_positions", None), Tensor) and table.ndim == 2:
                counts[half].append(len(table))  # GPT-J's waves are a table, and end like one
        if (ends := _ENDS.get(base.config.model_type)) is not None:
            counts["decoder"].append(getattr(config, ends))
        learned, encoder = (min(found, default=None) for found in (counts["decoder"], counts["encoder"]))
        trained = getattr(config, "max_position_embeddings", None) if learned is None else None
        return cls(both, learned, encoder, trained if isinstance(trained, int) and trained > 0 else None)

    def check_rows(self, examples: Iterable[Example], advance: int = 0) -> None:
        """Raise UsageError for rows with more tokens than learned positions, warn (ContextWarning) of rows beyond what the base was
        trained for. advance: positions that prefixes take before the row."""
        longest = max(examples, key=lambda example: len(example.ids))
        told = f"the row of line {longest.line} has {len(longest.ids)} tokens"
        if advance:
            told += f" after {advance} of a prefix"
        if self.learned is not None and len(longest.ids) + advance > self.learned:
            raise UsageError(
                f"{told}, and this base has learned {self.learned} positions",
                f"cut rows (--max-length {max(8, self.learned - advance)}), or take a base that reads more",
            )
        if self.trained is not None and len(longest.ids) + advance > self.trained:
            warnings.warn(f"{told}, and this base was trained for {self.trained}", ContextWarning, stacklevel=3)

    def room(self, prompt: int, advance: int = 0) -> int:
        """How many new tokens a prompt of so many leaves; at least one, which `check_call` then refuses."""
        return sys.maxsize if self.learned is None else max(1, self.learned - prompt - advance + 1)

    def check_call(self, config: Any, args: tuple, kwargs: Mapping[str, Any], advance: int = 0) -> None:
        """The same of a call of `generate`, whose beams are refused: of its longest prompt with the new tokens, the last of which is not read again. config:
        the generation config that holds where the call says nothing. Raises BatchError."""
        if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
            raise BatchError(
                "beam search moves rows between adapters, and is refused", "use num_beams=1; sampling works"
            )
        lengths = None if self.both or self.learned is self.trained is None else _planned(config, args, kwargs)
        if lengths is None:
            return
        prompt, new = lengths
        last = prompt + advance + new - 1
        if self.learned is not None and last > self.learned:
            room = self.learned - prompt - advance + 1
            raise BatchError(
                f"a prompt of {prompt} tokens and {new} new ones pass the {self.learned} positions that this base has learned",
                f"ask for {room} new tokens at most" if room > 0 else "give a shorter prompt",
            )
        if self.trained is not None and last > self.trained:
            told = (
                f"a prompt of {prompt} tokens and {new} new ones pass the {self.trained} that this base was trained for"
            )
            warnings.warn(told, ContextWarning, stacklevel=4)

    def check_pass(self, seen: int, tokens: int, advance: int, kwargs: Mapping[str, Any]) -> None:
        """Raise BatchError for a forward pass that would look up a position which is not there. seen: tokens in the cache. No
        tensor's numbers are looked at unless the padded length is too long."""
        if self.both:
            given, answer = kwargs.get("input_ids"), kwargs.get("decoder_input_ids", kwargs.get("labels"))
            if self.encoder is not None and isinstance(given, Tensor) and given.shape[-1] > self.encoder:
                raise _passed(given.shape[-1], self.encoder)
            tokens = answer.shape[1] if isinstance(answer, Tensor) and answer.ndim > 1 else -seen
        if self.learned is None or seen + tokens + advance <= self.learned:
            return
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if isinstance(positions, Tensor):
            used = int(positions.max()) + 1 if positions.numel() else 0
        elif isinstance(mask, Tensor) and mask.shape == (len(mask), seen + tokens) and not self.both:
            used = int(mask.sum(1).max()) + advance
        else:
            used = seen + tokens + advance
        if used > self.learned:
            raise _passed(used, self.learned)


def _passed(used: int, learned: int) -> BatchError:
    return BatchError(f"a row of {used} tokens passes the {learned} positions that this base has learned", "shorten it")


def _planned(config: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(tokens of the longest prompt, new tokens); None where they are not told before."""
    ids = next(
        (given for given in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]) if given is not None), None
    )
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    mask, new = kwargs.get("attention_mask"), kwargs.get("max_new_tokens")
    padded = isinstance(mask, Tensor) and mask.shape == ids.shape and ids.numel()
    if new is None and (length := kwargs.get("max_length")) is None:
        new, length = config.max_new_tokens, config.max_length
    if new is None:
        if length is None:
            return None
        new = max(length - ids.shape[1], 1)
    return int(mask.sum(1).max()) if padded else ids.shape[1], int(new)
