"""Train, save, stack, route and decode with a form that another package brings. Arguments: base folder, data, hub."""

import json
import sys

import torch
from adapterhub_causal_conv import CausalConv
from torch.nn.functional import conv1d, pad

import adapterhub

base, data, where = sys.argv[1:]
hub = adapterhub.open(where, create=True)
settings = {"base": base, "data": data, "steps": 12, "batch_size": 4, "device": "cpu"}
release = hub.train(method="causal_conv", name="me/conv", options={"size": "3"}, lr=0.05, **settings)
hub.train(method="lora", name="me/lora", options={"r": 2}, lr=0.05, **settings)

# The formula is torch's own convolution, padded on the left.
y, kernel = torch.randn(2, 9, 5), torch.randn(3, 5)
change = CausalConv(kernel=kernel).delta_out(y, y, adapterhub.Step())
want = conv1d(pad(y.mT, (2, 0)), kernel.mT[:, None], groups=5).mT
assert torch.allclose(change, want, atol=1e-5)

# Stored under its own form's name, with the package that brings it; it learned.
assert release.manifest.forms["model.layers.0.mlp"] == ["causal_conv"]
assert release.manifest.method.distribution == "adapterhub-causal-conv 0.1.0"
losses = [entry["loss"] for entry in json.loads(hub.store.read(release.manifest.files["log"]))]
assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses

# Each row of a padded batch, and each cached step, gives what it gives alone, unpadded, in one forward.
model = adapterhub.open(where).load(base, dtype=torch.float64, device="cpu")
rows = ["me/conv", "me/conv + me/lora", "me/lora", "-0.5*me/conv", "me/conv + 0.5*me/conv", None]
texts = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14, 7, 12, 8, 11)]
with torch.no_grad():
    alone = [model(input_ids=text[None], adapters=[row]).logits[0] for row, text in zip(rows, texts, strict=True)]
    bare = [model(input_ids=text[None], adapters=[None]).logits[0] for text in texts]
for own, base_alone in list(zip(alone, bare, strict=True))[:-1]:
    assert (own - base_alone).abs().max() > 0.05
for side in ("left", "right"):
    ids, mask = torch.zeros(6, 11, dtype=torch.long), torch.zeros(6, 11, dtype=torch.long)
    for row, text in enumerate(texts):  # all but the last three tokens of each
        n = len(text) - 3
        place = slice(11 - n, 11) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = text[:-3], 1
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, adapters=rows, use_cache=True)
        got = [[out.logits[row][mask[row].bool()]] for row in range(6)]
        for step in (-3, -2, -1):
            mask = torch.cat([mask, torch.ones(6, 1, dtype=torch.long)], dim=1)
            ids = torch.stack([text[step] for text in texts])[:, None]
            cache = out.past_key_values
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, adapters=rows, use_cache=True)
            for row in range(6):
                got[row].append(out.logits[row])
    for row, (pieces, want) in enumerate(zip(got, alone, strict=True)):
        error = (torch.cat(pieces) - want).abs().max() / want.abs().max()
        assert error < 1e-9, f"row {row}, padded {side}: {error:.1e}"

# generate() writes the same with a cache and without one.
prompt = {"input_ids": texts[0][None], "attention_mask": torch.ones(1, 9, dtype=torch.long), "adapters": ["me/conv"]}
cached, full = (model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
assert torch.equal(cached, full), (cached, full)
