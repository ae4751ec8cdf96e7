"""Two skills for one base model: train two adapters of different kinds, measure each, stack them, measure the stack.

uv run python examples/train_two.py    # some minutes on two cores
"""

import argparse
from pathlib import Path

import adapterhub

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--base", default="smollm2", help="known name, folder or Hugging Face repo id")
arguments.add_argument("--hub", help="folder of the hub; without it the nearest, else your own")
arguments.add_argument("--steps", type=int, default=60)
arguments.add_argument("--rows", type=int, help="measure on so many rows only")
given = arguments.parse_args()

data = Path(__file__).parent / "data"
hub = adapterhub.open(given.hub, create=True)


def accuracy(adapters, task):
    """How often the right answer is the likeliest of the allowed ones. adapters None: the bare base."""
    result = hub.evaluate(adapters, given.base, data / f"{task}-test.jsonl", metrics=["label"], limit=given.rows)
    return f"{result['label']:.1%} of {result['n']} rows right on {task}: {adapters or 'the bare base'}"


# A LoRA that tells good reviews from bad ones: a low-rank change of every linear layer.
hub.train(given.base, "lora", data / "sentiment-train.jsonl", "me/sentiment", options={"r": 8}, steps=given.steps)

# A bottleneck adapter that sends a diagnosis to its department: two small layers after attention and feed-forward.
hub.train(given.base, "bottleneck", data / "department-train.jsonl", "me/department", steps=given.steps)

# What each has learned.
print(accuracy(None, "sentiment"))
print(accuracy("me/sentiment", "sentiment"))
print(accuracy(None, "department"))
print(accuracy("me/department", "department"))

# Both at once, on one base; an expression is all it takes. Saved, it is a release without tensors of its own.
stack = hub.compose("me/sentiment + me/department", name="me/both")
print(accuracy(str(stack), "sentiment"))
print(accuracy(str(stack), "department"))

for release in hub.releases():
    print(release)
