"""One HTML page about a run: all of it comes from the artifacts' manifests and logs, nothing from the network."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from groundup.base.artifacts import LOGS, Artifact, provenance
from groundup.base.files import read_json, write_text
from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.base.records import Message
from groundup.report.alignment import alignment_section
from groundup.report.figures import Curve, bars_svg, curves_svg
from groundup.report.ppo_figures import is_ppo_log, ppo_figures

Panels = tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
"""Title, unit, (key of a metrics row, label); a panel is drawn when the log has one of its keys."""
TEXT_PANELS: Panels = (
    ("Loss", "nats per target token", (("loss", "training"), ("held_out_loss", "held out"))),
    ("Held-out text", "bits per byte", (("held_out_bits_per_byte", "held out"),)),
)
COMPARISON_PANELS: Panels = (
    ("Loss", "nats per comparison", (("loss", "training"), ("held_out_loss", "held out"))),
    (
        "Comparisons", "share ranked right",
        (("share_correct", "training"), ("reward_accuracy", "training"), ("held_out_accuracy", "held out")),
    ),
    ("Chosen against rejected", "score difference", (("score_difference", "training"), ("reward_margin", "training"))),
)  # fmt: skip
STEP_PANELS: Panels = (
    ("Learning rate", "learning rate", (("lr", "learning rate"),)),
    ("Gradient norm", "norm before clipping", (("grad_norm", "norm"),)),
    ("Speed", "tokens/s", (("tokens_per_second", "tokens/s"),)),
)
NOISY = {
    "loss",
    "grad_norm",
    "tokens_per_second",
    "share_correct",
    "reward_accuracy",
    "score_difference",
    "reward_margin",
}


@dataclass(frozen=True)
class SampleChat:
    """A conversation with one of the run's models."""

    model: str
    messages: tuple[Message, ...]


def write_page(
    path: Path, name: str, description: str, artifacts: dict[str, Artifact], chats: Sequence[SampleChat]
) -> None:
    """Write the page about `artifacts` (name -> artifact, in the order they were made)."""
    environment = Environment(
        loader=PackageLoader("groundup.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "number": number}
    text = environment.get_template("page.html.jinja").render(
        name=name,
        description=description,
        environment=provenance(),
        tiles=list(_tiles(artifacts)),
        chats=chats,
        alignment=alignment_section(artifacts),
        stages=[_stage_row(artifact) for artifact in artifacts.values()],
        totals=_totals(artifacts),
        trainings=[training for artifact in artifacts.values() if (training := _training(artifact))],
        data=_data(artifacts),
        metrics={key: dict(flatten(a.metrics)) for key, a in artifacts.items() if a.metrics},
        configs={key: _as_yaml(a.manifest["config"]) for key, a in artifacts.items()},
        lineage=[_lineage_row(key, artifact) for key, artifact in artifacts.items()],
    )  # fmt: skip
    write_text(path, text)


def _as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: Any) -> str:
    """A metric as text: thousands separated, four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:,.4g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as ("outer: inner", value) pairs."""
    for key, value in tree.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from flatten(value, f"{label}: ")
        else:
            yield label, json.dumps(value) if isinstance(value, list) else value


def find_metric(artifact: Artifact, words: str) -> float | None:
    """The first number among an artifact's metrics whose key contains `words`."""
    for key, value in flatten(artifact.metrics):
        if words in key and isinstance(value, int | float):
            return value
    return None


def _tiles(artifacts: dict[str, Artifact]) -> Iterator[tuple[str, str]]:
    """The few numbers people look for first."""
    models = [artifact for artifact in artifacts.values() if artifact.kind == "model"]
    parameters = [value for model in models if (value := find_metric(model, "parameters"))]
    if parameters:
        yield "parameters", number(parameters[-1])
    for model in models:
        bits = find_metric(model, "bits per byte")
        if bits is not None and model.path.name == "base":
            yield "held-out bits per byte", number(bits)
    tokens = sum(int(artifact.manifest["cost"]["tokens"] or 0) for artifact in models)
    if tokens:
        yield "tokens trained on", number(tokens)
    totals = _totals(artifacts)
    yield "time", duration(totals["wall_seconds"])
    yield "energy, estimated", f"{totals['energy_kwh_estimate'] * 1000:,.3g} Wh"


def _totals(artifacts: dict[str, Artifact]) -> dict[str, float]:
    keys = ("wall_seconds", "cpu_seconds", "energy_kwh_estimate")
    return {key: sum(artifact.manifest["cost"][key] for artifact in artifacts.values()) for key in keys}


def _stage_row(artifact: Artifact) -> dict[str, Any]:
    cost = artifact.manifest["cost"]
    return {
        "stage": artifact.manifest["stage"],
        "artifact": artifact.path.name,
        "id": artifact.id[:12],
        "seconds": cost["wall_seconds"],
        "resumed": cost["resumed"],
        "tokens": cost["tokens"],
        "energy_wh": cost["energy_kwh_estimate"] * 1000,
        "bytes": sum(entry["bytes"] for entry in artifact.manifest["files"].values()),
    }


def _training(artifact: Artifact) -> dict[str, Any] | None:
    """Curves of one training stage; None for an artifact without a metrics log."""
    path = artifact.path / LOGS / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    figures = (ppo_figures if is_ppo_log(rows) else _curves)(rows, artifact.path.name)
    samples = [(row["step"], row["sample"]) for row in rows if isinstance(row.get("sample"), str)]
    inline = [Markup(svg) for svg in figures]  # noqa: S704 - ours
    return {"name": artifact.path.name, "figures": inline, "samples": samples[-3:]} if figures else None


def _curves(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    figures = []
    is_of_comparisons = any(key in row for row in rows for key in ("score_difference", "reward_margin"))
    for title, unit, keys in (*(COMPARISON_PANELS if is_of_comparisons else TEXT_PANELS), *STEP_PANELS):
        curves = []
        for key, label in keys:
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
            if points:
                steps, values = zip(*points, strict=True)
                curves.append(Curve(label, steps, values, is_noisy=key in NOISY))
        if curves:
            figures.append(curves_svg(title, unit, curves, f"{name} {title}"))
    return figures


def _data(artifacts: dict[str, Artifact]) -> dict[str, Any] | None:
    """Documents by source and by reason of dropping, from the corpus's report."""
    corpus = artifacts.get("corpus")
    if corpus is None:
        return None
    report = read_json(corpus.file("report.json"))
    drops: dict[str, float] = {}
    for source in report["sources"]:
        for what, count in source["documents"].items():
            if what.startswith("dropped: "):
                drops[what.removeprefix("dropped: ")] = drops.get(what.removeprefix("dropped: "), 0) + count
        for what, count in source["skipped_by_reader"].items():
            drops[f"{what} (reader)"] = drops.get(f"{what} (reader)", 0) + count
    figure = Markup(bars_svg("Documents dropped, by reason", drops, "drops")) if drops else None  # noqa: S704 - ours
    return {
        "sources": report["sources"],
        "splits": {key: report[key] for key in ("train", "held_out")},
        "figure": figure,
    }


def _lineage_row(name: str, artifact: Artifact) -> dict[str, Any]:
    inputs = [
        f"{role}: {Path(entry['path']).name} {entry['id'][:12]}"
        if "id" in entry
        else f"{entry['path']} ({entry['bytes']:,} bytes)"
        for role, entry in artifact.manifest["inputs"].items()
    ]
    return {"name": name, "kind": artifact.kind, "id": artifact.id[:12], "inputs": inputs}
