"""The shared bed of the experiments: a small Llama that is pretrained here, once, on a synthetic corpus.

The corpus has four languages over one grammar. A word has one of 8 meanings; a sentence walks through the meanings, forward (+1, or
at times +2 or +3) or backward, and says each in one of 4 words of its language. A sentence begins with a tag that says which way: `forward`,
`backward`, or `any` (forward in four of five). Three languages are common and mixed within sentences at times; the fourth is rare.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from adapterhub import plugins

os.environ.setdefault("ADAPTERHUB_PLUGINS", ",".join(sorted(plugins.ours())))  # the scripts try our own packages

Found = TypeVar("Found")

LANGUAGES, MEANINGS, SYNONYMS, LENGTH = "abcd", 8, 4, 8
TAGS = ("forward", "backward", "any", "half", "is", "low", "high")
RARE = 0.02
"""The share of sentences in the fourth language."""
STEPS, ROWS = 2500, 48
T5 = 2.776
"""The 97.5 % point of Student's t for five differences."""


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
    """One sentence of what the base is pretrained on."""
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
    """The folder of the pretrained model, from the user's cache, or made now (a minute or two on one core)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapterhub import durable
    from adapterhub.bases import cache_folder

    folder = cache_folder() / f"tiny-papers-2-{steps}"
    if folder.is_dir():
        return folder
    words = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    draw = random.Random(0)
    for _ in range(steps):
        rows = words([f"{corpus(draw)} </s>" for _ in range(ROWS)], return_tensors="pt")["input_ids"]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    with durable.new_folder(folder) as made:
        model.save_pretrained(made)
        words.save_pretrained(made)
    return folder


def each_seed(
    doc: str, measure: Callable[..., Found], seeds: Sequence[int], quick: Sequence[int], full: Sequence[int]
) -> list[Found]:
    """What `measure(base, folder, seed, *full)` finds for each seed; of a script's command line --quick measures one seed on a
    hardly trained model with `quick`, and --seed N that one alone: then nothing is left to analyse, []."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one seed on a hardly trained model: that it runs"
    )
    parser.add_argument("--seed", type=int, help="one seed alone, to set rates and steps with")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = base(20 if given.quick else STEPS)
    with TemporaryDirectory() as folder:
        if given.quick or given.seed:
            measure(trained, Path(folder), given.seed or seeds[0], *(quick if given.quick else full))
            return []
        return [measure(trained, Path(folder), seed, *full) for seed in seeds]


# --- the analysis --------------------------------------------------------------------------------------------------


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({stdev(values):.3f})"


def verdict(what: str, differences: list[float], scale: float) -> str:
    """The mean of five paired differences, its 95 % interval (Student's t), and what that says of the claim that it is above 0.

    *seen*: the interval lies above 0; *not seen*: below, or it holds 0 and is narrower than a twentieth of `scale`, the
    positive control's effect; else, and where the control itself shows nothing (scale of 0 or less), *not resolved*."""
    half = T5 * stdev(differences) / 5**0.5
    low, high = mean(differences) - half, mean(differences) + half
    null = high < 0 or high - low < scale / 20
    said = "not resolved" if scale <= 0 or (low <= 0 and not null) else "seen" if low > 0 else "not seen"
    return f"{what}: {mean(differences):+.3f}, 95 % interval {low:+.3f} to {high:+.3f} (control {scale:+.3f}): {said}"
