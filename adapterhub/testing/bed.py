"""The bed the laws are tried on: a tiny random Llama with grouped queries (or BERT), padded batches of any family, cached
decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.adapters.fit import bind
from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.method import Method
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.runtime.attachment import Attachment, Plan
from adapterhub.runtime.plan import build, placed
from adapterhub.sites import Site, sites, tapped
from adapterhub.testing.families import inputs, padded, tiny


def tiny_llama(seed: int = 0, vocabulary: int = 96, **changes):
    """A random Llama of 2 layers, width 32, 4 heads over 2 key-value heads; float32, eval."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tiny_tokenizer():
    """One token a character: ids 3..95 are printable ASCII; pad 0, bos 1, eos 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(32 + i): 3 + i for i in range(93)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_for(part: type[Modification] | type[Method]):
    """The tiny model that a part is tried on: the Llama, or a BERT (without dropout) where it reads later tokens."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny("bert", **still) if part.bidirectional else tiny_llama()


def random_adapter(
    form: type[Modification], model: torch.nn.Module, seed: int, among: Sequence[Site] | None = None
) -> Modifications:
    """One of the form at every site (of `among`; None: all but the head, or the head alone for a form that suits no other) that
    suits it, in the model's dtype and on its device."""
    if among is None:
        others, heads = ([site for site in sites(model) if (site.role == "head") is head] for head in (False, True))
        return random_adapter(form, model, seed, others) or random_adapter(form, model, seed, heads)
    torch.manual_seed(seed)
    at = {site.path: site for site in among}
    made = {path: call(form, "random", site, site=path) for path, site in at.items()}
    suits = {path: m for path, m in made.items() if m is not None and reads(m, model)}
    adapter = {path: [m.to(model.device, model.dtype)] for path, m in suits.items()}
    for path, (modification,) in adapter.items():
        bind(modification, at[path], model)
    return adapter


def reads(modification: Modification, model: torch.nn.Module) -> bool:
    """Whether this base has the sites that it reads."""
    try:
        return all(tapped(sites(model), tap) for tap in modification.taps)
    except IncompatibleBase:
        return False


def plan(attachment: Attachment, rows: Sequence[Modifications], count: int | None = None, trains: bool = False) -> Plan:
    """What a batch of these rows runs (count None: one program for any batch)."""
    distinct = {id(row): placed(row, sites(attachment.base)) for row in rows}
    return build([distinct[id(row)] for row in rows], count, object(), trains)


@torch.no_grad()
def logits(
    attachment: Attachment, rows: Sequence[Modifications], sequences: Sequence[Tensor], side: str
) -> list[Tensor]:
    """One padded batch, row i running rows[i]: the logits of each row's real tokens, (tokens, vocabulary)."""
    given = inputs(attachment.base, sequences, side)
    with attachment.running(plan(attachment, rows, len(rows))):
        out = attachment.base(**given).logits
    return [_real(out[row], given, row) for row in range(len(rows))]


def _real(row_logits: Tensor, given: dict[str, Tensor], row: int) -> Tensor:
    """Without the padding; a decoder's rows, and those of images, have none."""
    padded = "attention_mask" in given and "decoder_input_ids" not in given and row_logits.ndim == 2
    return row_logits[given["attention_mask"][row].bool()] if padded else row_logits


@torch.no_grad()
def alone(attachment: Attachment, adapter: Modifications, sequence: Tensor) -> Tensor:
    """The reference: one sequence, unpadded, without a mask. (tokens, vocabulary)"""
    with attachment.running(plan(attachment, [adapter])):
        return attachment.base(**inputs(attachment.base, [sequence])).logits[0]


@torch.no_grad()
def decoded(
    attachment: Attachment,
    rows: Sequence[Modifications],
    sequences: Sequence[Tensor],
    side: str,
    steps: int,
    chunks: Sequence[int] = (),
) -> list[Tensor]:
    """The same logits, by a padded prefill of all but the last `steps` tokens and then one cached step for each, or for each
    of these chunks of several tokens. In an encoder-decoder the encoder runs first, by itself, as in generate."""
    base = attachment.base
    if base.config.is_encoder_decoder:
        return _decoded_beside(attachment, rows, sequences, side, steps)
    ids, mask = padded([s[:-steps] for s in sequences], side)
    last = torch.stack([s[-steps:] for s in sequences]).split(list(chunks) or 1, dim=1)
    with attachment.running(plan(attachment, rows, len(rows))):
        out = base(input_ids=ids, attention_mask=mask, use_cache=True)
        pieces = [[out.logits[row][mask[row].bool()]] for row in range(len(rows))]
        for chunk in last:
            mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
            cache = out.past_key_values
            out = base(input_ids=chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
            for row, piece in enumerate(pieces):
                piece.append(out.logits[row])
    return [torch.cat(piece) for piece in pieces]


def _decoded_beside(attachment: Attachment, rows, sequences, side: str, steps: int) -> list[Tensor]:
    given = inputs(attachment.base, sequences, side)
    ids, kept = given.pop("decoder_input_ids"), {k: v for k, v in given.items() if k == "attention_mask"}
    with attachment.running(plan(attachment, rows, len(rows))):
        encoded, cache, pieces = attachment.base.get_encoder()(**given), None, []
        for piece in (ids[:, :-steps], *ids[:, -steps:].split(1, dim=1)):
            out = attachment.base(
                encoder_outputs=encoded, decoder_input_ids=piece, past_key_values=cache, use_cache=True, **kept
            )
            cache = out.past_key_values
            pieces.append(out.logits)
    return list(torch.cat(pieces, dim=1))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest of b."""
    return ((a - b).abs().max() / b.abs().max()).item()
