"""Pages of dialogues with models: what was said is shown once, goes to the models once and is kept once."""

import re
from types import SimpleNamespace

import pytest
from fastapi import Request
from sqlalchemy import select
from tests.apps.feedback_world import LABEL, World, answers, start

from groundup.feedback.accounts import Account
from groundup.feedback.contents import ItemContent
from groundup.feedback.dialogue import Generation
from groundup.feedback.projects import NewItem
from groundup.feedback.routes_tasks import task_page
from groundup.feedback.security import Services
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.tables import Submission
from groundup.feedback.work import Task

GIVEN = [("user", "Given question"), ("assistant", "Given answer"), ("user", "Offered question")]


def item() -> NewItem:
    """A dialogue that ends with a prompt, as lists of prompts give them."""
    return NewItem(ItemContent.model_validate({"messages": [{"role": role, "content": text} for role, text in GIVEN]}))


def page_of(world: World, user: Account, task: Task, again: bool = False) -> str:
    """The page as the server sends it."""
    config = AnnotateConfig(database="unused")
    inside = Services(config, world.database, world.accounts, world.projects, world.work, world.dialogues)
    app = SimpleNamespace(state=SimpleNamespace(services=inside))
    request = Request({"type": "http", "headers": [], "app": app, "state": {"user": user}})
    return bytes(task_page(request, task.assignment_id, again).body).decode()


def shown(page: str, role: str) -> list[str]:
    """What one side says in the dialogue on a page."""
    turns = re.findall(rf'<li class="turn {role}".*?</li>', page, re.DOTALL)
    words = [re.sub(r"<[^>]*>", "", turn).split() for turn in turns]
    return [" ".join(found[1:]) for found in words]  # without "Person" or "Model"


def sent(generations: tuple[Generation, ...], role: str) -> list[str]:
    """What one side says in the dialogue that all the models get."""
    (messages,) = {generation.messages for generation in generations}
    assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    return [message.content for message in messages if message.role == role]


@pytest.mark.parametrize("kind", ["preference", "redteam"])
@pytest.mark.parametrize("first", ["Offered question", "Question in its place"])
def test_no_turn_is_shown_sent_or_kept_twice(world: World, kind: str, first: str) -> None:
    ann, _, task = start(world, kind, items=[item()], max_turns=3)
    judgement = LABEL if kind == "redteam" else {"winner": 0, "rating": "better"}
    said = ["Given question"]
    assert shown(page_of(world, ann, task), "user") == said, "what is offered stands in the form alone"
    for prompt in (first, "Second question", "Third question"):
        said.append(prompt)
        number, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, prompt)
        assert sent(generations, "user") == said
        while_waiting = page_of(world, ann, task)
        given = answers(generations, f"to {prompt}")
        task = world.dialogues.finish_turn(ann.id, task.assignment_id, number, given)
        to_be_judged = page_of(world, ann, task)
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, judgement)
        for page in (while_waiting, to_be_judged, page_of(world, ann, task), page_of(world, ann, task, again=True)):
            assert shown(page, "user") == said
    world.submit(ann, task, {})
    with world.database.read() as session:
        kept = session.scalars(select(Submission)).one().answer["turns"]
    for number, turn in enumerate(kept, 2):
        assert [message["content"] for message in turn["messages"] if message["role"] == "user"] == said[:number]


def test_what_an_undecided_turn_goes_on_with_is_what_is_shown(world: World) -> None:
    """Whichever response stood first on the page."""
    ann, _, task = start(world, max_turns=12)
    heard: list[str] = []
    for number in range(1, 13):
        _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, f"prompt {number}")
        assert sent(generations, "assistant") == heard
        given = answers(generations, f"to prompt {number}")
        task = world.dialogues.finish_turn(ann.id, task.assignment_id, number, given)
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, {})
        heard = shown(page_of(world, ann, task), "assistant")
    assert len(heard) == 12


def test_after_the_last_turn_nothing_is_left_to_be_compared(world: World) -> None:
    ann, _, task = start(world, max_turns=1)
    number, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "only prompt")
    task = world.dialogues.finish_turn(ann.id, task.assignment_id, number, answers(generations))
    assert "Response A" in page_of(world, ann, task)
    task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, 1, {"winner": 0, "rating": "better"})
    assert "Response A" not in page_of(world, ann, task)
    assert "Response A" in page_of(world, ann, task, again=True)
