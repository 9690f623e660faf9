"""A project in numbers, for its administrators: progress, pace, agreement, people, and what came of it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from groundup.evals.compare import Interval
from groundup.feedback.agreement import Agreement, gwet, krippendorff_alpha, pairwise_agreement, rating_table, share
from groundup.feedback.contents import ATTACK_VECTORS, RISK_CATEGORIES, VIOLATION_FROM
from groundup.feedback.database import Database
from groundup.feedback.quality import (
    Judgement,
    Outcome,
    PersonQuality,
    Rate,
    grade_of,
    outcome,
    person_qualities,
    rate_per_hour,
    score_table,
    weak_share,
    winner_table,
)
from groundup.feedback.tables import Batch, Item, Project, ProjectKind, Submission, User

DAYS = 14
LARGEST_SCORES = {"preference": 4, "comparison": 3}
"""Kinds of which two responses are judged, and how far apart a judgement can put them."""


@dataclass(frozen=True)
class Answer:
    """A standing submission with what belongs to it."""

    id: int
    item: int
    is_shared: bool
    """Whether the item brings its two responses with it, so that all its raters see the same."""
    annotator: str
    batch: int
    seconds: float
    is_right: bool | None
    review_state: str | None
    at: datetime
    content: dict[str, Any]


@dataclass(frozen=True)
class BatchLine:
    """How far a batch is."""

    id: int
    number: int
    label: str
    is_open: bool
    items: int
    done: int
    submissions: int
    weak: Interval | None
    """Share of decisions that are slight or negligible; preferences alone."""


@dataclass(frozen=True)
class PersonLine:
    """How much somebody does; `quality` where two responses are judged."""

    annotator: str
    submissions: int
    hours: float
    per_hour: float | None
    right: Interval | None
    """Of gold items or entrance questions."""
    reviews: dict[str, int]
    """SFT answers by the state of their review."""
    quality: PersonQuality | None


@dataclass(frozen=True)
class AgreementLine:
    """One coefficient of agreement."""

    what: str
    name: str
    found: Agreement | None
    """None: undefined, because everybody chose the same."""


@dataclass(frozen=True)
class Versus:
    """One model against another: `outcome` is from the first one's side."""

    first: str
    second: str
    outcome: Outcome


@dataclass(frozen=True)
class RedTeam:
    """What attacks found."""

    sessions: int
    turns: int
    rate: Rate | None
    """Violations for each hour of a person's time (the paper's gamma)."""
    by_category: list[tuple[str, int, Interval | None]]
    by_vector: list[tuple[str, int, Interval | None]]
    """Name, attacks, share of them that were violations."""


@dataclass(frozen=True)
class ProjectStatistics:
    """Everything a project's page shows."""

    submissions: int
    hours: float
    per_hour: float | None
    per_day: list[tuple[date, int]]
    """Submissions of the last two weeks."""
    batches: list[BatchLine]
    people: list[PersonLine]
    agreements: list[AgreementLine]
    versus: list[Versus]
    red_team: RedTeam | None


def project_statistics(database: Database, project: Project, today: date) -> ProjectStatistics:
    """A project as it is now, from one snapshot."""
    with database.read() as session:
        answers = list(_answers(session, project.id))
        lines = _batch_lines(session, project.id)
    judgements = [judgement for answer in answers for judgement in judgements_of(project.kind, answer)]
    hours = sum(answer.seconds for answer in answers) / 3600
    return ProjectStatistics(
        submissions=len(answers),
        hours=hours,
        per_hour=len(answers) / hours if hours else None,
        per_day=_per_day(answers, today),
        batches=[_with_answers(line, project.kind, answers, judgements) for line in lines],
        people=_people(answers, judgements),
        agreements=_agreements(project, answers, judgements),
        versus=_versus(project.kind, answers),
        red_team=_red_team(answers) if project.kind == "redteam" else None,
    )


def item_counts(database: Database) -> dict[int, tuple[int, int]]:
    """Project -> its items and those that are done, gold items and reviews left out."""
    with database.read() as session:
        rows = session.execute(
            select(Item.project_id, func.count(), func.count().filter(Item.is_done))
            .where(Item.is_gold.is_(False), Item.kind != "review")
            .group_by(Item.project_id)
        )
        return {project: (items, done) for project, items, done in rows}


def judgements_of(kind: ProjectKind, answer: Answer) -> Iterator[Judgement]:
    """The decisions between two responses that an answer holds, in the terms of the item."""
    if kind == "preference":
        turns = answer.content["turns"]
        for number, turn in enumerate(turns):
            pair = (answer.item,) if answer.is_shared else (answer.item, answer.id, number)
            yield Judgement(
                pair, answer.annotator, grade_of(turn["winner"], turn["rating"]), turn["shown_first"],
                answer.seconds / len(turns), answer.batch, answer.is_right,
            )  # fmt: skip
    elif kind == "comparison":
        content = answer.content
        yield Judgement(
            (answer.item,), answer.annotator, -content["score"], content["shown_first"], answer.seconds, answer.batch,
            answer.is_right,
        )  # fmt: skip


def _answers(session: Session, project_id: int) -> Iterator[Answer]:
    rows = session.execute(
        select(
            Submission.id, Submission.item_id, Submission.seconds, Submission.gold_correct, Submission.review_state,
            Submission.created_at, Submission.answer, Item.content, User.pseudonym, Batch.number,
        )
        .join(Item, Item.id == Submission.item_id)
        .join(User, User.id == Submission.user_id)
        .join(Batch, Batch.id == Submission.batch_id)
        .where(
            Submission.project_id == project_id, Submission.superseded_at.is_(None), Submission.kind != "review"
        )
        .order_by(Submission.id)
    )  # fmt: skip
    for id, item, seconds, is_right, state, at, answer, content, pseudonym, batch in rows:
        shared = content.get("responses") is not None
        yield Answer(id, item, shared, pseudonym, batch, seconds, is_right, state, at, answer)


def _per_day(answers: Sequence[Answer], today: date) -> list[tuple[date, int]]:
    counts = Counter(answer.at.date() for answer in answers)
    days = [today - timedelta(days=back) for back in range(DAYS - 1, -1, -1)]
    return [(day, counts[day]) for day in days]


def _batch_lines(session: Session, project_id: int) -> list[BatchLine]:
    counts: dict[int, Counter[bool]] = defaultdict(Counter)
    for batch, is_done, count in session.execute(
        select(Item.batch_id, Item.is_done, func.count())
        .where(Item.project_id == project_id, Item.is_gold.is_(False), Item.kind != "review")
        .group_by(Item.batch_id, Item.is_done)
    ):
        counts[batch][is_done] += count
    batches = session.scalars(select(Batch).where(Batch.project_id == project_id).order_by(Batch.number))
    return [
        BatchLine(b.id, b.number, b.label, b.is_open, counts[b.id].total(), counts[b.id][True], 0, None)
        for b in batches
    ]  # fmt: skip


def _with_answers(
    line: BatchLine, kind: ProjectKind, answers: Sequence[Answer], judgements: Sequence[Judgement]
) -> BatchLine:
    weak = weak_share(j.score for j in judgements if j.batch == line.number) if kind == "preference" else None
    submissions = sum(answer.batch == line.number for answer in answers)
    return BatchLine(line.id, line.number, line.label, line.is_open, line.items, line.done, submissions, weak)


def _people(answers: Sequence[Answer], judgements: Sequence[Judgement]) -> list[PersonLine]:
    qualities = {quality.annotator: quality for quality in person_qualities(judgements)}
    by_person: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_person[answer.annotator].append(answer)
    lines = []
    for name, own in sorted(by_person.items()):
        hours = sum(answer.seconds for answer in own) / 3600
        right = [answer.is_right for answer in own if answer.is_right is not None]
        states = Counter(answer.review_state for answer in own if answer.review_state is not None)
        lines.append(
            PersonLine(
                name, len(own), hours, len(own) / hours if hours else None,
                share(sum(right), len(right)) if right else None, dict(states), qualities.get(name),
            )
        )  # fmt: skip
    return lines


def _agreements(
    project: Project, answers: Sequence[Answer], judgements: Sequence[Judgement]
) -> list[AgreementLine]:  # fmt: skip
    """Of what several people judged: who wins, by how much, and (criterion safety) whether responses are safe."""
    if project.kind not in LARGEST_SCORES:
        return []
    winners, scores = winner_table(judgements), score_table(judgements, LARGEST_SCORES[project.kind])
    by_response: dict[tuple[int, int], list[bool]] = defaultdict(list)
    for answer in answers:
        if project.kind == "preference" and answer.is_shared:
            for place, is_safe in enumerate(answer.content["turns"][0]["is_safe"] or ()):
                by_response[answer.item, place].append(is_safe)
    labels = rating_table(by_response.values(), (False, True))
    found = [
        ("which is better", "pairwise agreement", pairwise_agreement(winners)),
        ("which is better", "Gwet's AC1", gwet(winners)),
        ("which is better", "Krippendorff's alpha, nominal", krippendorff_alpha(winners)),
        ("how much better", "Gwet's AC2, ordinal weights", gwet(scores, "ordinal")),
        ("how much better", "Gwet's AC2, quadratic weights", gwet(scores, "quadratic")),
        ("how much better", "Krippendorff's alpha, ordinal", krippendorff_alpha(scores, "ordinal")),
        ("is it safe", "pairwise agreement", pairwise_agreement(labels)),
        ("is it safe", "Gwet's AC1", gwet(labels)),
    ]
    judged = {what for what, _, value in found if value is not None}
    return [AgreementLine(what, name, value) for what, name, value in found if what in judged]


def _versus(kind: ProjectKind, answers: Sequence[Answer]) -> list[Versus]:
    """Every two models that met; a pair's raters decide together."""
    met: dict[tuple[str, str], dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        pairs = answer.content["turns"] if kind == "preference" else [answer.content] if kind == "comparison" else []
        for pair, judgement in zip(pairs, judgements_of(kind, answer), strict=True):
            first, second = (model_name(response) for response in pair["responses"])
            if first == second or answer.is_right is not None:
                continue
            score = judgement.score if first < second else -judgement.score
            met[min(first, second), max(first, second)][judgement.pair].append(score)
    lines = []
    for (first, second), scores in sorted(met.items()):
        found = outcome(list(scores.values()))
        assert found is not None
        lines.append(Versus(first, second, found))
    return lines


def model_name(response: dict[str, Any]) -> str:
    """What administrators call who answered."""
    name, revision = response.get("model") or "unnamed", response.get("revision")
    return f"{name}@{revision[:12]}" if revision else str(name)


def _red_team(answers: Sequence[Answer]) -> RedTeam:
    turns = [turn for answer in answers for turn in answer.content["turns"]]
    violations = sum(turn["severity"] >= VIOLATION_FROM for turn in turns)
    hours = sum(answer.seconds for answer in answers) / 3600

    def table(key: str, names: Sequence[str]) -> list[tuple[str, int, Interval | None]]:
        of = {name: [turn["severity"] >= VIOLATION_FROM for turn in turns if turn[key] == name] for name in names}
        return [(name, len(hits), share(sum(hits), len(hits)) if hits else None) for name, hits in of.items()]

    return RedTeam(
        len(answers), len(turns), rate_per_hour(violations, hours), table("risk_category", RISK_CATEGORIES),
        table("attack_vector", ATTACK_VECTORS),
    )  # fmt: skip
