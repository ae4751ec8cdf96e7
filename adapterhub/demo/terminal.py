"""The demo's results as a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 120
"""Of the table where there is no terminal to ask."""


def show(results: Mapping[str, Any]) -> None:
    """The table, what was promised and kept, and the answers of the mixed batch."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(_table(results))
    for check in results["checks"]:
        mark = Text("met      ", "green") if check["passed"] else Text("not met  ", "red")
        console.print(mark + Text(f"{check['what']}: {check['figure']}", ""))
    console.print("\nOne batch in the second hub, each row with its own adapters:")
    for answer in results["answers"]:
        console.print(Text(f"  {answer['task']:<12}{answer['adapters']:<28}{answer['text']!r}"))


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(title="Label accuracy on held-out rows [95 % interval]", title_justify="left")
    for head in ("release", "kind", "bytes"):
        table.add_column(head, justify="right" if head == "bytes" else "left", no_wrap=head == "release")
    for task, facts in results["tasks"].items():
        table.add_column(f"{task}, {facts['rows']} rows")
    for model in results["models"]:
        size = "" if model["bytes"] is None else f"{model['bytes']:,}"
        cells = [_cell(model["scores"].get(task)) for task in results["tasks"]]
        table.add_row(Text(model["name"]), Text(model["kind"]), size, *cells)
    return table


def _cell(score: Mapping[str, Any] | None) -> Text:
    if score is None:
        return Text("")
    low, high = score["interval"]
    text = Text(f"{100 * score['label']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    if score["kept"] is not None:
        enough = score["kept"] >= 0.5
        text.append(f"\nkeeps {100 * score['kept']:.0f} % of the gain", "")
        text.append("" if enough else ": under half", "red")
    return text
