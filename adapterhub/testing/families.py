"""Tiny random models of every architecture family, and batches as each of them takes them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_GROUPED = {
    **_TEXT,
    "initializer_range": 0.15,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "d_ff": 64,
    "d_kv": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
}
_WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 40,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}

FAMILIES = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "gemma": ("GemmaForCausalLM", _GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 4,
            "vocab_size": 96,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("BertForMaskedLM", _TEXT),
    "roberta": ("RobertaForMaskedLM", _TEXT),
    "t5": ("T5ForConditionalGeneration", _T5),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER),
}
"""Name -> transformers' class and its config. Mistral attends to the last four tokens only; the left end of a padded BERT
holds no [CLS], so it predicts tokens."""


def tiny(name: str, seed: int = 0, kind: str = "", **changes):
    """A random model of two layers and width 32, its norms and biases random too; float32, eval. kind: another of
    transformers' classes for the family ("BertForSequenceClassification")."""
    import transformers

    usual, settings = FAMILIES[name]
    made = getattr(transformers, kind or usual)
    torch.manual_seed(seed)
    model = made(made.config_class(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_ast(seed: int = 0):
    """A random Audio Spectrogram Transformer of two layers, for sounds of 32 frames: input_values (rows, 32, 16)."""
    from transformers import ASTConfig, ASTForAudioClassification

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sound = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    torch.manual_seed(seed)
    return ASTForAudioClassification(ASTConfig(**size, **sound, num_labels=5, initializer_range=0.2)).eval()


def padded(sequences: Sequence[Tensor], side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of ids as (ids, mask), both (rows, tokens), padded on the "left" or "right"."""
    width = max(width, *map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long, device=sequences[0].device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


def inputs(model, sequences: Sequence[Tensor], side: str = "") -> dict[str, Tensor]:
    """What this model takes for these sequences of ids, padded on that side; without a side there is no mask, and they
    must be of one length. An image or a sound is made of a sequence's sum; so are the ids that a decoder gets."""
    given = {}
    if model.main_input_name == "input_ids":
        ids, mask = padded(sequences, side)
        given = {"input_ids": ids, "attention_mask": mask} if side else {"input_ids": ids}
    else:
        config = model.config
        size = (3, 32, 32) if model.main_input_name == "pixel_values" else (config.num_mel_bins, 24)
        signals = [torch.randn(size, generator=_of(s), dtype=torch.float64) for s in sequences]
        given = {model.main_input_name: torch.stack(signals).to(model.device, model.dtype)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        texts = [torch.randint(3, 96, (11,), generator=_of(s)) for s in sequences]
        given["decoder_input_ids"] = torch.stack(texts).to(model.device)
    return given


def _of(sequence: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(sequence.sum()))
