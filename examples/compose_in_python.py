"""Compositions in Python: each row of a batch with its own, and what the operators mean. First run train_two.py.

uv run python examples/compose_in_python.py
"""

import argparse

import adapterhub

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--base", default="smollm2", help="known name, folder or Hugging Face repo id")
arguments.add_argument("--hub", help="folder of the hub; without it the nearest, else your own")
given = arguments.parse_args()

hub = adapterhub.open(given.hub)
model = hub.load(given.base)  # the base alone; calls say which adapters run

review = "Text: Sharp, funny and over too soon.\nSentiment (positive or negative):"
diagnosis = "Diagnosis: Acute bronchitis\nDepartment:"

# One batch, five rows, each its own composition. None is the bare base; no row touches another.
rows = [
    (None, review),
    ("me/sentiment", review),
    ("me/department", diagnosis),
    ("me/sentiment + me/department", review),
    ("me/sentiment + me/department", diagnosis),
]
answers = model.complete([text for _, text in rows], adapters=[which for which, _ in rows], max_new_tokens=3)
for (which, text), answer in zip(rows, answers, strict=True):
    print(f"{which or 'the bare base':<30} {text.splitlines()[0]:<42} {answer!r}")

# 0.5*a is half of a's change, a - b takes b's change away, mix(...) is the weighted mean of both outputs.
ids = model.tokenizer([review], return_tensors="pt").to(model.device)
bare = model(**ids).logits[:, -1]
for which in (
    "0.5*me/sentiment",
    "me/sentiment",
    "me/sentiment - me/sentiment",
    "mix(0.5*me/sentiment, 0.5*me/department)",
):
    moved = (model(**ids, adapters=which).logits[:, -1] - bare).abs().max().item()
    print(f"{which:<42} moves the next token's logits by up to {moved:.4f}")

# A composition can be kept: it pins the versions it is made of, and installs and runs as any other adapter.
print(hub.compose("0.7*me/sentiment + me/department", name="me/mostly").manifest.compose)
