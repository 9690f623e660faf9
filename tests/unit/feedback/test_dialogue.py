"""Dialogues with models: two variants, blind and in random order; nobody but the server writes what models say."""

import pytest
from sqlalchemy import select
from tests.apps.feedback_world import LABEL, World, answers, start

from groundup.feedback.accounts import Account
from groundup.feedback.contents import GivenResponse, ItemContent
from groundup.feedback.errors import Conflict, Invalid
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Submission
from groundup.feedback.work import Task


def take_turn(world: World, ann: Account, task: Task, prompt: str) -> Task:
    number, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, prompt)
    return world.dialogues.finish_turn(ann.id, task.assignment_id, number, answers(generations, f"to {prompt}"))


def stored(world: World) -> dict[str, object]:
    with world.database.read() as session:
        return session.scalars(select(Submission)).one().answer


def test_the_winner_goes_on_with_the_dialogue(world: World) -> None:
    ann, _, task = start(world, system_prompt="Be kind.")
    expected = [{"role": "system", "content": "Be kind."}]
    shown_first = []
    for number, prompt in enumerate(("one", "two", "three"), 1):
        expected.append({"role": "user", "content": prompt})
        begun, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, prompt)
        assert begun == number
        assert [generation.position for generation in generations] == [0, 1]
        assert len({generation.endpoint_id for generation in generations}) == 2
        assert all(0.7 <= generation.temperature <= 1.0 for generation in generations)
        assert [dict(message) for message in generations[0].messages] == expected
        task = world.dialogues.finish_turn(ann.id, task.assignment_id, number, answers(generations, f"to {prompt}"))
        assert not task.can_add_turn
        shown = task.turns[-1].responses
        assert shown == tuple(f"{generation.model} to {prompt}" for generation in generations)
        judgement = {"winner": number % 2, "rating": "better", "reason": "so"}
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, judgement)
        assert task.turns[-1].judgement == judgement | {"is_safe": None}
        assert task.can_add_turn
        expected.append({"role": "assistant", "content": shown[number % 2]})
        shown_first.append(shown[0])
    world.submit(ann, task, {})
    for turn, first, prompt in zip(stored(world)["turns"], shown_first, ("one", "two", "three"), strict=True):
        assert turn["responses"][turn["shown_first"]]["text"] == first
        assert turn["messages"][-1] == {"role": "user", "content": prompt}
        assert {response["revision"] for response in turn["responses"]} == {"sha0", "sha1"}
        assert turn["responses"][0]["token_ids"] == [1, 2]
    assert [len(turn["messages"]) for turn in stored(world)["turns"]] == [2, 4, 6]


def test_a_prompt_from_a_list_may_be_changed(world: World) -> None:
    content = ItemContent.model_validate({"messages": [{"role": "user", "content": "from the list"}]})
    ann, _, task = start(world, items=[NewItem(content)])
    assert task.messages[-1].content == "from the list"
    assert task.responses is None
    _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "mine")
    assert [message.content for message in generations[0].messages] == ["mine"]


def test_the_order_and_the_models_vary(world: World) -> None:
    ann, _, task = start(world, models=3, max_turns=50)
    orders = set()
    for number in range(40):
        task = take_turn(world, ann, task, f"prompt {number}")
        orders.add(tuple(text.split()[0] for text in task.turns[-1].responses or ()))
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number + 1, {})
    assert len(orders) == 6


def test_a_lone_model_answers_twice(world: World) -> None:
    ann, _, task = start(world, models=1)
    _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    assert len({generation.endpoint_id for generation in generations}) == 1
    assert len({generation.seed for generation in generations}) == 2


def test_a_project_without_models_says_so(world: World) -> None:
    ann, _, task = start(world, models=0)
    with pytest.raises(Conflict, match="no model"):
        world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    assert world.work.task(ann.id, task.assignment_id).turns == ()


def test_beginning_again_keeps_the_plan_of_the_same_prompt_alone(world: World) -> None:
    ann, _, task = start(world)
    first = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    assert world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello") == first
    number, other = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "good-bye")
    assert number == first[0] == 1
    with pytest.raises(Conflict, match="another prompt"):
        world.dialogues.finish_turn(ann.id, task.assignment_id, 1, answers(first[1]))
    shown = world.dialogues.finish_turn(ann.id, task.assignment_id, 1, answers(other)).turns
    late = world.dialogues.finish_turn(ann.id, task.assignment_id, 1, answers(other, "is late")).turns
    assert shown == late  # the first to come wins


def test_made_up_responses_are_refused(world: World) -> None:
    ann, _, task = start(world)
    _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    for made_up in ([], answers(generations)[:1], [GivenResponse(text="mine"), GivenResponse(text="mine")]):
        with pytest.raises(Conflict):
            world.dialogues.finish_turn(ann.id, task.assignment_id, 1, made_up)


def test_turns_come_one_after_another(world: World) -> None:
    ann, _, task = start(world, max_turns=1)
    dialogues, number = world.dialogues, task.assignment_id
    with pytest.raises(Invalid, match="talk"):
        world.submit(ann, task, {})
    task = take_turn(world, ann, task, "hello")
    with pytest.raises(Conflict, match="judge"):
        dialogues.begin_turn(ann.id, number, task.version, "next")
    with pytest.raises(Invalid, match="not judged"):
        world.submit(ann, task, {})
    with pytest.raises(Invalid):
        dialogues.judge_turn(ann.id, number, task.version, 1, {"winner": 0, "rating": "good"})
    judged = dialogues.judge_turn(ann.id, number, task.version, 1, {"winner": 0, "rating": "better"})
    with pytest.raises(Conflict, match="another tab"):
        dialogues.judge_turn(ann.id, number, task.version, 1, {})
    changed = dialogues.judge_turn(ann.id, number, judged.version, 1, {"winner": 1, "rating": "better"})
    assert not changed.can_add_turn
    with pytest.raises(Conflict, match="as long as"):
        dialogues.begin_turn(ann.id, number, changed.version, "next")
    dropped = dialogues.drop_turn(ann.id, number, changed.version, 1)
    assert dropped.turns == ()
    assert dropped.can_add_turn


def test_a_turn_before_the_last_is_fixed(world: World) -> None:
    ann, _, task = start(world)
    task = take_turn(world, ann, task, "one")
    task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, 1, {"winner": 0, "rating": "better"})
    task = take_turn(world, ann, task, "two")
    with pytest.raises(Conflict, match="gone on"):
        world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, 1, {})
    with pytest.raises(Conflict, match="gone on"):
        world.dialogues.drop_turn(ann.id, task.assignment_id, task.version, 1)


def test_safety_judgements_follow_the_page_s_order(world: World) -> None:
    ann, _, task = start(world, criterion="safety")
    for number in range(1, 7):
        task = take_turn(world, ann, task, f"prompt {number}")
        judgement = {"winner": 1, "rating": "better", "is_safe": [False, True]}
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, judgement)
        assert task.turns[-1].judgement == judgement | {"reason": ""}
    world.submit(ann, task, {})
    turns = stored(world)["turns"]
    assert {turn["shown_first"] for turn in turns} <= {0, 1}
    for turn in turns:
        assert turn["winner"] == 1 - turn["shown_first"]
        assert turn["is_safe"][turn["winner"]]
        assert not turn["is_safe"][turn["shown_first"]]


@pytest.mark.parametrize("prompt", ["", "   ", "a\0b", "x" * 50_001])
def test_prompts_that_cannot_be_sent(world: World, prompt: str) -> None:
    ann, _, task = start(world)
    with pytest.raises(Invalid):
        world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, prompt)


def test_a_red_team_session(world: World) -> None:
    ann, _, task = start(world, "redteam", items=[NewItem(ItemContent(instructions="try"))])
    for number in (1, 2):
        begun, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, f"attack {number}")
        assert len(generations) == 1
        task = world.dialogues.finish_turn(ann.id, task.assignment_id, begun, answers(generations))
        with pytest.raises(Invalid):
            world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, LABEL | {"severity": 6})
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, LABEL)
    world.clock.turn(90)
    world.submit(ann, task, {"reason": "enough"})
    with world.database.read() as session:
        submission = session.scalars(select(Submission)).one()
    assert submission.seconds == 90
    assert [turn["severity"] for turn in submission.answer["turns"]] == [4, 4]
    assert [len(turn["messages"]) for turn in submission.answer["turns"]] == [1, 3]


def test_a_comparison_is_generated_once_for_all_raters(world: World) -> None:
    content = ItemContent.model_validate({"messages": [{"role": "user", "content": "Why?"}]})
    ann, project, task = start(world, "comparison", items=[NewItem(content)], overlap=3)
    assert task.responses is None
    with pytest.raises(Invalid, match="generated"):
        world.submit(ann, task, {"score": 1})
    generations = world.dialogues.comparison_generations(ann.id, task.assignment_id)
    assert generations is not None
    assert generations == world.dialogues.comparison_generations(ann.id, task.assignment_id)
    task = world.dialogues.set_comparison(ann.id, task.assignment_id, answers(generations))
    assert task.responses == tuple(f"{generation.model} says" for generation in generations)
    assert world.dialogues.comparison_generations(ann.id, task.assignment_id) is None
    again = world.dialogues.set_comparison(ann.id, task.assignment_id, answers(generations, "late"))
    assert again.responses == task.responses
    world.submit(ann, again, {"score": 2})
    bob = world.person("bob")
    other = world.work.claim(bob.id, project.id)
    assert other is not None
    assert set(other.responses or ()) == set(task.responses or ())
    answer = stored(world)
    assert answer["score"] == (-2 if answer["shown_first"] else 2)
    assert [response["model"] for response in answer["responses"]] == ["secret-model0", "secret-model1"]


def test_given_responses_leave_nothing_to_generate(world: World) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = world.work.claim(ann.id, project.id)
    assert task is not None
    with pytest.raises(Invalid, match="no model to talk to"):
        world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    with pytest.raises(Invalid, match="no comparison"):
        world.dialogues.comparison_generations(ann.id, task.assignment_id)
    assert not task.can_add_turn


def test_keys_and_addresses_stay_on_the_server(world: World) -> None:
    ann, project, task = start(world)
    _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    assert generations[0].api_key.startswith("key-of-model")
    assert "key-of" not in repr(generations)
    task = world.dialogues.finish_turn(
        ann.id,
        task.assignment_id,
        1,
        [GivenResponse(text="hi", endpoint_id=g.endpoint_id, seed=g.seed) for g in generations],
    )
    seen = repr((task, world.work.offers(ann.id), world.work.progress(ann.id, project.id)))
    for secret in ("secret", "key-of", "127.0.0.1", "sha0", "temperature"):
        assert secret not in seen
