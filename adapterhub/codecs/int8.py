"""Eight bits for each number: rounded symmetrically to 255 steps up to the largest of its row (absmax; the row-wise
scheme of Dettmers et al., "LLM.int8()", 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub.errors import AGAIN, CodecError
from adapterhub.kinds.codec import SMALL, Codec, Shapes, absolute, shapes_of

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
ENDS = tuple(f".steps.{dtype}" for dtype in DTYPES)
BLOCK = 64
"""A vector has no rows: this many numbers of one share a step."""
STEPS = 127


class Int8(Codec):
    """`<name>.int8` with the shape of the tensor, and `<name>.steps.<dtype>`, the float32 step of each row.

    Rows run along the longer side of a matrix: a low-rank pair gets a step for each rank, a weight one for each output or
    input, whichever are fewer. Off by half a step at most: 1/254 of the largest of the row. Kept exactly: integers, tensors
    of fewer than 64 numbers, float64, DoRA's magnitudes."""

    @dataclass(frozen=True)
    class Config:
        """No options."""

    tolerance = 0.01

    def encode(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        encoded = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values() or tensor.numel() < SMALL or absolute(name):
                encoded[name] = tensor
                continue
            rows = _rows(tensor.detach().cpu().float())
            steps = rows.abs().amax(1) / STEPS
            numbers = (rows / steps.where(steps > 0, 1)[:, None]).round().clamp(-STEPS, STEPS).to(torch.int8)
            encoded[f"{name}.int8"] = _shaped(numbers, tensor.shape).contiguous()
            encoded[f"{name}.steps.{str(tensor.dtype).removeprefix('torch.')}"] = steps
        if len(encoded) == len(tensors):
            raise CodecError(
                "int8 finds no tensor of 64 numbers or more in float32, bfloat16 or float16", "keep it as it is"
            )
        return encoded

    def gives(self, tensors: Mapping[str, Tensor]) -> Shapes:
        plain = {name: t for name, t in tensors.items() if not name.endswith((".int8", *ENDS))}
        told = shapes_of(plain)
        for own, _, dtype in (name.rpartition(".steps.") for name in tensors if name.endswith(ENDS)):
            if f"{own}.int8" not in tensors:
                raise _broken(own)
            told[own] = DTYPES[dtype], tuple(tensors[f"{own}.int8"].shape)
        return told

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        steps = {name: name.rpartition(".steps.") for name in tensors if name.endswith(ENDS)}
        decoded = {name: t for name, t in tensors.items() if not name.endswith((".int8", *ENDS))}
        for name, (own, _, dtype) in steps.items():
            numbers = tensors.get(f"{own}.int8")
            if numbers is None or numbers.dtype != torch.int8 or own in decoded:
                raise _broken(name)
            rows = _rows(numbers)
            if tensors[name].dtype != torch.float32 or tensors[name].shape != (len(rows),):
                raise _broken(name)
            tensor = _shaped(rows.float() * tensors[name][:, None], numbers.shape).to(DTYPES[dtype]).contiguous()
            if not tensor.isfinite().all():
                raise _broken(name)
            decoded[own] = tensor
        if left := [n for n in tensors if n.endswith(".int8") and n.removesuffix(".int8") not in decoded]:
            raise _broken(left[0])
        return decoded


def _rows(tensor: Tensor) -> Tensor:
    """(rows, length): what shares one step. A vector is filled up with zeros to whole blocks."""
    if tensor.ndim < 2:
        flat = tensor.reshape(-1)
        return torch.cat([flat, flat.new_zeros(-len(flat) % BLOCK)]).view(-1, BLOCK)
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_zeros(0, 1)
    return rows if len(rows) <= rows.shape[1] else rows.mT


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """The tensor of this shape whose `_rows` these are."""
    if len(shape) < 2:
        return rows.reshape(-1)[: shape.numel()].reshape(shape)
    if not shape.numel():
        return rows.new_zeros(shape)
    count = shape.numel() // shape[-1]
    return (rows if count <= shape[-1] else rows.mT).reshape(shape)


def _broken(name: str) -> CodecError:
    return CodecError(f"{name} belongs to no tensors of int8", AGAIN)
