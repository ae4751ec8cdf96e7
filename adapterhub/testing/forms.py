"""The laws of forms and composers. Each takes a form's class and raises AssertionError, or Declined, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapterhub.adapters.adapter import modifications_of
from adapterhub.adapters.fit import bind, random_states
from adapterhub.adapters.names import named_tensors
from adapterhub.errors import NotFoldable
from adapterhub.forms.composers import Mix, Scaled, Stack, scaled
from adapterhub.forms.route import Route
from adapterhub.forms.route import rows as rows_of
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification, Modifications, Step
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.fold import fold as fold_into
from adapterhub.runtime.plan import placed, stacked
from adapterhub.sites import Tap, sites
from adapterhub.testing.bed import alone, decoded, distance, logits, plan, random_adapter, tiny_for
from adapterhub.testing.widths import widths

EXACT = 1e-9
"""Of the largest logit, in float64."""


class Declined(Exception):
    """The law does not apply to this part, which says so itself."""


def _bed(form: type[Modification], device: str, dtype: torch.dtype = torch.float64) -> Attachment:
    return Attachment.of(tiny_for(form).to(device, dtype))


def _sequences(device: str, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 96, (n,), generator=generator).to(device) for n in lengths]


def _scaled(adapter: Modifications, weight: float) -> Modifications:
    return {path: [Scaled(Stack(parts), weight)] for path, parts in adapter.items()}


def _rows(form: type[Modification], model: torch.nn.Module) -> list[Modifications]:
    """Six unlike programs: two adapters, the two stacked, one at a quarter, a mix, and the bare base."""
    a, b = random_adapter(form, model, 1), random_adapter(form, model, 2)
    mixed = {path: [Mix([Stack(a[path]), Scaled(Stack(b[path]), -0.5)])] for path in a}
    return [a, b, stacked([a, b]), _scaled(a, 0.25), mixed, {}]


def stores(form: type[Modification], device: str) -> None:
    """Its tensors are the ones it declares."""
    for parts in random_adapter(form, tiny_for(form), 0).values():
        held = set(parts[0].tensors)
        assert held | form.optional >= set(form.stores) >= held, (
            f"declares {sorted(form.stores)}, of which {sorted(form.optional)} may be left out, holds {sorted(held)}"
        )
    named = set(form.constants) | form.optional
    assert named <= set(form.stores), f"names tensors that it does not store: {sorted(named - set(form.stores))}"


def rows(form: type[Modification], device: str) -> None:
    """A routed, padded batch gives each row what it gets alone and unpadded; every row differs from the base."""
    bed = _bed(form, device)
    programs, sequences = _rows(form, bed.base), _sequences(device, (5, 9, 3, 7, 8, 6))
    for side in ("left", "right"):
        for row, got in enumerate(logits(bed, programs, sequences, side)):
            want = alone(bed, programs[row], sequences[row])
            assert distance(got, want) <= EXACT, f"row {row}, padded {side}: off by {distance(got, want):.1e}"
            base = alone(bed, {}, sequences[row])
            assert row == 5 or distance(want, base) > 1e-3, f"row {row} does not differ from the base"


def decode(form: type[Modification], device: str) -> None:
    """A padded prefill and cached steps give what one full forward gives."""
    if form.bidirectional:
        raise Declined("it reads later tokens, so nothing is decoded step by step")
    bed = _bed(form, device)
    programs, sequences = _rows(form, bed.base), _sequences(device, (12, 15, 10, 17, 13, 11))
    for side in ("left", "right"):
        for row, got in enumerate(decoded(bed, programs, sequences, side, steps=8)):
            want = alone(bed, programs[row], sequences[row])
            assert distance(got, want) <= EXACT, f"row {row}, padded {side}: off by {distance(got, want):.1e}"


def chunks(form: type[Modification], device: str) -> None:
    """A padded prefill and then chunks of several tokens, as speculative decoding and long prompts come, give what one full
    forward gives."""
    if form.bidirectional:
        raise Declined("it reads later tokens, so nothing is decoded in chunks")
    bed = _bed(form, device)
    programs, sequences = _rows(form, bed.base), _sequences(device, (12, 15, 10, 17, 13, 11))
    for side in ("left", "right"):
        for row, got in enumerate(decoded(bed, programs, sequences, side, steps=8, chunks=(3, 1, 4))):
            want = alone(bed, programs[row], sequences[row])
            assert distance(got, want) <= EXACT, f"row {row}, padded {side}: off by {distance(got, want):.1e}"


def fold(form: type[Modification], device: str) -> None:
    """Hooked equals folded into the weights, stacked and scaled too, wherever the site is one weight."""
    bed = _bed(form, device)
    linear = {site.path for site in sites(bed.base) if site.linear}
    programs, sequence = _rows(form, bed.base)[:5], _sequences(device, (9,))[0]
    for row, whole in enumerate(programs):
        program = {path: parts for path, parts in whole.items() if path in linear}
        if not program:
            raise Declined(f"the form {form.form!r} sits at no single weight")
        want, folded = alone(bed, program, sequence), _bed(form, device)
        try:
            fold_into(folded.base, placed(program, sites(folded.base)))
        except NotFoldable as error:
            raise Declined(str(error)) from None
        got = alone(folded, {}, sequence)
        assert distance(got, want) <= EXACT, f"program {row}: off by {distance(got, want):.1e}"


def save(form: type[Modification], device: str) -> None:
    """Stored and read again by names alone it does exactly the same."""
    from adapterhub.tensors.file import dump, load

    bed = _bed(form, device, torch.float32)
    adapter, sequence = random_adapter(form, bed.base, 1), _sequences(device, (9,))[0]
    read = modifications_of(load(dump(named_tensors(adapter))))
    read = {path: [part.to(device) for part in parts] for path, parts in read.items()}
    for site in sites(bed.base):
        for part in read.get(site.path, []):
            bind(part, site, bed.base)
    apart = distance(alone(bed, read, sequence), alone(bed, adapter, sequence))
    assert apart == 0, f"read again it gives other logits, off by {apart:.1e}: something of it is not in its tensors"


def dtype_and_device(form: type[Modification], device: str) -> None:
    """A float32 adapter on a bfloat16 base works in the base's dtype, on its device."""
    bed = _bed(form, device, torch.bfloat16)
    exact = alone(
        _bed(form, device, torch.float32),
        random_adapter(form, tiny_for(form).to(device), 1),
        _sequences(device, (9,))[0],
    )
    got = alone(bed, random_adapter(form, tiny_for(form).to(device), 1), _sequences(device, (9,))[0])
    assert got.dtype == torch.bfloat16, f"on a bfloat16 base the logits are {got.dtype}"
    assert got.device.type == device, f"on {device} the logits are on {got.device}"
    assert distance(got.float(), exact) < 0.15, f"off by {distance(got.float(), exact):.2f} in bfloat16"


def algebra(form: type[Modification], device: str) -> None:
    """What it says of itself holds: additive, scaled, join, rows."""
    bed = _bed(form, device)
    a, b = random_adapter(form, bed.base, 1), random_adapter(form, bed.base, 2)
    widths = {site.path: site for site in sites(bed.base)}
    torch.manual_seed(3)
    for path in a:
        one, two = a[path][0], b[path][0]
        x = torch.randn(2, 5, widths[path].inputs, dtype=torch.float64, device=device)
        y = torch.randn(2, 5, widths[path].outputs, dtype=torch.float64, device=device)
        read = {tap: random_states(tap, widths.values(), (2, 5)).to(device) for tap in one.taps + two.taps}
        states = {tap: state.double() if state.is_floating_point() else state for tap, state in read.items()}
        change = _change(one, x, y, states)
        if one.additive:
            assert not one.changes_input, f"{path}: additive, yet it changes the input"
            _same(change, _change(one, x, torch.zeros_like(y), states), f"{path}: additive, yet it reads the output")
        _same(_change(scaled(one, -0.3), x, y, states), -0.3 * change, f"{path}: scaled by -0.3")
        joined = call(form, "join", [one, two], site=path)
        if joined is not None:
            stack = _change(Stack([one, two]), x, y, states)
            _same(_change(joined, x, y, states), stack, f"{path}: join is not the stack")
        for members in ([one, None], [two, one]):
            got, want = rows_of(form, members, path), Route(members)
            _same(_change(got, x, y, states), _change(want, x, y, states), f"{path}: rows are not each row's own")


def _same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    close = torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    apart = "" if close else f"{what}: off by {(got - want).abs().max():.1e}, in a change of shape {tuple(want.shape)}"
    assert close, apart


def _change(
    modification: Modification, x: torch.Tensor, y: torch.Tensor, states: dict[Tap, torch.Tensor]
) -> torch.Tensor:
    step = Step(tapped=states.__getitem__)
    into = call(modification, "delta_in", x, step)
    x = x if into is None else x + into
    out = call(modification, "delta_out", x, y, step)
    return torch.zeros_like(y) if out is None else out


def composers(form: type[Modification], device: str) -> None:
    """Stack() and Mix([0*m]) are the base; Stack(m), Mix([m]) and 1*m are m."""
    bed, sequence = _bed(form, device), _sequences(device, (9,))[0]
    adapter = random_adapter(form, bed.base, 1)
    base, own = alone(bed, {}, sequence), alone(bed, adapter, sequence)

    def as_(make: Callable[[Modification], Modification]) -> torch.Tensor:
        return alone(bed, {path: [make(parts[0])] for path, parts in adapter.items()}, sequence)

    apart = distance(as_(lambda m: Stack([])), base)
    assert apart == 0, f"an empty stack is not the base: off by {apart:.1e}"
    apart = distance(as_(lambda m: Mix([Scaled(m, 0.0)])), base)
    assert apart <= EXACT, f"a mix of 0*m is not the base: off by {apart:.1e}"
    for words, same in {
        "a stack of m alone": lambda m: Stack([m]),
        "a mix of m alone": lambda m: Mix([m]),
        "1*m": lambda m: Scaled(m, 1.0),
        "a stack of m and nothing": lambda m: Stack([Stack([m]), Mix([])]),
    }.items():
        apart = distance(as_(same), own)
        assert apart <= EXACT, f"{words} is not m: off by {apart:.1e}"


def gradients(form: type[Modification], device: str) -> None:
    """Every tensor that learns gets a gradient, and gradient checkpointing gives the same ones."""
    from adapterhub.adapters.fit import as_parameters

    sequence = _sequences(device, (9,))[0][None]
    found = []
    for checkpointing in (False, True):
        bed = _bed(form, device)
        bed.base.requires_grad_(False)
        if checkpointing:
            bed.base.activation_checkpointing_enable()
            bed.base.train()
        adapter = as_parameters(random_adapter(form, bed.base, 1), lambda path: torch.device(device))
        for site in sites(bed.base):
            for part in adapter.get(site.path, []):
                bind(part, site, bed.base)
        with bed.running(plan(bed, [adapter], trains=True)):
            bed.base(input_ids=sequence, labels=sequence, use_cache=False).loss.backward()
        named = named_tensors(adapter)
        found.append({name: t.grad for name, t in named.items() if isinstance(t, torch.nn.Parameter)})
    plain, checkpointed = found
    assert plain, "nothing of it learns: every tensor is a constant"
    for name, gradient in plain.items():
        assert gradient is not None and gradient.count_nonzero(), f"{name} gets no gradient"
        assert torch.allclose(gradient, checkpointed[name], rtol=1e-6, atol=1e-9), f"{name}: checkpointing changes it"


LAWS = (stores, widths, rows, decode, chunks, fold, save, dtype_and_device, algebra, composers, gradients)
