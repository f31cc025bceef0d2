"""The page of every kind of report: template, verdicts, figures inside, environment, configuration, command."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from thermoe.report.figures import RenderedFigure
from thermoe.report.run_data import RunData, entry, section
from thermoe.report.wording import duration


def render_page(template: str, data: RunData, figures: list[RenderedFigure], **own: Any) -> str:
    """Return a report as HTML; every value goes through the template's escaping.

    Args:
        template: file name; it extends `page.html.j2`.
        data: the run.
        figures: as drawn.
        own: what only this kind of report states.
    """
    environment = Environment(
        loader=PackageLoader("thermoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = [row.get("holds") for row in data.of("verdict")]
    return environment.get_template(template).render(
        run=data.path.resolve().name,
        finished=data.finished,
        verdicts=_verdicts(data),
        counts=(said.count(True), said.count(False), said.count(None)),
        figures={figure.name: _embedded(figure) for figure in figures},
        environment=_flat(section(data.manifest, "environment")),
        config=_flat(section(data.manifest, "config")),
        durations=_durations(data),
        command=_command(data),
        **own,
    )


def _embedded(figure: RenderedFigure) -> dict[str, Any]:
    def uri(image: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(image).decode("ascii")

    return {"light": uri(figure.light), "dark": uri(figure.dark), "width": figure.width, "height": figure.height}


def _verdicts(data: RunData) -> list[dict[str, str]]:
    words: dict[Any, tuple[str, str]] = {True: ("holds", "holds"), False: ("fails", "does not hold")}
    verdicts = []
    for row in data.of("verdict"):
        if row.get("text"):
            kind, label = words.get(row.get("holds"), ("open", "for information"))
            verdicts.append({"text": str(row["text"]), "kind": kind, "label": label})
    return verdicts


def _flat(source: Any, prefix: str = "") -> list[tuple[str, str]]:
    """List nested entries as (dotted key, text); a setting that is not set is left out."""
    found: list[tuple[str, str]] = []
    for key, value in source.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{name}."))
        elif value is None or value in ("", [], "nan"):
            continue
        elif isinstance(value, (list, tuple)):
            listed = (
                json.dumps(item) if isinstance(item, (Mapping, list)) else str(item)
                for item in value
                if item is not None
            )
            found.append((name, ", ".join(listed)))
        elif isinstance(value, bool):
            found.append((name, "yes" if value else "no"))
        else:
            found.append((name, str(value)))
    return found


def _durations(data: RunData) -> list[tuple[str, str]]:
    return [
        (str(stage).replace("_", " "), duration(seconds))
        for stage, seconds in section(data.manifest, "durations_s").items()
    ]


def _command(data: RunData) -> str:
    found = data.manifest.get("command") or entry(data.manifest, "environment", "command")
    if isinstance(found, (list, tuple)):
        return shlex.join(str(part) for part in found)
    return str(found or "")
