"""The bed of the experiments: a small Llama, and one four times as large, that are pretrained here, once, on a synthetic corpus.

The corpus has four languages over one grammar. A word has one of 8 meanings; a sentence walks through the meanings, forward (+1, or
at times +2 or +3) or backward, and says each in one of 4 words of its language. A sentence begins with a tag that says which way: `forward`,
`backward`, or `any` (forward in four of five). Three languages are common and mixed within sentences at times; the fourth is rare.

Whatever decides the weights stands in this file, so its digest (`recipe`) names the bed: docs/evidence/papers.md says of every row on
which bed it was made, and the rows are to be made anew when this file is changed. The weights have a digest of their own, since a torch
of another version, or for another kind of processor (`made_with`), rounds otherwise: after 2,500 steps that is another model.
"""

from __future__ import annotations

import hashlib
import random
from importlib.metadata import version
from pathlib import Path

import torch

LANGUAGES, MEANINGS, SYNONYMS, LENGTH = "abcd", 8, 4, 8
TAGS = ("forward", "backward", "any", "half", "is", "low", "high")
RARE = 0.02
"""The share of sentences in the fourth language."""
STEPS, LARGER_STEPS, ROWS = 2500, 2000, 48


def word(language: str, meaning: int, draw: random.Random) -> str:
    return f"{language}{meaning}{draw.randrange(SYNONYMS)}"


def sentence(draw: random.Random, languages: str, tag: str, length: int = LENGTH) -> str:
    """A tag and a walk of `length` words, each in one of the languages."""
    back = tag == "backward" or (tag == "any" and draw.random() < 0.2)
    meaning, words = draw.randrange(MEANINGS), [tag]
    for _ in range(length):
        words.append(word(draw.choice(languages), meaning, draw))
        step = draw.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
        meaning = (meaning + (-step if back else step)) % MEANINGS
    return " ".join(words)


def corpus(draw: random.Random) -> str:
    """One sentence of what the models are pretrained on."""
    tag = draw.choice(TAGS[:3])
    if draw.random() < RARE:
        return sentence(draw, "d", tag)
    return sentence(draw, "abc" if draw.random() < 0.3 else draw.choice("abc"), tag)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"{lang}{m}{s}" for lang in LANGUAGES for m in range(MEANINGS) for s in range(SYNONYMS)]
    vocab = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", *TAGS, *words))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base(steps: int = STEPS) -> Path:
    """The folder of the small model: 0.2 million parameters, a minute or two on one core."""
    return _cached("base", steps, width=64, peak=3e-3, seed=0)


def larger(steps: int = LARGER_STEPS) -> Path:
    """The folder of the larger one, on the same corpus and tokenizer."""
    return _cached("larger", steps, width=128, peak=2e-3, seed=1)


def recipe() -> str:
    """The sha256 of this file."""
    return hashlib.sha256(Path(__file__).read_text(encoding="utf-8").encode()).hexdigest()


def made_with() -> str:
    """What else decides how the weights are rounded."""
    versions = [f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    return ", ".join([*versions, torch.backends.cpu.get_cpu_capability()])


def weights(folder: Path) -> str:
    """The sha256 of a model's weights, as their file has them."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _cached(name: str, steps: int, width: int, peak: float, seed: int) -> Path:
    """The model's folder, from the user's cache or made now. It says which model it is."""
    from adapterhub.bases.resolution import cache_folder
    from adapterhub.files import durable

    key = hashlib.sha256(f"{recipe()} {made_with()}".encode()).hexdigest()[:8]
    folder = cache_folder() / f"papers-{name}-{steps}-{key}"
    if not folder.is_dir():
        words, threads = tokenizer(), torch.get_num_threads()
        torch.set_num_threads(1)  # how many threads share a sum may decide how it is rounded
        try:
            with torch.random.fork_rng(devices=[]):
                model = _pretrained(words, steps, width, peak, random.Random(seed))
        finally:
            torch.set_num_threads(threads)
        with durable.new_folder(folder) as made:
            model.save_pretrained(made)
            words.save_pretrained(made)
    print(f"bed {weights(folder)[:8]}: {name}, {steps} steps, recipe {recipe()[:8]}, {made_with()}", flush=True)
    return folder


def _pretrained(words, steps: int, width: int, peak: float, draw: random.Random):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = words([f"{corpus(draw)} </s>" for _ in range(ROWS)], return_tensors="pt")["input_ids"]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return model
