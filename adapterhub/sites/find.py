"""Sites: the modules of a base model where a modification can sit, and their roles by architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterhub.errors import IncompatibleBase
from adapterhub.sites.families import family, first_match
from adapterhub.sites.site import Columns, Heads, Site
from adapterhub.sites.weights import embeds, unlike, widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapterhub.sites.site import Tap


def sites(model: PreTrainedModel) -> list[Site]:
    """The sites of a loaded model in its own order: every module with a role, every column range of a fused projection,
    and every other linear layer without a role. Modules of several names are listed once, under the first."""
    known = family(model.config.model_type)
    config = model.config.get_text_config()
    width, heads = config.hidden_size, _heads(config)
    found = []
    for path, module in model.named_modules():
        role, part = first_match(known.roles, path), first_match(known.parts, path)
        here = heads if role in ("attention", "attention_output") else None
        own = widths(module)
        if own is not None and (role or not embeds(module)):
            linear = not embeds(module)
            found.append(Site(path, role, own[1], own[0], linear, part, heads=here, packed=unlike(module)))
            found += _fused(first_match(known.fused, path, None), found[-1], heads) if linear else []
        elif own is None and role:
            found.append(Site(path, role, width, width, False, part, heads=here))
    biased = {
        path.rpartition(".")[0] for path, _ in model.named_parameters(remove_duplicate=False) if path.endswith(".bias")
    }
    causal = _causal(model)
    return [
        replace(
            site,
            bias=site.module in biased,
            model_type=model.config.model_type,
            causal=site.part != "encoder" if model.config.is_encoder_decoder else causal,
        )
        for site in found
    ]


def _causal(model: PreTrainedModel) -> bool:
    """Whether the attention of a model without encoder is causal; of one that says nothing: whether it generates."""
    said = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return any(said) if said else model.can_generate()


def tapped(sites: Sequence[Site], tap: Tap) -> Site:
    """The site that a tap reads. Raises IncompatibleBase if this base has no such site, or several."""
    found = [s for s in sites if (s.role, s.layer, s.part) == (tap.role, tap.layer, tap.part)]
    if len(found) != 1:
        where = f" of layer {tap.layer}" if tap.layer is not None else ""
        raise IncompatibleBase(
            f"this base has {len(found) or 'no'} sites {tap.role!r}{where}, where an adapter reads one",
            "use the base that the adapter was made for",
        )
    return found[0]


def _heads(config: Any) -> Heads | None:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    return Heads(
        queries,
        getattr(config, "num_key_value_heads", None) or queries,
        getattr(config, "head_dim", None) or config.hidden_size // queries,
    )


def _fused(table: Mapping[str, Any] | None, site: Site, heads: Heads | None) -> list[Site]:
    """The sites inside a fused projection: what stands there in which order, head by head or one block after another."""
    if table is None or heads is None:
        return []
    count = {"query": heads.queries, "key": heads.keys, "value": heads.keys}
    made, start = [], 0
    for role in table["order"]:
        if table["per_head"]:
            columns = Columns(start, heads.width, len(table["order"]) * heads.width, heads.queries)
            start += heads.width
        else:
            columns = Columns(start, heads.width * count[role], 0, 1)
            start += columns.length
        outputs = columns.length * columns.count
        path = f"{site.path}.{role}"
        made.append(Site(path, role, site.inputs, outputs, True, site.part, columns, packed=site.packed))
    return made
