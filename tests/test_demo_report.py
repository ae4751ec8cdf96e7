"""The demo's report: it stands alone, shows every figure, and no text of the results becomes markup."""

import copy
import re
from html.parser import HTMLParser

import pytest

from adapterhub.demo.report import page

VOID = {"meta", "rect", "line", "path", "polyline", "br"}


def score(label, kept=None):
    return {"label": label, "interval": [label - 0.04, label + 0.04], "kept": kept}


RESULTS = {
    "base": "smollm2",
    "device": "cpu",
    "seed": 3,
    "seconds": 421.7,
    "hub": "/somewhere/hub",
    "tasks": {
        "sentiment": {"title": "Sentiment of reviews", "rows": 304, "labels": 2},
        "department": {"title": "Department of a diagnosis", "rows": 303, "labels": 8},
    },
    "models": [
        {
            "name": "bare base",
            "kind": "smollm2",
            "bytes": None,
            "note": "",
            "scores": {"sentiment": score(0.651), "department": score(0.627)},
        },
        {
            "name": "demo/sentiment@0.1.0",
            "kind": "lora",
            "bytes": 9_791_234,
            "note": "",
            "scores": {"sentiment": score(0.912)},
        },
        {
            "name": "demo/both-stacked@0.1.0",
            "kind": "stack",
            "bytes": None,
            "note": "demo/sentiment + demo/department",
            "scores": {"sentiment": score(0.888, 0.93), "department": score(0.683, 0.31)},
        },
    ],
    "curves": {
        "demo/sentiment": [3.0 * 0.95**i + 0.3 for i in range(60)],
        "demo/department": [2.5 * 0.97**i + 0.4 for i in range(60)],
        "demo/department-lora": [2.4 * 0.96**i + 0.45 for i in range(40)],
    },
    "sizes": [{"name": "demo/sentiment", "bytes": 9_791_234}, {"name": "demo/sentiment-small", "bytes": 456_789}],
    "compression": {
        "name": "demo/sentiment-small",
        "task": "sentiment",
        "bytes": 456_789,
        "bf16": 4_901_234,
        "ratio": 10.73,
        "difference": -0.0132,
        "interval": [-0.031, 0.0049],
    },
    "lineage": [
        {"name": "smollm2", "detail": "the base", "parents": []},
        {"name": "demo/sentiment", "detail": "lora", "parents": ["smollm2"]},
        {"name": "demo/department", "detail": "bottleneck", "parents": ["smollm2"]},
        {"name": "demo/sentiment-small", "detail": "compeft", "parents": ["demo/sentiment"]},
        {
            "name": "demo/both-stacked",
            "detail": "stack",
            "parents": ["demo/sentiment", "demo/department"],
        },
    ],
    "prompts": {"sentiment": "Text: fine.\nSentiment:", "department": "Diagnosis: Asthma\nDepartment:"},
    "answers": [{"adapters": "bare base", "task": "sentiment", "text": "\nI think"}],
    "checks": [{"what": "sentiment gains at least 15 points", "figure": "+26.1", "passed": True}],
}


class Tree(HTMLParser):
    """Checks that every element is closed in its turn; keeps the attributes and the texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_it_needs_nothing_else():
    tree = Tree(page(RESULTS))
    assert not {"script", "link", "img", "iframe"} & set(tree.tags)
    assert not [value for name, value in tree.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in page(RESULTS) and "@import" not in page(RESULTS)


def test_every_figure_is_there():
    text = " ".join(Tree(page(RESULTS)).texts)
    for figure in (
        "91.2 %",
        "[87.2, 95.2]",
        "9.79 MB",
        "10.7 times",
        "-1.3 points [-3.1, +0.5]",
        "7 min 1 s",
        "303 rows",
    ):
        assert figure in text, figure
    for model in RESULTS["models"]:
        assert model["name"] in text and model["note"] in text


def test_a_stack_that_keeps_under_half_is_marked():
    marked = re.findall(r"class='mark'>([^<]*)<", page(RESULTS))
    assert marked == ["keeps 31 % of the gain: under half"]


@pytest.mark.parametrize(
    "place",
    [
        ("base",),
        ("hub",),
        ("models", 1, "name"),
        ("models", 2, "note"),
        ("models", 1, "kind"),
        ("tasks", "sentiment", "title"),
        ("sizes", 0, "name"),
        ("answers", 0, "text"),
        ("answers", 0, "adapters"),
        ("prompts", "sentiment"),
        ("checks", 0, "what"),
        ("checks", 0, "figure"),
        ("compression", "name"),
        ("lineage", 1, "detail"),
    ],
)
def test_text_stays_text(place):
    hostile = "</code></svg>'\"><script>alert(1)</script>&amp;"
    results = copy.deepcopy(RESULTS)
    at = results
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = hostile
    tree = Tree(page(results))
    assert "script" not in tree.tags
    assert hostile in "\n".join(tree.texts)


def test_curves_and_lines_of_descent_are_drawn():
    drawn = page(RESULTS)
    assert drawn.count("<polyline") == 6  # each curve, and its mean
    assert drawn.count("<path") == 5  # an edge for every parent
    points = re.search(r"points='([^']*)'", drawn)[1].split()
    assert len(points) == 60
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights)  # the loss falls, so the curve goes down the page
