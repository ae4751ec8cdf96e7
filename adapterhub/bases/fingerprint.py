"""The fingerprint of a base model: what an adapter records of the model it was made for, and the check against it.

Three verdicts: the same weights, a rounded or quantised copy of them (loads with a warning), another model (refused).
The recipe, and what it cannot tell, is in docs/evidence/fingerprint.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub import plugins
from adapterhub.bases import sketch
from adapterhub.bases.compare import Verdict, compare_sketches
from adapterhub.bases.loading import load_model
from adapterhub.bases.resolution import ResolvedBase, quantised
from adapterhub.bases.tokenizer import tokenizer_digest
from adapterhub.errors import IncompatibleBase, IntegrityError
from adapterhub.files.bounded import read_json
from adapterhub.sites import weights
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File

if TYPE_CHECKING:
    from transformers import PreTrainedModel


COMPUTES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation"),
    *("activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling"),
)
"""Fields of a configuration that decide what the same weights compute. Those that both sides state are compared."""


class BaseWarning(UserWarning):
    """The base in use is not quite the one that the adapter was made for."""


class Fingerprint(NamedTuple):
    """What a manifest records of a base, and the blob it refers to."""

    base: Base
    sketch: bytes


class Quantised(Fingerprint):
    """The fingerprint of a base in use whose weights are not all plain."""

    numbers: Callable[[], bytes]
    """The sketch of what its layers multiply with, taken at the first call."""


def fingerprint(source: ResolvedBase | Path | PreTrainedModel, name: str = "", note: str = "") -> Fingerprint:
    """The fingerprint of a base's folder of safetensors (cached by its files' identity) or of a loaded model. Name and
    note go into the record; without them it is what the source says of itself.

    Raises NotFound, IntegrityError or UnsafeFile for a folder that is no checkpoint."""
    if isinstance(source, ResolvedBase):
        source, name, note = source.folder, name or source.name, note or source.note
    numbers = None
    if isinstance(source, Path):
        blob = sketch.of_folder(source)
        try:
            config = read_json((source / "config.json").read_bytes(), strict=False)
            architecture = config.get("model_type", "")
        except (OSError, ValueError, AttributeError):
            raise IntegrityError(f"{source} has no readable config.json", "get the base model again") from None
        if quantised(source):
            numbers = partial(_numbers_of, ResolvedBase(source.name, source))
        name = name or source.name
        tokens = tokenizer_digest(source)
    else:
        blob, architecture, config = sketch.of_model(source), source.config.model_type, source.config.to_dict()
        path = source.config.name_or_path
        name = name or (Path(path).name if Path(path).is_dir() else path) or architecture
        tokens = tokenizer_digest(Path(path))
        if weights.odd(source):
            numbers = partial(sketch.of_model, source, numbers=True)
    structure, _ = sketch.unpack(blob)
    base = Base(
        name=name,
        architecture=architecture,
        structure=digest_of(structure),
        sketch=File(digest=digest_of(blob), size=len(blob)),
        tokenizer=tokens,
        computes=_computes(config),
        note=note,
    )
    if numbers is None:
        return Fingerprint(base, blob)
    made = Quantised(base, blob)
    made.numbers = cache(numbers)
    return made


def _numbers_of(resolved: ResolvedBase) -> bytes:
    return sketch.of_model(load_model(resolved, "auto"), numbers=True)


def compare(recorded: Fingerprint, current: Fingerprint) -> Verdict:
    """What the current base is to the recorded one: by its tensors as it keeps them, else (quantised) by their numbers.

    Raises IntegrityError for a record that contradicts itself."""
    if recorded.base.architecture != current.base.architecture:
        reason = f"its architecture is {current.base.architecture}, the recorded base's {recorded.base.architecture}"
        return Verdict("another", inf, reason)
    for key in sorted(recorded.base.computes.keys() & current.base.computes.keys()):
        one, other = recorded.base.computes[key], current.base.computes[key]
        if one != other:
            return Verdict("another", inf, f"its configuration has {key} {other}, the recorded base's {one}")
    if recorded.sketch != current.sketch:
        for base, blob in (recorded, current):
            if digest_of(sketch.unpack(blob)[0]) != base.structure:
                raise IntegrityError(f"the record of the base model {base.name} is damaged", "get the adapter again")
    verdict = compare_sketches(recorded.sketch, current.sketch)
    if verdict.kind != "another" or not isinstance(current, Quantised):
        return verdict
    try:
        return compare_sketches(recorded.sketch, current.numbers())
    except IncompatibleBase as error:  # the library that it was quantised with is not here
        return replace(verdict, reason=f"{verdict.reason} ({error})")


def check_base(
    recorded: Base,
    recorded_sketch: bytes,
    current: Fingerprint | ResolvedBase | Path | PreTrainedModel,
    force: bool = False,
) -> Verdict:
    """Hold the base in use against the record of an adapter. A copy warns (BaseWarning) with the measured distance, and
    so does another tokenizer: with it the same text is other tokens.

    Raises IncompatibleBase for another model, unless forced: then that is a BaseWarning too."""
    if not isinstance(current, Fingerprint):
        current = fingerprint(current)
    verdict = compare(Fingerprint(recorded, recorded_sketch), current)
    told = f"made for {_named(recorded)}, used on {_named(current.base)}"
    if verdict.kind == "another":
        if not force:
            raise IncompatibleBase(
                f"the adapter was {told}, which is another model: {verdict.reason}",
                f"{_wanted(recorded)}, or --force to try it all the same",
            )
        warnings.warn(f"{told}, another model ({verdict.reason}); forced", BaseWarning, stacklevel=2)
    elif verdict.kind == "copy":
        warnings.warn(
            f"{told}: {verdict.reason}, {verdict.distance:.2g} apart (relative rms)", BaseWarning, stacklevel=2
        )
    if recorded.tokenizer and current.base.tokenizer and recorded.tokenizer != current.base.tokenizer:
        warnings.warn(f"{told}: its tokenizer is another", BaseWarning, stacklevel=2)
    return verdict


def _wanted(base: Base) -> str:
    """What to give instead. A name that we do not know is a folder's last part or a repo id, on another machine perhaps."""
    known = base.name in plugins.enabled_names("bases")
    return f"use --base {base.name}" if known else f"give the base it was made for ({base.name})"


def _computes(config: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration as JSON, the fields in COMPUTES that it states; rope's wherever its version keeps them."""
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    rope = config.get("rope_parameters")
    rope = (
        rope
        if isinstance(rope, dict)
        else {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    )
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") == "default":
        scaling = {"rope_type": "default"}
    config = {**config, "rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
    return {key: config[key] for key in COMPUTES if config.get(key) is not None}


def _named(base: Base) -> str:
    return f"{base.name} ({base.note})" if base.note else base.name
