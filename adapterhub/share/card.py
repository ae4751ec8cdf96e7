"""The model card, written from the manifest. What a user has written around it stays."""

from __future__ import annotations

import json
import re
from typing import Any

from adapterhub.spec.manifest import Manifest, Release
from adapterhub.store.index import kind

BEGIN = "<!-- adapterhub: written from the manifest; what stands outside these marks is kept -->"
END = "<!-- /adapterhub -->"
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_OURS = ("base_model", "base_model_relation", "library_name", "tags", "license", "model-index")


def card(release: Release, repo: str, peft_type: str | None, before: str = "") -> str:
    """README.md of a repo. before: the one that is there; its text outside our marks and its other fields stay.

    peft_type: PEFT's name for it, when the repo holds PEFT's files."""
    front = _front(release, repo, peft_type)
    found = _FRONT.match(before)
    kept = [] if found is None else _others(found[1])
    head = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]  # JSON is YAML
    text = f"{BEGIN}\n{_text(release, repo, peft_type)}\n{END}"
    body = before[found.end() :] if found else before
    if BEGIN in body and END in body:
        first, _, rest = body.partition(BEGIN)
        body = first + text + rest.partition(END)[2]
    else:
        body = f"{text}\n\n{body.lstrip()}" if body.strip() else f"{text}\n"
    return "---\n" + "\n".join([*head, *kept]) + "\n---\n" + body


def _front(release: Release, repo: str, peft_type: str | None) -> dict[str, Any]:
    manifest = release.manifest
    tags = ["adapterhub", f"adapterhub:method:{kind(manifest).replace(' ', '')}"]
    tags += ["peft", peft_type.lower()] if peft_type else []
    front: dict[str, Any] = {"library_name": "peft" if peft_type else "adapterhub", "tags": tags}
    if _REPO.fullmatch(manifest.base.name):  # a local folder's name is nobody else's
        front |= {"base_model": manifest.base.name, "base_model_relation": "adapter"}
    if manifest.licence:
        front["license"] = manifest.licence.lower() if re.fullmatch(r"[\w.-]+", manifest.licence) else "other"
    if results := _results(manifest):
        front["model-index"] = [{"name": repo, "results": results}]
    return front


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    numbers = {key: value for key, value in sorted(manifest.metrics.items()) if type(value) in (int, float)}
    metrics = [{"type": key, "value": value} for key, value in numbers.items()]
    task = {"type": "text-generation"}
    return [{"task": task, "dataset": {"type": "other", "name": "held out"}, "metrics": metrics}] if metrics else []


def _text(release: Release, repo: str, peft_type: str | None) -> str:
    manifest = release.manifest
    size = sum(file.size for file in manifest.files.values())
    facts = [
        ("release", f"{release}"),
        ("digest", release.digest),
        ("kind", kind(manifest)),
        ("base", manifest.base.name + (f" ({manifest.base.note})" if manifest.base.note else "")),
        ("base's fingerprint", manifest.base.sketch.digest),
        ("size", f"{size} bytes"),
        ("licence", manifest.licence or "not stated"),
    ]
    if manifest.method:
        options = ", ".join(f"{key}={value}" for key, value in manifest.method.options.items())
        facts.append(("method", manifest.method.name + (f" ({options})" if options else "")))
    if manifest.compose is not None:
        facts.append(("expression", manifest.compose))
    facts += [("needs the plugin", f"{name} {version}") for name, version in manifest.plugins.items()]
    facts += [(f"metric {key}", value) for key, value in sorted(manifest.metrics.items())]
    lines = [f"# {_plain(release.name)} {release.version}", ""]
    lines += ["| | |", "|---|---|", *(f"| {_plain(key)} | {_plain(value)} |" for key, value in facts)]
    if manifest.parents:
        lines += ["", "Made from:", ""]
        lines += [f"- {_plain(p.relation)}: {p.name} {p.version} (`{p.digest}`)" for p in manifest.parents]
    lines += ["", "With adapterhub, every byte checked and the base held against its fingerprint:", ""]
    lines += ["```console", f"$ adapterhub install hf:{repo}@v{release.version}", "```", "", "```python"]
    lines += ["import adapterhub", f'model = adapterhub.open().load("path/to/base", "{release}")', "```"]
    if peft_type:
        lines += ["", "With PEFT alone:", "", "```python", "from peft import PeftModel"]
        lines += [f'model = PeftModel.from_pretrained(base_model, "{repo}", revision="v{release.version}")', "```"]
    return "\n".join(lines)


def _others(front: str) -> list[str]:
    """The lines of a front matter whose fields are not ours, with what hangs on them."""
    kept, keep = [], False
    for line in front.splitlines():
        if line[:1].strip() and not line.startswith("-"):
            keep = line.partition(":")[0].strip() not in _OURS
        if keep:
            kept.append(line)
    return kept


def _plain(value: object) -> str:
    """Text that no renderer takes for markup, and no terminal for a command."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return (
        re.sub(r"([\\`*_{}\[\]<>()#|!~&])", r"\\\1", text.replace("<", "&lt;")) if re.search(r"[<\[|`]", text) else text
    )
