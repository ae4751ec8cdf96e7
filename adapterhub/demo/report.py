"""The demo's report: one HTML page that needs nothing else, made of the demo's results alone.

The results, as `adapterhub.demo.run` returns them:

    base, device, seed, seconds, hub     text, text, int, float, text
    tasks      {task: {"title", "rows" (held out), "labels" (how many)}}
    models     [{"name", "kind", "bytes" (None: no file of its own), "note",
                 "scores": {task: {"label": share, "interval": [low, high], "kept": share of the gain or None}}}],
               the bare base first
    curves     {name: [loss of each step, nats a token]}
    sizes      [{"name", "bytes"}]
    compression {"name", "task", "bytes", "bf16", "ratio", "difference", "interval"}    shares, not percent
    lineage    [{"name", "detail", "parents": [names]}], parents before children
    prompts    {task: prompt}
    answers    [{"adapters", "task", "text"}]
    checks     [{"what", "figure", "passed"}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Results = Mapping[str, Any]
COLOURS = ("#1d5fd1", "#c2500a", "#0b7a55", "#7a3fb0")
LEAST_LOSS = 1e-3
"""The loss axis is logarithmic and ends here."""
BASE_COLOUR = "#64707d"

STYLE = """
:root { color-scheme: light; --ink: #1a2026; --soft: #5a6672; --line: #dde2e7; --paper: #fff; --ground: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
h2 + p { margin-top: 0; } footer { color: var(--soft); margin-top: 1.25rem; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .2rem; }
p { margin: .2rem 0 1rem; max-width: 46rem; }
.soft, small, caption { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1.3rem 1.5rem 1.4rem;
  margin-top: 1.25rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; padding: .3rem .9rem .45rem 0; }
td { border-top: 1px solid var(--line); padding: .55rem .9rem .55rem 0; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, pre, .name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .92em; }
.name { white-space: nowrap; }
pre { background: var(--ground); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; margin: .3rem 0 .8rem; }
.score { min-width: 11rem; font-variant-numeric: tabular-nums; }
.mark { color: #a33a00; font-weight: 600; }
ul.checks { list-style: none; padding: 0; margin: .8rem 0 0; display: grid; gap: .35rem; }
ul.checks li { display: flex; gap: .8rem; } ul.checks b { flex: 0 0 4.2rem; }
.passed b { color: #0b6b3f; } .failed b { color: #a33a00; }
svg { display: block; max-width: 100%; height: auto; margin-top: .6rem; }
svg text { font: 13px system-ui, "Segoe UI", Roboto, Arial, "Liberation Sans", sans-serif; fill: var(--ink); }
svg text.soft { fill: var(--soft); font-size: 12px; }
svg text.strong { font-weight: 600; }
"""


def page(results: Results) -> str:
    """The whole page as HTML; every text of the results is escaped."""
    base, trained = escape(results["base"]), len(results["curves"])
    facts = f"base {base} · seed {results['seed']} · {escape(results['device'])} · {_minutes(results['seconds'])}"
    sections = [
        (
            "What came out",
            _checks(results["checks"]) + _table(results),
            "The mark on each bar is where the bare base stands.",
        ),
        (
            "How they learned",
            _curves(results["curves"]),
            "Loss of each step, and its mean over the last ten; the axis is logarithmic.",
        ),
        ("What they weigh", _sizes(results["sizes"]) + _compression(results["compression"]), "Bytes of each file."),
        (
            "Where each comes from",
            _lineage(results["lineage"]),
            "Every release records what it was made of. A bottleneck is no change of a weight, so nothing merges with it: "
            "the merge takes a LoRA of the same skill.",
        ),
        (
            "One batch, each row its own adapters",
            _answers(results),
            "Run in a second hub, after installing the stack and the merge there.",
        ),
    ]
    body = "".join(
        f"<section><h2>{title}</h2><p class='soft'>{lead}</p>{content}</section>" for title, content, lead in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>adapterhub demo: {trained} adapters on {base}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>Two skills for one small model</h1><p class='soft'>{facts}</p>"
        f"<p>{trained} adapters were trained on {base}, stored as versions, compressed, merged, stacked, installed into "
        "another hub and run there. Label accuracy on held-out rows: the right answer is the likeliest of the allowed "
        f"ones. In brackets, 95 % intervals.</p>{body}"
        f"<footer>Made by <code>adapterhub demo --seed {results['seed']}</code>. The hub is "
        f"<code>{escape(results['hub'])}</code>; <code>adapterhub list</code> there shows the releases.</footer>"
        "</main></body></html>\n"
    )


# --- parts of the page -------------------------------------------------------------------------------------------


def _checks(checks: Sequence[Results]) -> str:
    items = [
        f"<li class='{'passed' if c['passed'] else 'failed'}'><b>{'met' if c['passed'] else 'not met'}</b> "
        f"<span>{escape(c['what'])}: {escape(c['figure'])}</span></li>"
        for c in checks
    ]
    return f"<ul class='checks'>{''.join(items)}</ul><br>"


def _table(results: Results) -> str:
    tasks, models = results["tasks"], results["models"]
    heads = "".join(f"<th>{escape(t['title'])}<br>{t['rows']} rows, {t['labels']} labels</th>" for t in tasks.values())
    rows = []
    for model in models:
        cells = "".join(
            f"<td class='score'>{_score(model['scores'].get(task), models[0]['scores'][task]['label'])}</td>"
            for task in tasks
        )
        size = _bytes(model["bytes"]) if model["bytes"] is not None else "–"
        note = f"<br><small>{escape(model['note'])}</small>" if model["note"] else ""
        rows.append(
            f"<tr><td><span class='name'>{escape(model['name'])}</span>{note}</td><td>{escape(model['kind'])}</td>"
            f"<td class='number'>{size}</td>{cells}</tr>"
        )
    return (
        f"<table><thead><tr><th>Release</th><th>Kind</th><th class='number'>File</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _score(score: Results | None, base: float) -> str:
    """Share and interval, a bar with a tick where the bare base stands, and how much of the gain is kept."""
    if score is None:
        return "<small>–</small>"
    low, high = score["interval"]
    bar = (
        f"<rect width='180' height='7' y='2' rx='3.5' fill='#e8ecf0'/>"
        f"<rect width='{180 * score['label']:.1f}' height='7' y='2' rx='3.5' fill='{COLOURS[0]}'/>"
        f"<rect x='{180 * base - 1:.1f}' width='2' height='11' fill='#1a2026'/>"
    )
    text = f"<b>{_percent(score['label'])}</b> <small>[{100 * low:.1f}, {100 * high:.1f}]</small>"
    kept = score.get("kept")
    if kept is not None:
        words = f"keeps {100 * kept:.0f} % of the gain"
        text += f"<br><small>{words}</small>" if kept >= 0.5 else f"<br><small class='mark'>{words}: under half</small>"
    return text + _svg(180, 11, bar, f"{_percent(score['label'])}; the bare base has {_percent(base)}")


def _curves(curves: Mapping[str, Sequence[float]]) -> str:
    width, height, left, bottom, right = 960, 300, 48, 34, 210
    steps = max(map(len, curves.values()))
    low, high = (pick(max(loss, LEAST_LOSS) for losses in curves.values() for loss in losses) for pick in (min, max))
    bottom_power, top_power = math.floor(math.log10(low)), math.log10(high) + 0.05

    def x(step: float) -> float:
        return left + (width - left - right) * step / max(steps - 1, 1)

    def y(loss: float) -> float:
        share = (math.log10(max(loss, LEAST_LOSS)) - bottom_power) / (top_power - bottom_power)
        return 10 + (height - 10 - bottom) * (1 - share)

    parts = []
    for power in range(bottom_power, math.floor(top_power) + 1):
        at = y(10.0**power)
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e3e7eb'/>")
        parts.append(f"<text class='soft' x='{left - 8}' y='{at + 4:.1f}' text-anchor='end'>{10.0**power:g}</text>")
    for step in sorted({round((steps - 1) * i / 4) for i in range(5)}):
        parts.append(
            f"<text class='soft' x='{x(step):.1f}' y='{height - 14}' text-anchor='middle'>step {step + 1}</text>"
        )
    for i, (colour, (name, losses)) in enumerate(zip(COLOURS, curves.items(), strict=False)):
        last = [losses[max(0, j - 9) : j + 1] for j in range(len(losses))]
        for values, style in (
            (losses, "stroke-width='1' opacity='.4'"),
            ([sum(few) / len(few) for few in last], "stroke-width='2.4'"),
        ):
            points = " ".join(f"{x(j):.1f},{y(value):.1f}" for j, value in enumerate(values))
            parts.append(f"<polyline points='{points}' fill='none' stroke='{colour}' {style}/>")
        at = 24 + 24 * i
        parts.append(f"<rect x='{width - right + 18}' y='{at - 6}' width='18' height='4' rx='2' fill='{colour}'/>")
        parts.append(f"<text x='{width - right + 44}' y='{at}'>{escape(name)}</text>")
    return _svg(width, height, "".join(parts), "loss curves")


def _sizes(sizes: Sequence[Results]) -> str:
    left, width, step = 250, 960, 30
    largest = max(item["bytes"] for item in sizes)
    parts = []
    for i, item in enumerate(sizes):
        length = max((width - left - 110) * item["bytes"] / largest, 2)
        middle = step * i + 19
        parts.append(
            f"<text x='{left - 12}' y='{middle}' text-anchor='end'>{escape(item['name'])}</text>"
            f"<rect x='{left}' y='{step * i + 5}' width='{length:.1f}' height='19' rx='3' fill='{COLOURS[0]}'/>"
            f"<text x='{left + length + 8:.1f}' y='{middle}'>{_bytes(item['bytes'])}</text>"
        )
    return _svg(width, step * len(sizes) + 6, "".join(parts), "file sizes")


def _compression(it: Results) -> str:
    low, high = (100 * bound for bound in it["interval"])
    return (
        f"<p><span class='name'>{escape(it['name'])}</span> takes {_bytes(it['bytes'])}, {it['ratio']:.1f} times less than "
        f"the same adapter in bf16 ({_bytes(it['bf16'])}). On the same rows its accuracy on {escape(it['task'])} differs by "
        f"{100 * it['difference']:+.1f} points [{low:+.1f}, {high:+.1f}].</p>"
    )


def _lineage(nodes: Sequence[Results]) -> str:
    """Columns by how far from the base; a curve from each parent to its child."""
    wide, high, across, down = 250, 58, 355, 86
    depth: dict[str, int] = {}
    for node in nodes:
        depth[node["name"]] = 1 + max((depth[parent] for parent in node["parents"]), default=-1)
    columns = [[n["name"] for n in nodes if depth[n["name"]] == d] for d in range(max(depth.values()) + 1)]
    tallest = max(map(len, columns))
    place = {
        name: (2 + across * d, 6 + down * (i + (tallest - len(column)) / 2))
        for d, column in enumerate(columns)
        for i, name in enumerate(column)
    }
    parts = []
    for node in nodes:
        x, y = place[node["name"]]
        for i, parent in enumerate(node["parents"]):
            px, py = place[parent]
            enter = y + high * (i + 1) / (len(node["parents"]) + 1)
            parts.append(
                f"<path d='M{px + wide},{py + high / 2:.1f} C{px + wide + 50},{py + high / 2:.1f} {x - 55},{enter:.1f} "
                f"{x},{enter:.1f}' fill='none' stroke='#8a96a3' stroke-width='1.5'/>"
            )
    for node in nodes:
        x, y = place[node["name"]]
        edge = BASE_COLOUR if depth[node["name"]] == 0 else COLOURS[(depth[node["name"]] - 1) % len(COLOURS)]
        parts.append(
            f"<rect x='{x}' y='{y}' width='{wide}' height='{high}' rx='8' fill='#fff' stroke='{edge}' stroke-width='1.6'/>"
            f"<text class='strong' x='{x + 14}' y='{y + 25}'>{escape(node['name'])}</text>"
            f"<text class='soft' x='{x + 14}' y='{y + 44}'>{escape(node['detail'])}</text>"
        )
    return _svg(across * (len(columns) - 1) + wide + 4, down * tallest - 16, "".join(parts), "lineage")


def _answers(results: Results) -> str:
    prompts = "".join(f"<pre>{escape(prompt)}</pre>" for prompt in results["prompts"].values())
    rows = "".join(
        f"<tr><td><span class='name'>{escape(a['adapters'])}</span></td><td>{escape(a['task'])}</td>"
        f"<td><code>{escape(a['text'])}</code></td></tr>"
        for a in results["answers"]
    )
    return f"{prompts}<table><thead><tr><th>Adapters</th><th>Prompt</th><th>Answer</th></tr></thead><tbody>{rows}</tbody></table>"


# --- small things ------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, content: str, label: str) -> str:
    return (
        f"<svg viewBox='0 0 {width:g} {height:g}' width='{width:g}' height='{height:g}' role='img' "
        f"aria-label='{escape(label, quote=True)}'>{content}</svg>"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count} B"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
