"""PEFT's types, each with a verdict: `tests/test_peft_table.py` holds that none is missing, and measures those that load."""

from __future__ import annotations

TUNERS = frozenset({
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
"""Types that change modules of the base one by one: PEFT builds them, and each changed module is lowered (`peft_lower`)."""
CACHES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Types whose tensor is the keys and values themselves."""
PROMPTS = frozenset({"PROMPT_TUNING", "P_TUNING", "CPT"})
"""Types whose tensor is embeddings of virtual tokens before the text."""
REFUSED = {
    "ADAMSS": "its subspaces come from clustering the base's weights anew at every load, and are not in the file",
    "ADAPTION_PROMPT": "its prompts have a softmax of their own beside that of the attention",
    "LILY": "a router weighs its factors by the tokens, so it is not a change of a weight",
    "MULTITASK_PROMPT_TUNING": "it gives another prompt for each task, and the task is not in the file",
    "POLY": "it mixes its factors by a task that is given with each batch",
    "SHADOW": "a second, smaller model runs beside the base",
    "XLORA": "it mixes other adapters token by token, and those are not in the file",
}
"""Types that have no exact counterpart here, and why."""
UNMEASURED = frozenset({"ADALORA", "BOFT", "FROD", "SHIRA", "UNILORA"})
"""Types that PEFT cannot build without memory behind the tensors: their sizes are bounded by the config alone."""
