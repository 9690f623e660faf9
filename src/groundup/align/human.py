"""People as judges: the work is handed to an annotation application by one file and comes back by another.

`tasks.jsonl`, written here, one comparison a line:

    {"id": "3f0c...", "batch": 1, "criterion": "safety",
     "prompt": [{"role": "user", "content": "..."}],
     "responses": [{"text": "...", "model": "sft-v2@1a2b", "temperature": 0.7}, {...}],
     "order_seed": 8132}

The application shows `responses[0]` first if `order_seed` is even, else second, and hides who made them.

`ratings.jsonl`, written by the application, one judgement a line, in any order:

    {"id": "3f0c...", "winner": 0, "rating": "better", "is_safe": [true, true], "annotator": "ann", "reason": "..."}

`winner` is an index into `responses`, or null where the annotator cannot tell; `rating` is one of "significantly
better", "better", "slightly better", "negligibly better" (also for unsure), and may be left out without a winner.
`is_safe`, for each of `responses`, is needed for the criterion safety alone. `annotator` and `reason` may be left out.
If a comparison is judged again, the last line counts; {"id": "3f0c...", "withdrawn": true} takes a judgement back.
Lines are only ever appended.

`application.json`, written by the application as soon as it has taken the tasks: {"url": "http://127.0.0.1:8080"}.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groundup.align.judges import RATINGS, UNSAFE_WINNER, Abstention, Pair, Verdict
from groundup.base.errors import UserError
from groundup.base.files import read_json, sha256_json
from groundup.base.records import read_jsonl, to_json, write_jsonl
from groundup.base.seeds import derive_seed

TASKS = "tasks.jsonl"
RATINGS_FILE = "ratings.jsonl"
APPLICATION = "application.json"
UNDECIDED = "left undecided by the annotator"


class HumanJudge:
    """Writes the tasks, and gives the verdicts once all of them are rated."""

    name = "human"

    def __init__(self, folder: Path, batch: int) -> None:
        self._folder = folder
        self._batch = batch

    def grade(self, items: Sequence[Pair]) -> list[Verdict | Abstention]:
        """One result for each pair.

        Raises: UserError that says how many are rated, as long as some are not; for a line that is no judgement of
        these tasks; and for a folder that holds ratings of other tasks.
        """
        tasks = [self._task(pair) for pair in items]
        self._write(tasks)
        ratings = self._read({task["id"] for task in tasks})
        num_rated = sum(task["id"] in ratings for task in tasks)
        if num_rated < len(tasks):
            raise UserError(
                f"{num_rated} of {len(tasks)} comparisons are rated in {self._folder / RATINGS_FILE}", self._remedy()
            )
        return [_verdict(pair, *ratings[task["id"]], self._folder / RATINGS_FILE) for pair, task in zip(items, tasks)]

    def _remedy(self) -> str:
        command = f"`groundup annotate --handover {shlex.quote(str(self._folder))}`"
        if (self._folder / APPLICATION).exists():
            where = f"rate the others at {read_json(self._folder / APPLICATION)['url']} ({command} starts it again)"
        else:
            where = f"start {command}, and rate those of {self._folder / TASKS} at the address that it prints"
        return f"{where}; then run the same command to go on, nothing is generated again"

    def _task(self, pair: Pair) -> dict[str, Any]:
        content = {
            "batch": self._batch,
            "criterion": pair.prompt.criterion,
            "prompt": [to_json(message) for message in pair.prompt.messages],
            "responses": [
                {"text": text, "model": origin.model, "temperature": origin.temperature}
                for text, origin in zip(pair.responses, pair.origins, strict=True)
            ],
        }
        task_id = sha256_json(content)[:32]
        return {"id": task_id, **content, "order_seed": derive_seed(0, "order", task_id) % 2**31}

    def _write(self, tasks: list[dict[str, Any]]) -> None:
        path = self._folder / TASKS
        if path.exists() and list(read_jsonl(path)) == tasks:
            return
        if path.exists() and (self._folder / RATINGS_FILE).exists():
            raise UserError(
                f"{path}: holds other comparisons than this run's, and there are ratings of them",
                f"move {self._folder} aside, or name another annotation_folder",
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, tasks)

    def _read(self, known: set[str]) -> dict[str, tuple[dict[str, Any], int]]:
        """Task -> its last rating and that line's number."""
        path = self._folder / RATINGS_FILE
        if not path.exists():
            return {}
        ratings: dict[str, tuple[dict[str, Any], int]] = {}
        for number, row in _whole_rows(path):
            task_id = row.get("id")
            if not isinstance(task_id, str) or task_id not in known:
                raise UserError(f"{path}:{number}: no task has the id {task_id!r}", f"{TASKS} holds the tasks")
            if row.get("withdrawn") is True:
                ratings.pop(task_id, None)
            else:
                ratings[task_id] = (row, number)
        return ratings


def _whole_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file that is being written to, with their numbers; a last line that is not whole yet is no row."""
    *lines, last = path.read_bytes().split(b"\n")
    if last.strip() and _parses(last):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _verdict(pair: Pair, row: dict[str, Any], number: int, path: Path) -> Verdict | Abstention:
    where = f"{path}:{number}"
    winner, rating, is_safe = row.get("winner"), row.get("rating"), row.get("is_safe")
    if winner is None:
        return Abstention(UNDECIDED)
    if isinstance(winner, bool) or winner not in (0, 1):
        raise UserError(f"{where}: winner = {winner!r}", "it is 0, 1 or null")
    if rating not in RATINGS:
        raise UserError(f"{where}: rating = {rating!r}", f"one of: {', '.join(RATINGS)}")
    labels = None
    if pair.prompt.criterion == "safety":
        if not (isinstance(is_safe, list) and len(is_safe) == 2 and all(isinstance(label, bool) for label in is_safe)):
            raise UserError(
                f"{where}: is_safe = {is_safe!r}", "a safety comparison needs [true or false, true or false]"
            )
        labels = (is_safe[0], is_safe[1])
        if any(labels) and not labels[winner]:
            return Abstention(UNSAFE_WINNER)
    return Verdict(winner, rating, labels, str(row.get("reason", "")), str(row.get("annotator", "")))
