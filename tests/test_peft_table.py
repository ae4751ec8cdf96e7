"""Every type of PEFT has a verdict, and every one that loads gives PEFT's logits; the table in docs/evidence/peft.md is made of this.

`python tests/test_peft_table.py` writes the table anew."""

import math
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.formats.peft.config import REFUSED, SAFE_STARTS
from adapterhub.formats.peft.types import CACHES, PROMPTS, TUNERS
from adapterhub.formats.peft.types import REFUSED as REFUSED_TYPES
from adapterhub.spec.manifest import Release
from adapterhub.testing.bed import tiny_llama
from adapterhub.testing.families import tiny

PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "peft.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
AS_METHOD = "| type | trained as a method (`--method peft --set type=...`) |"
EXACT = 1e-5
"""Of the largest logit."""
IDS = torch.arange(3, 27).reshape(2, 12)
LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "mlp.c_proj"]
BASES = {
    "Llama": lambda: tiny_llama(0),
    "Llama, tied": lambda: tiny_llama(0, tie_word_embeddings=True),
    "Gemma": lambda: tiny("gemma"),
    "GPT-2": lambda: tiny("gpt2"),
    "BERT": lambda: tiny("bert", kind="BertForSequenceClassification", num_labels=3),
    "T5": lambda: tiny("t5"),
    "ViT": lambda: tiny("vit"),
}
TINY = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "GLORA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 8},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [3, 5]},
    "UNILORA": {"theta_d_length": 16},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 50},
    **{kind: {"r": 4} for kind in ("DEFT", "GRALORA", "HIRA", "HRA", "LOHA", "MISS", "PEANUT", "PSOFT")},
    **{kind: {"r": 8} for kind in ("PVERA", "RANDLORA", "VERA")},
    "SHIRA": {"r": 2},
}
"""Where PEFT's defaults do not suit a model of width 32."""


def lora(base, targets=LLAMA, **options):
    return base, lambda: LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)


def virtual(kind, base, **options):
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    return base, lambda: made(num_virtual_tokens=4, task_type="CAUSAL_LM", **options)


HEAD = {"modules_to_save": ["classifier"]}
CPT = {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
LORA = {
    "LORA": lora("Llama"),
    "LORA, rsLoRA": lora("Llama", use_rslora=True),
    "LORA, rank and alpha patterns": lora("Llama", rank_pattern={"q_proj": 5}, alpha_pattern={"layers.1.*v_proj": 2}),
    "LORA, Conv1D": lora("GPT-2", GPT2, fan_in_fan_out=True),
    "LORA, embedding and head": lora("Llama", ["q_proj", "embed_tokens", "lm_head"]),
    "LORA, tied embedding": lora("Llama, tied", ["embed_tokens"]),
    "LORA, ensure_weight_tying": lora("Llama, tied", ["embed_tokens"], ensure_weight_tying=True),
    "LORA, scaled embedding": lora("Gemma", ["q_proj", "embed_tokens"]),
    "LORA, lora_bias": lora("Llama", lora_bias=True),
    "LORA, bias=all": lora("GPT-2", GPT2, bias="all"),
    "LORA, bias=lora_only": lora("GPT-2", GPT2, bias="lora_only", use_rslora=True),
    "LORA, DoRA": lora("Llama", use_dora=True),
    "LORA, DoRA, rsLoRA, Conv1D, bias=all": lora("GPT-2", GPT2, use_dora=True, use_rslora=True, bias="all"),
    "LORA, DoRA of an embedding": lora("Llama", ["embed_tokens"], use_dora=True),
    "LORA, modules_to_save: head and norm": lora("Llama", modules_to_save=["lm_head", "norm"]),
    "LORA, modules_to_save: tied embedding": lora("Llama, tied", ["q_proj"], modules_to_save=["embed_tokens"]),
    "LORA, modules_to_save: both of the tied": lora(
        "Llama, tied", ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "LORA, trainable_token_indices": lora("Llama, tied", trainable_token_indices=[3, 9]),
    "LORA, target_parameters": lora("Llama", [], target_parameters=["q_proj.weight"]),
    "LORA, KaSA": lora("Llama", kasa_config=peft.KasaConfig()),
    "LORA, VeLoRA": lora("Llama", velora_config=peft.VeloraConfig()),
    "LORA, BD-LoRA": (
        "Llama",
        lambda: LoraConfig(
            r=4,
            target_modules=LLAMA,
            use_bdlora=peft.BdLoraConfig(
                nblocks=2, target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"]
            ),
        ),
    ),
    "LORA, classification": lora("BERT", ["query", "value"], task_type="SEQ_CLS"),
    "LORA, encoder and decoder": lora("T5", ["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "LORA, images": lora("ViT", ["q_proj", "fc2"], **HEAD),
}
OTHERS = {
    "ADALORA, rank_pattern": ("Llama", lambda: peft.AdaLoraConfig(
        target_modules=["q_proj"], init_r=4, target_r=2, total_step=10,
        rank_pattern={f"model.layers.{n}.self_attn.q_proj.lora_E": [True, n == 1, True, False] for n in (0, 1)})),
    "IA3, Conv1D": ("GPT-2", lambda: peft.IA3Config(target_modules=GPT2, feedforward_modules=["mlp.c_proj"])),
    "IA3, classification": ("BERT", lambda: peft.IA3Config(
        target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS")),
    "LN_TUNING, LayerNorm": ("GPT-2", lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "TRAINABLE_TOKENS, tied": ("Llama, tied", lambda: peft.TrainableTokensConfig(token_indices=[3, 9])),
    "TRAINABLE_TOKENS, scaled embedding": ("Gemma", lambda: peft.TrainableTokensConfig(token_indices=[3, 9])),
    "PREFIX_TUNING": virtual("PREFIX_TUNING", "Llama"),
    "PREFIX_TUNING, learned positions": virtual("PREFIX_TUNING", "GPT-2"),
    "PREFIX_TUNING, projection": virtual("PREFIX_TUNING", "Llama", prefix_projection=True, encoder_hidden_size=8),
    "CARTRIDGE": virtual("CARTRIDGE", "Llama"),
    "PROMPT_TUNING": virtual("PROMPT_TUNING", "Llama"),
    "PROMPT_TUNING, learned positions": virtual("PROMPT_TUNING", "GPT-2"),
    "P_TUNING": virtual("P_TUNING", "Llama", encoder_hidden_size=8),
    "CPT": ("Llama", lambda: peft.CPTConfig(task_type="CAUSAL_LM", **CPT)),
}  # fmt: skip


def _tuner(kind):
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    return "Llama", lambda: made(**({"target_modules": LLAMA} | TINY.get(kind, {})))


CASES = LORA | {kind: _tuner(kind) for kind in sorted(TUNERS)} | OTHERS
CASES = {label: CASES[label] for label in sorted(CASES, key=lambda label: (not label.startswith("LORA"), label))}


def given(name):
    """Two texts, or two images."""
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if name == "T5" else {})


def randomise(model):
    """Every number that PEFT would train; the scales and gains among them stay near one."""
    scales = ("magnitude", "norm", "ln_", "ia3_l", "road_")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            center = float(any(scale in name for scale in scales) and not name.endswith("bias"))
            torch.nn.init.normal_(parameter, mean=center, std=0.15)


@dataclass
class Measured:
    release: Release
    distance: float
    """The largest difference from PEFT's logits, relative to the largest."""
    effect: float
    """How far those are from the base's."""
    exported: str
    """The type that it goes back as."""
    back: float
    """The largest difference of that."""

    @property
    def row(self):
        """Its line of the table, without label and figure."""
        forms = sorted({form for here in self.release.manifest.forms.values() for form in here})
        return f"{', '.join(forms)} | {self.exported} |"


@torch.no_grad()
def logits(model, name, after=0):
    """Without those of virtual tokens, which PEFT gives too."""
    found = model(**given(name)).logits
    return found[:, -IDS.shape[1] :] if after and found.ndim > 2 and name != "T5" else found


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def measured(label, hub, folder):
    name, config = CASES[label]
    base = folder / name
    if not base.exists():
        BASES[name]().save_pretrained(base)
    saved = folder / "".join(c if c.isalnum() else "-" for c in label)
    reference = f"me/{saved.name.lower().replace('--', '-')}"
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(BASES[name](), config()).eval()
        randomise(theirs)
        theirs.save_pretrained(saved)
        if "rank_pattern" in label:  # what it means is PEFT's own reading of the file
            theirs = PeftModel.from_pretrained(BASES[name](), saved).eval()
        wanted = logits(theirs, name, 1)
        release = hub.import_adapter(saved, name=reference, base=base)
        ours = logits(hub.load(base, reference, device="cpu"), name)
        hub.export(reference, folder / "back" / saved.name, base=base)
        loaded = PeftModel.from_pretrained(BASES[name](), folder / "back" / saved.name).eval()
        exported, back = loaded.peft_config["default"].peft_type.value, logits(loaded, name, 1)
    return Measured(
        release, apart(ours, wanted), apart(logits(BASES[name](), name), wanted), exported, apart(back, wanted)
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    return adapterhub.open(folder / "hub", create=True), folder


@pytest.mark.parametrize("label", CASES)
def test_same_logits_as_peft(label, workplace):
    hub, folder = workplace
    found = measured(label, hub, folder)
    assert found.distance < EXACT and found.back < EXACT and found.effect > 100 * EXACT
    start = f"| {label} | {CASES[label][0]} | {found.row}"
    line = next(line for line in table().splitlines() if line.startswith(start))
    assert max(found.distance, found.back) <= float(line.split("|")[5])
    merged = hub.merge([found.release.name], name=f"{found.release.name}-merged")
    one, other = (Adapter.load(hub, r).tensors for r in (found.release, merged))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_every_type_has_one_verdict():
    kinds = [kind.value for kind in PeftType]
    verdicts = [{"LORA"}, TUNERS, CACHES, PROMPTS, set(REFUSED_TYPES)]
    assert sorted(kinds) == sorted(kind for verdict in verdicts for kind in verdict)
    assert {label.partition(",")[0] for label in CASES} == set(kinds) - set(REFUSED_TYPES)


def test_the_table_is_the_pages():
    """What loads, row by row (the figures are looked at above), and what is refused."""
    written = table().splitlines()
    assert [line.split("|")[1].strip() for line in written if line.startswith("| ")][1 : len(CASES) + 1] == list(CASES)
    assert "\n".join(refusals()) in "\n".join(written), "run: python tests/test_peft_table.py"
    types = [line.split("|")[1].strip() for line in written[written.index(AS_METHOD) + 2 :]]
    assert types == sorted(kind.value for kind in PeftType)


@pytest.mark.slow
def test_what_each_type_is_as_a_method_is_the_pages():
    assert table().endswith("\n".join(methods()) + "\n"), "run: python tests/test_peft_table.py"


def methods():
    """What becomes of each type with the method `peft` of adapterhub-peft, found by training it."""
    sys.path.insert(0, str(PAGE.parents[2] / "plugins" / "adapterhub-peft"))
    from peft_outcomes import table as outcomes

    return [AS_METHOD, "|---|---|", *(f"| {kind} | {said} |" for kind, said in sorted(outcomes().items()))]


def table():
    return PAGE.read_text().partition(START)[2].partition(END)[0]


def refusals():
    lines = ["| refused | why |", "|---|---|"]
    lines += [f"| {kind} | {reason} |" for kind, reason in sorted(REFUSED_TYPES.items())]
    lines += [f"| LORA with `{key}` | {reason} |" for key, reason in sorted(REFUSED.items())]
    starts = ", ".join(f"`{str(start).lower()}`" for start in SAFE_STARTS)
    return [*lines, f"| LORA with `init_lora_weights` other than {starts} | it may have changed the base's weights |"]


def write():
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        hub = adapterhub.open(folder / "hub", create=True)
        lines = ["| type | base | forms here | exported as | largest difference |", "|---|---|---|---|---|"]
        for label in CASES:
            found = measured(label, hub, folder)
            distance = max(found.distance, found.back)
            # Thrice as much, rounded up, and no less than 1e-6: what another machine's rounding does not pass.
            figure = f"1e{max(-6, math.ceil(math.log10(3 * distance)))}" if distance else "1e-6"
            lines.append(f"| {label} | {CASES[label][0]} | {found.row} {figure} |")
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + "\n".join([*lines, "", *refusals(), "", *methods()]) + "\n" + END + after)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ADAPTERHUB_PLUGINS"] = "*"
    sys.exit(write())
