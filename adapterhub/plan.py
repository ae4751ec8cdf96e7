"""From expressions to what runs at each site: adapters stacked, scaled, mixed, and batched row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from adapterhub.adapter import Modifications, check_range
from adapterhub.attach import Plan
from adapterhub.attention import Memory, advances, memories
from adapterhub.composers import Inside, Mix, Route, Scaled, Stack
from adapterhub.expression import Mix as MixNode
from adapterhub.expression import Node, Ref, Scale
from adapterhub.expression import Stack as StackNode
from adapterhub.modification import Modification
from adapterhub.sites import Site


def assemble(node: Node | None, adapter: Callable[[str], Modifications], join: bool) -> Modifications:
    """{site path: what happens there, in order} of an expression (None: the bare base).

    join makes one modification of several where a form can. Not while something trains: joining copies tensors."""
    match node:
        case None:
            return {}
        case Ref(reference):
            return adapter(str(reference))
        case Scale(weight, inner):
            scaled = {path: _scaled(parts, weight, join) for path, parts in assemble(inner, adapter, join).items()}
            check_range(scaled, f"{weight:g}*({inner})", torch.float32)
            return scaled
        case StackNode(nodes):
            many = [assemble(inner, adapter, join) for inner in nodes]
            return {path: _joined(parts, join) for path, parts in stacked(many).items()}
        case MixNode(nodes):
            many = [assemble(inner, adapter, join) for inner in nodes]
            return {path: _mixed([m[path] for m in many if path in m], join) for path in stacked(many)}


def stacked(many: Sequence[Modifications]) -> Modifications:
    """Several programs, one after the other."""
    paths = dict.fromkeys(path for parts in many for path in parts)
    return {path: [part for parts in many for part in parts.get(path, [])] for path in paths}


def placed(parts: Modifications, sites: Sequence[Site]) -> Modifications:
    """From sites to modules: what sits at columns of a fused projection becomes part of what its module does, after what
    the same adapter does to the whole of it."""
    fused = {site.path: site for site in sites if site.columns}
    if parts.keys().isdisjoint(fused):
        return parts
    result = {path: list(here) for path, here in parts.items() if path not in fused}
    for path, site in fused.items():
        inside = [Inside(part, site.columns) for part in parts.get(path, [])]
        if inside:
            result.setdefault(site.module, []).extend(inside)
    return result


def build(programs: Sequence[Modifications], rows: int | None, key: object, trains: bool = False) -> Plan:
    """The plan of a batch whose row i runs programs[i], or of any batch whose rows all run the one program. By module."""

    def gather() -> dict[str, Memory]:
        return memories(programs)

    gathered, moves = gather(), advances(programs)
    return Plan(
        batched(programs, join=not trains),
        rows,
        gather if trains else lambda: gathered,
        frozenset(gathered),
        tuple(moves) if any(moves) else (),
        key,
    )


def batched(rows: Sequence[Modifications], join: bool) -> dict[str, Modification]:
    """One modification a site for a batch whose row i runs rows[i]. Rows that run the same are the same object."""
    paths = dict.fromkeys(path for parts in rows for path in parts)
    return {path: _batched_at([parts.get(path, []) for parts in rows], join) for path in paths}


def _batched_at(rows: Sequence[list[Modification]], join: bool) -> Modification:
    """The k-th of every row together, form by form, so that each row keeps its order."""
    if all(row is rows[0] for row in rows):
        return Stack(rows[0])
    steps: list[Modification] = []
    for k in range(max(map(len, rows))):
        column = [row[k] if k < len(row) else None for row in rows]
        for kind in dict.fromkeys(type(part) for part in column if part is not None):
            members = [part if type(part) is kind else None for part in column]
            steps.append(kind.rows(members) if join else Route(members))
    return Stack(steps)


def _joined(parts: Iterable[Modification], join: bool) -> list[Modification]:
    """Neighbours of one form as one, where the form can."""
    result: list[Modification] = []
    for part in parts:
        alike = join and result and type(part) is type(result[-1])
        together = type(part).join([result[-1], part]) if alike else None
        if together is None:
            result.append(part)
        else:
            result[-1] = together
    return result


def _scaled(parts: list[Modification], weight: float, join: bool) -> list[Modification]:
    if join and all(part.additive for part in parts):  # then scaling distributes
        return [part.scaled(weight) for part in parts]
    return [Scaled(Stack(parts), weight)]


def _mixed(parts: list[list[Modification]], join: bool) -> list[Modification]:
    if join and all(part.additive for here in parts for part in here):  # then a mix is a stack
        return _joined((part for here in parts for part in here), join)
    return [Mix([Stack(here) for here in parts])]
