"""From expressions to what runs at each site: adapters stacked, scaled, mixed, and batched row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from adapterhub.adapters.fit import check_range
from adapterhub.errors import UsageError
from adapterhub.forms.composers import Inside, Mix, Scaled, Stack, scaled
from adapterhub.forms.gate import Gate
from adapterhub.forms.route import Route
from adapterhub.forms.route import rows as rows_of
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.runtime.attention import Memory, advances, memories
from adapterhub.runtime.ensemble import Lanes
from adapterhub.runtime.forward import Plan
from adapterhub.sites import Site
from adapterhub.spec.expression import Ensemble, Node, Ref, Scale
from adapterhub.spec.expression import Gate as GateNode
from adapterhub.spec.expression import Mix as MixNode
from adapterhub.spec.expression import Stack as StackNode


def assemble(
    node: Node | None, adapter: Callable[[str], Modifications], join: bool, sites: Sequence[Site] | None = None
) -> Modifications:
    """{path: what happens there, in order} of an expression (None: the bare base): by site, or, given the base's sites, by
    module. Only by module is the order of a stack whole: parts at columns of a module have a place among those at all of it.

    join makes one modification of several where a form can. Not while something trains: joining copies tensors."""

    def own(parts: Modifications) -> Modifications:
        return parts if sites is None else placed(parts, sites)

    match node:
        case None:
            return {}
        case Ref(reference):
            return own(adapter(str(reference)))
        case Scale(weight, inner):
            whole = assemble(inner, adapter, join, sites)
            multiplied = {path: _scaled(parts, weight, join) for path, parts in whole.items()}
            check_range(multiplied, f"{weight:g}*({inner})", torch.float32)
            return multiplied
        case StackNode(nodes):
            many = [assemble(inner, adapter, join, sites) for inner in nodes]
            return {path: _joined(parts, join) for path, parts in stacked(many).items()}
        case MixNode(nodes):
            many = [assemble(inner, adapter, join, sites) for inner in nodes]
            return {path: _mixed([m[path] for m in many if path in m], join) for path in stacked(many)}
        case GateNode(gate, nodes):
            many = [assemble(inner, adapter, join) for inner in nodes]  # a gate has a share for each site of its own
            return own(gated(adapter(str(gate)), many, str(gate)))


def gated(gates: Modifications, children: Sequence[Modifications], name: str) -> Modifications:
    """Gates over what their children do at each of their sites. Raises UsageError unless they are gates, and every
    site where a child acts has one."""
    if not all(len(here) == 1 and isinstance(here[0], Gate) for here in gates.values()):
        raise UsageError(f"{name} is no gate", "for example: gate(me/router, me/a, me/b), me/router trained as a gate")
    free = {path for child in children for path in child} - gates.keys()
    if free:
        raise UsageError(
            f"{name} has no gate at {min(free)}, where one of the adapters that it shall weigh acts",
            "train a gate over these adapters: adapterhub train --method gate --on A --on B",
        )
    return {path: [gate.over([Stack(c.get(path, [])) for c in children])] for path, [gate] in gates.items()}


def stacked(many: Sequence[Modifications]) -> Modifications:
    """Several programs, one after the other."""
    paths = dict.fromkeys(path for parts in many for path in parts)
    return {path: [part for parts in many for part in parts.get(path, [])] for path in paths}


def placed(parts: Modifications, sites: Sequence[Site]) -> Modifications:
    """One adapter from sites to modules: what sits at columns of a fused projection becomes part of what its module does,
    after what the same adapter does to the whole of it."""
    fused = {site.path: site for site in sites if site.columns}
    if parts.keys().isdisjoint(fused):
        return parts
    result = {path: list(here) for path, here in parts.items() if path not in fused}
    for path, site in fused.items():
        inside = [Inside(part, site.columns) for part in parts.get(path, [])]
        if inside:
            result.setdefault(site.module, []).extend(inside)
    return result


def batch(
    nodes: Sequence[Node | Ensemble | None],
    program: Callable[[Node | None], Modifications],
    rows: int | None,
    key: object,
    trains: bool,
) -> Plan:
    """The plan of a batch whose row i is nodes[i], or (a single node) of `rows` rows alike; rows None: of any batch.
    program: what a node runs, by module."""
    ensembles = [node.lanes if isinstance(node, Ensemble) else ((1.0, node),) for node in nodes]
    made = {node: program(node) for lanes in ensembles for _, node in lanes}  # equal rows share one object
    if not any(isinstance(node, Ensemble) for node in nodes):
        return build([made[node] for node in nodes], rows, key, trains)

    @lru_cache(maxsize=1)  # plans hold gathered tensors
    def for_rows(rows: int) -> Plan:
        flat = [(row, *lane) for row, lanes in enumerate(ensembles * (rows // len(nodes))) for lane in lanes]
        lanes = Lanes(rows, tuple(row for row, _, _ in flat), tuple(weight for _, weight, _ in flat))
        return build([made[node] for _, _, node in flat], rows, key, trains, lanes)

    return Plan(rows=None, key=key, for_rows=for_rows) if rows is None else for_rows(rows)


def build(
    programs: Sequence[Modifications], rows: int | None, key: object, trains: bool = False, lanes: Lanes | None = None
) -> Plan:
    """The plan of a batch whose row (of an ensemble: lane) i runs programs[i], or of any batch whose rows all run the
    one program. By module."""

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
        lanes,
    )


def furthest(plan: Plan) -> int:
    """How many positions prefixes take before a row's tokens, at most."""
    return max((plan if plan.for_rows is None else plan.for_rows(1)).advances, default=0)


def copied(plan: Plan, adapters: Iterable[Modifications]) -> int:
    """Bytes of the tensors that a plan holds besides those of its adapters: what was gathered, joined or scaled for it."""
    plan = plan if plan.for_rows is None else plan.for_rows(1)
    known = {
        t.untyped_storage().data_ptr() for a in adapters for here in a.values() for part in here for t in leaves(part)
    }
    held = [tensor for modification in plan.sites.values() for tensor in leaves(modification)]
    for memory in plan.memories().values():
        held += [memory.keys, memory.values]
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(size for place, size in own.items() if place not in known)


def leaves(modification: Modification) -> Iterator[Tensor]:
    """Its tensors, and those of all parts of it."""
    yield from modification.tensors.values()
    for part in getattr(modification, "parts", ()):
        yield from leaves(part)


def batched(rows: Sequence[Modifications], join: bool) -> dict[str, Modification]:
    """One modification a site for a batch whose row i runs rows[i]. Rows that run the same are the same object."""
    paths = dict.fromkeys(path for parts in rows for path in parts)
    return {path: _batched_at(path, [parts.get(path, []) for parts in rows], join) for path in paths}


def _batched_at(path: str, rows: Sequence[list[Modification]], join: bool) -> Modification:
    """The k-th of every row together, form by form, so that each row keeps its order."""
    if all(row is rows[0] for row in rows):
        return Stack(rows[0])
    steps: list[Modification] = []
    for k in range(max(map(len, rows))):
        column = [row[k] if k < len(row) else None for row in rows]
        for kind in dict.fromkeys(type(part) for part in column if part is not None):
            members = [part if type(part) is kind else None for part in column]
            steps.append(rows_of(kind, members, path) if join else Route(members))
    return Stack(steps)


def _joined(parts: Iterable[Modification], join: bool) -> list[Modification]:
    """Neighbours of one form as one, where the form can."""
    result: list[Modification] = []
    for part in parts:
        alike = join and result and type(part) is type(result[-1])
        together = call(type(part), "join", [result[-1], part]) if alike else None
        if together is None:
            result.append(part)
        else:
            result[-1] = together
    return result


def _scaled(parts: list[Modification], weight: float, join: bool) -> list[Modification]:
    if join and all(part.additive for part in parts):  # then scaling distributes
        return [scaled(part, weight) for part in parts]
    return [Scaled(Stack(parts), weight)]


def _mixed(parts: list[list[Modification]], join: bool) -> list[Modification]:
    if join and all(part.additive for here in parts for part in here):  # then a mix is a stack
        return _joined((part for here in parts for part in here), join)
    return [Mix([Stack(here) for here in parts])]
