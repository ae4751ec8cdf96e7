"""Your own training loop: me/department goes on learning above a frozen me/sentiment. First run train_two.py.

uv run python examples/plain_torch_loop.py
"""

import argparse
import json
import random
from pathlib import Path

import torch

import adapterhub

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--base", default="smollm2", help="known name, folder or Hugging Face repo id")
arguments.add_argument("--hub", help="folder of the hub; without it the nearest, else your own")
arguments.add_argument("--steps", type=int, default=20)
given = arguments.parse_args()

data = Path(__file__).parent / "data" / "department-train.jsonl"
rows = [json.loads(line) for line in data.read_text().splitlines()]
draw = random.Random(0)

# The loop. Nothing in it is ours but load, trainable_parameters and save.
hub = adapterhub.open(given.hub)
model = hub.load(given.base, "me/sentiment + me/department", trainable=["me/department"])
optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-4)
for step in range(given.steps):
    texts = [row["prompt"] + row["completion"] for row in draw.sample(rows, 8)]
    batch = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    logits = model(**batch).logits[:, -2]  # padded on the left, so the last token of each row is its answer
    loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")
release = model.save("me/department")
print(f"{release}: parents {', '.join(f'{p.name}@{p.version} ({p.relation})' for p in release.manifest.parents)}")
