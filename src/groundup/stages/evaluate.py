"""Stage `evaluate`: all versions of a run and held-out prompts -> who is more helpful and who is safer."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from groundup.align.durable import DurableLines
from groundup.base.artifacts import MANIFEST, Artifact, open_artifact
from groundup.base.config import Config
from groundup.base.errors import UserError
from groundup.base.files import write_json, write_text
from groundup.base.generation import SamplingParams
from groundup.base.progress import Progress, say
from groundup.base.records import Prompt, read_jsonl, to_json, write_jsonl
from groundup.base.seeds import derive_seed
from groundup.data.dialogues import read_dialogues
from groundup.data.prompts import HELD_OUT_FILE, TRAIN_FILE, text_asked
from groundup.data.rows import read_rows
from groundup.data.sources import PREFIX, get_source, is_named, read_source_rows
from groundup.data.splits import chosen_by_text, normalised
from groundup.evals.compare import RESPONSES
from groundup.evals.judges import AnswerQuality, harm_judge, refusal_judge
from groundup.evals.scoreboard import MEASURES, Answer, Panel, difference_rows, judge_answers, version_row
from groundup.infer.engine import Engine
from groundup.infer.quantize import Weights
from groundup.model.checkpoint import load_checkpoint
from groundup.report.alignment_figures import EVALUATION, MAIN_MEASURES, difference_figures, progress_figure
from groundup.stages.job import Job

VERSION = 3
_CHUNK_PROMPTS = 64


class EvaluateConfig(Config):
    """How the versions are compared: the same prompts, settings and random numbers for all.

    Choice: temperature and top-p are those of `groundup chat`, so that what is judged is what its user meets.
    """

    baseline: str | None = Field(
        default=None, description="version the others are compared with; null: the newest one before alignment"
    )
    max_prompts: int | None = Field(
        default=None, gt=0, description="held-out prompts of each criterion, drawn from all sources; null: all"
    )
    samples_per_prompt: int = Field(default=1, gt=0, description="responses of each version to each prompt")
    max_new_tokens: int = Field(default=128, gt=0, description="longest response in tokens")
    temperature: float = Field(default=0.7, ge=0, description="of all versions; 0: the likeliest token each time")
    top_p: float = Field(default=0.9, gt=0, le=1, description="of all versions")
    weights: Weights = Field(default="as is", description="form of the weights to generate with")
    max_slots: int = Field(default=32, gt=0, description="responses generated at once")
    labels: tuple[str, ...] = Field(
        default=("refusal-labels", "harm-labels"),
        description="labelled responses that teach the judges what refusals and harm are; [] leaves safety unjudged",
    )
    quality_dialogues: tuple[str, ...] = Field(
        default=("kto-demo",), description="dialogues that teach the judge of open prompts; [] leaves these unjudged"
    )

    @field_validator("labels", "quality_dialogues", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def judge_sources(self) -> tuple[str, ...]:
        return (*self.labels, *self.quality_dialogues)


def raw_inputs(config: EvaluateConfig) -> list[Path]:
    """The judges' sources that are not names of the catalogue."""
    return [Path(source) for source in config.judge_sources if Path(source).exists() or not is_named(source)]


@dataclass(frozen=True)
class _Questions:
    """The held-out prompts that are asked, by name, and why others are not."""

    prompts: dict[str, Prompt]
    left_out: Counter[str]


def run(config: EvaluateConfig, job: Job) -> dict[str, Any]:
    """Ask, judge and compare; returns the means of every version and what was left out."""
    versions = _versions(job.inputs)
    baseline = _baseline(config, versions)
    _check_independence(config, versions.values())
    questions = _read_questions(config, job)
    panel = _panel(config, questions.prompts.values(), job.seed)
    for name, found in panel.reliability().items():
        say(f"{job.name}: the judge of {name} agrees with {found['accuracy']['mean']:.1%} of unseen labels")
    answers = [answer for name, model in versions.items() for answer in _ask(config, job, name, model, questions)]
    answers = _asked_of_all(answers, questions, len(versions))
    rows = judge_answers(answers, questions.prompts, panel)
    write_jsonl(job.out / RESPONSES, rows)
    table = [version_row(rows, name, job.seed) for name in versions]
    criteria = Counter(questions.prompts[key].criterion for key in {answer.prompt for answer in answers})
    result = {
        "baseline": baseline,
        "prompts": dict(criteria),
        "left_out": dict(questions.left_out),
        "samples_per_prompt": config.samples_per_prompt,
        "sampling": {key: getattr(config, key) for key in ("temperature", "top_p", "max_new_tokens")},
        "judges": panel.reliability(),
        "versions": table,
        "differences": difference_rows(rows, baseline, job.seed),
    }
    write_json(job.out / EVALUATION, result)
    for name, svg in {**progress_figure(result), **difference_figures(result)}.items():
        write_text(job.out / f"{name}.svg", svg)
    _tell(job.name, result)
    return {
        "versions": {
            row["version"]: {measure: found["mean"] for measure, found in row["measures"].items()} for row in table
        },
        "prompts": dict(criteria),
        "left_out": dict(questions.left_out),
        "tokens": sum(answer.tokens for answer in answers),
    }


def _tell(name: str, result: dict[str, Any]) -> None:
    """A line for each version, and one for what sets it apart from the baseline."""
    for row in result["versions"]:
        means = [f"{MEASURES[key].label} {found['mean']:.3f}" for key, found in row["measures"].items()]
        say(f"{name}: {row['version']}: {', '.join(means)}")
    for row in result["differences"]:
        gaps = [
            f"{MEASURES[key].label} {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
            for key in MAIN_MEASURES
            if (gap := row["measures"].get(key, {}).get("difference")) is not None
        ]
        say(f"{name}: {row['version']} minus {row['baseline']}, 95 % intervals: {', '.join(gaps)}")


def _versions(inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    """The chat models of a run, oldest first; the base model only where nothing else stands before alignment."""
    models = {name: artifact for name, artifact in inputs.items() if artifact.kind == "model"}
    if not models:
        raise UserError("there is no model to evaluate", "give the recipe a stage that makes one, e.g. `sft_v2:`")
    has_sft = any(not _is_aligned(name) and name != "base" for name in models)
    return {name: artifact for name, artifact in models.items() if name != "base" or not has_sft}


def _is_aligned(name: str) -> bool:
    return name.startswith("rlhf")


def _baseline(config: EvaluateConfig, versions: dict[str, Artifact]) -> str:
    if config.baseline is None:
        return next((name for name in reversed(versions) if not _is_aligned(name)), next(iter(versions)))
    if config.baseline not in versions:
        raise UserError(f"evaluate.baseline = {config.baseline!r} is no version", f"one of: {', '.join(versions)}")
    return config.baseline


def _check_independence(config: EvaluateConfig, models: Iterable[Artifact]) -> None:
    """A judge that learns from what training has read is no judge.

    Raises: UserError if a source of the judges is named by a stage that these models, or what they are made from,
    come out of.
    """
    sources = {name: source for source in config.judge_sources for name in (_bare(source), str(Path(source).resolve()))}
    for artifact in _ancestors(models):
        raw = [entry["path"] for entry in artifact.manifest["inputs"].values() if not entry.get("relative")]
        for text in [*_strings(artifact.manifest["config"]), *raw]:
            if _bare(text) in sources:
                raise UserError(
                    f"evaluate: the judges are to learn from {sources[_bare(text)]!r}, which {artifact.path.name} was "
                    "made from",
                    "give the judges a source of their own (labels, quality_dialogues)",
                )


def _bare(source: str) -> str:
    """Without what options a name carries."""
    return source.removeprefix(PREFIX).partition("?")[0]


def _ancestors(artifacts: Iterable[Artifact]) -> Iterator[Artifact]:
    """These artifacts and, through their manifests, all of the run that they are made from."""
    waiting, seen = list(artifacts), set[Path]()
    while waiting:
        artifact = waiting.pop()
        if artifact.path.resolve() in seen:
            continue
        seen.add(artifact.path.resolve())
        yield artifact
        for entry in artifact.manifest["inputs"].values():
            path = artifact.path / entry["path"]
            if entry.get("relative") and (path / MANIFEST).exists():
                waiting.append(open_artifact(path))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def _read_questions(config: EvaluateConfig, job: Job) -> _Questions:
    """The held-out prompts, without those that training asked too."""
    folder = job.inputs["prompts"]
    trained = {_words(prompt) for prompt in _read_prompts(folder.file(TRAIN_FILE))}
    questions = _Questions({}, Counter())
    fresh: dict[str, list[tuple[str, Prompt]]] = {}
    for number, prompt in enumerate(_read_prompts(folder.file(HELD_OUT_FILE)), 1):
        if _words(prompt) in trained:
            questions.left_out["also a training prompt"] += 1
        else:
            fresh.setdefault(prompt.criterion, []).append((str(number), prompt))
    for found in fresh.values():
        # Drawn from all sources by what they say: the first ones would all be of the same source.
        wanted = chosen_by_text([text_asked(prompt) for _, prompt in found], config.max_prompts or len(found))
        if len(wanted) < len(found):
            questions.left_out["beyond max_prompts"] += len(found) - len(wanted)
        questions.prompts.update(found[index] for index in sorted(wanted))
    if not questions.prompts:
        raise UserError(
            f"{folder.path}: no held-out prompt to ask ({dict(questions.left_out)})", "hold out some in `prompts:`"
        )
    return questions


def _read_prompts(path: Path) -> Iterator[Prompt]:
    return map(Prompt.from_json, read_jsonl(path))


def _words(prompt: Prompt) -> str:
    return normalised(text_asked(prompt))


def _panel(config: EvaluateConfig, prompts: Iterable[Prompt], seed: int) -> Panel:
    """The judges that these prompts need."""
    kinds = {"safety" if p.criterion == "safety" else "task" if "task" in p.metadata else "open" for p in prompts}
    rows = [row for source in config.labels for row in _read_labels(source)]
    pairs = [
        (dialogue.messages[-2].content, dialogue.messages[-1].content)
        for source in (config.quality_dialogues if "open" in kinds else ())
        for dialogue in read_dialogues(source if Path(source).exists() else get_source(source))
    ]
    panel = Panel(
        refusal_judge(rows, derive_seed(seed, "refusals")) if rows else None,
        harm_judge(rows, derive_seed(seed, "harm")) if rows and "safety" in kinds else None,
        AnswerQuality(pairs, derive_seed(seed, "quality")) if pairs else None,
    )
    for kind, judge, key in (("safety", panel.refusal, "labels"), ("open", panel.quality, "quality_dialogues")):
        if kind in kinds and judge is None:
            say(f"evaluate: answers to {kind} prompts are not judged, as evaluate.{key} is empty")
    return panel


def _read_labels(source: str) -> Iterator[dict[str, Any]]:
    """Rows of a named source of labels, or of a file of the same layout."""
    if not Path(source).exists():
        yield from read_source_rows(source)
        return
    for number, row in read_rows(Path(source)):
        if row is None or not {"response", "label", "score"} <= row.keys():
            raise UserError(f"{source}:{number}: not a labelled response", "give response, label and score (0 to 1)")
        yield {**row, "score": float(row["score"])}


def _ask(config: EvaluateConfig, job: Job, name: str, model: Artifact, questions: _Questions) -> list[Answer]:
    """A version's answers; what an evaluation that was killed has already asked is not asked again."""
    with DurableLines(job.work / f"{name}.jsonl") as file:
        done = Counter(row["prompt"] for row in file.rows)
        waiting = [key for key in questions.prompts if done[key] < config.samples_per_prompt]
        if waiting:
            for answer in _generate(
                config, job.seed, name, model.path, {key: questions.prompts[key] for key in waiting}
            ):
                if answer.sample >= done[answer.prompt]:
                    file.append(to_json(answer))
        return [Answer(**row) for row in file.rows]


def _generate(
    config: EvaluateConfig, seed: int, name: str, model: Path, prompts: dict[str, Prompt]
) -> Iterator[Answer]:
    """Answers to the prompts that fit into the context. Red-team prompts may hold the words of control tokens; they are
    asked as plain text."""
    checkpoint = load_checkpoint(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = checkpoint.model.to(device).eval()
    engine = Engine(network, checkpoint.tokenizer, max_slots=config.max_slots, weights=config.weights)
    encoded = [(key, checkpoint.chat.encode_prompt(p.messages, on_tag="neutralise")) for key, p in prompts.items()]
    fitting = [(key, ids) for key, ids in encoded if len(ids) < engine.max_tokens]
    with Progress(f"evaluate: {name}", len(fitting), "prompts") as progress:
        for start in range(0, len(fitting), _CHUNK_PROMPTS):
            chunk = fitting[start : start + _CHUNK_PROMPTS]
            params = [
                SamplingParams(
                    max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                    num_samples=config.samples_per_prompt, seed=derive_seed(seed, "response", key),
                    stop_ids=checkpoint.chat.stop_ids,
                )
                for key, _ in chunk
            ]  # fmt: skip
            responses = engine.generate([ids for _, ids in chunk], params)
            for (key, _), completions in zip(chunk, responses, strict=True):
                for number, each in enumerate(completions):
                    text, is_ended = each.text.strip(), each.finish_reason == "stop"
                    yield Answer(name, key, number, text, len(each.token_ids), is_ended)
            progress.advance(len(chunk))


def _asked_of_all(answers: list[Answer], questions: _Questions, num_versions: int) -> list[Answer]:
    """Only prompts that fit into every version's context, so that all are compared on the same ones."""
    versions_of: dict[str, set[str]] = {}
    for answer in answers:
        versions_of.setdefault(answer.prompt, set()).add(answer.version)
    shared = {key for key, versions in versions_of.items() if len(versions) == num_versions}
    questions.left_out["longer than a version's context"] += len(questions.prompts) - len(shared)
    if not shared:
        raise UserError("evaluate: no held-out prompt fits into every version's context", "hold out shorter ones")
    return [answer for answer in answers if answer.prompt in shared]
