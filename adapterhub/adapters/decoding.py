"""Undoing codecs under a bound: what decoding gives is held against what the sites can take before anything is allocated.

A codec tells what it will give (`Codec.gives`). How much that may be:

- On a base: all adapters' forms at a site together hold at most FACTOR times the numbers of the base's weight there.
- Without a base (`inspect`, `scan`, `merge`, `diff`, `compress`) the shapes are those of the sketch that came with the
  adapter. Whoever wrote the adapter wrote the sketch too, so there is a cap on top: CAP bytes, or RATIO times the file.
- SPARE bytes are always let through: what has no weight of its own (prefixes), and small adapters on tiny bases.

The sparse form is a codec in itself: a few numbers stand for a whole weight. `check_sparse` bounds what it says of its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from adapterhub.errors import AGAIN, CodecError, HubError, IntegrityError
from adapterhub.kinds.codec import Codec, Shapes, shapes_of
from adapterhub.sites import Site, current_path
from adapterhub.spec.manifest import Manifest
from adapterhub.store.releases import Releases

FACTOR = 4
"""Numbers of one form at a site for each number of the base's weight there: a low-rank pair of twice the rank that the weight
can use holds as many."""
WIDEST = 4
"""Bytes of a number as adapters are trained."""
SPARE = 64 << 20
"""Bytes that any adapter may be."""
CAP = 1 << 30
"""Bytes that an adapter may be without a base, ..."""
RATIO = 128
"""... or so many times its file: ComPEFT at a density of 0.03."""
MOST_TENSORS = 65_536
SMALL_WEIGHT = 1 << 26
"""Numbers of a weight (8192 x 8192) that a sparse change may stand for whatever its file; above it WEIGHT_RATIO times its bytes
(a density of 0.2 %), or, if the base's record has such a weight, LARGEST_WEIGHT."""
WEIGHT_RATIO = 64
LARGEST_WEIGHT = 1 << 28


def decode(
    chain: Iterable[tuple[str, Codec]], tensors: Mapping[str, Tensor], manifest: Manifest, room: int
) -> dict[str, Tensor]:
    """Undo codecs, the last of encoding first, while what each gives has at most `room` bytes.

    chain: (name, codec) in the order of decoding. What the last one gives has only names of the manifest's forms. A codec
    that overrides `decode` and not `gives` tells nothing before: what it gave is looked at when it is there. Raises CodecError."""
    chain = list(chain)
    for number, (name, codec) in enumerate(chain, 1):
        silent = type(codec).decode is not Codec.decode and type(codec).gives is Codec.gives
        told = None if silent else codec.gives(tensors)
        if told is not None:
            _check(name, told, room, manifest if number == len(chain) else None)
        decoded = codec.decode(tensors)
        found = shapes_of(decoded)
        if told is None:
            _check(name, found, room, manifest if number == len(chain) else None)
        elif found != told:
            unlike = min(each for each in found.keys() | told.keys() if found.get(each) != told.get(each))
            raise CodecError(f"{name} gives {unlike!r} otherwise than it said", AGAIN)
        tensors = decoded
    return dict(tensors)


def _check(name: str, told: Shapes, room: int, manifest: Manifest | None) -> None:
    held = sum(math.prod(shape) * dtype.itemsize for dtype, shape in told.values())
    if held > room:
        raise CodecError(
            f"decoded by {name} it would take {held} bytes, and the weights that it changes account for {room}",
            "use it only if you trust its author, on the base that it is for (--base)",
        )
    if len(told) > MOST_TENSORS:
        raise CodecError(f"{name} would give {len(told)} tensors (at most {MOST_TENSORS})", AGAIN)
    for each in told if manifest is not None else ():
        path, form, n, _ = ["", "", "", "", *each.rsplit(".", 3)][-4:]
        count = manifest.forms.get(path, []).count(form)
        if not (n.isdecimal() and int(n) < count):
            raise CodecError(f"{name} would give {ascii(each)[:80]}, of which the manifest says nothing", AGAIN)


def room(manifest: Manifest, stored: int, hub: Releases, sites: Sequence[Site] | None = None) -> int:
    """The most bytes that this adapter's tensors may be. stored: bytes of its file. sites: the base's, where there is one."""
    if sites is not None:
        sizes = {site.path: site.inputs * site.outputs for site in sites}
        paths = {path: current_path(manifest.base.architecture, path) for path in manifest.forms}
        numbers = sum(len(forms) * sizes.get(paths[path], sizes.get(path, 0)) for path, forms in manifest.forms.items())
        return SPARE + FACTOR * WIDEST * numbers
    record = recorded(manifest, hub)
    numbers = sum(len(forms) * record.get(_module(path, record), 0) for path, forms in manifest.forms.items())
    return SPARE + min(FACTOR * WIDEST * numbers, max(CAP, RATIO * stored))


def recorded(manifest: Manifest, hub: Releases) -> dict[str, int]:
    """{path of a module or of what holds it: numbers of its tensors}, as the base's sketch says; empty for a record that cannot be read."""
    from adapterhub.bases import sketch

    try:
        shapes = sketch.shapes(hub.store.read(manifest.base.sketch))
    except HubError:  # what it is worth is said where the base itself is checked
        return {}
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        path = name
        while path := path.rpartition(".")[0]:
            found[path] = found.get(path, 0) + math.prod(shape)
    return found


def _module(path: str, record: Mapping[str, int]) -> str:
    """What the record calls the module at a site: it leaves out a prefix that all names share, and the columns of a fused
    projection are part of their module."""
    start = path
    while start:
        end = start
        while end.count("."):  # one column of a fused projection, or a part of a block
            if end in record:
                return end
            end = end.rpartition(".")[0]
        if end in record:
            return end
        start = start.partition(".")[2]
    return ""


def check_sparse(tensors: Mapping[str, Tensor], manifest: Manifest, hub: Releases) -> None:
    """Raise IntegrityError for a sparse change of a weight that no base has, before anything makes it whole. For adapters that are
    looked at without a base; with one, `check_fit` compares the shape itself."""
    record: dict[str, int] | None = None
    for name, shape in tensors.items():
        path, form, n, key = ["", "", "", "", *name.rsplit(".", 3)][-4:]
        if (form, key) != ("sparse", "shape") or shape.is_floating_point() or shape.shape != (2,):
            continue
        (outputs, inputs), prefix = shape.tolist(), f"{path}.{form}.{n}"
        held = sum(tensors[f"{prefix}.{each}"].nbytes for each in ("index", "values") if f"{prefix}.{each}" in tensors)
        if min(outputs, inputs) >= 0 and outputs * inputs <= SMALL_WEIGHT + WEIGHT_RATIO * held:
            continue
        record = recorded(manifest, hub) if record is None else record
        if min(outputs, inputs) < 0 or outputs * inputs > min(LARGEST_WEIGHT, record.get(_module(path, record), 0)):
            raise IntegrityError(
                f"the sparse change at {path} says that the weight there is {outputs} x {inputs}, for {held} bytes",
                "name the base that it is for (--base), or get the adapter again from its source",
            )
