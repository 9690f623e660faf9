"""Who checks whom: reviews of written answers, entrance tests, gold items mixed into the work."""

import pytest
from tests.apps.feedback_world import World, an_item, claimed, submissions

from groundup.feedback.contents import Gold
from groundup.feedback.errors import Conflict, Forbidden, Invalid
from groundup.feedback.projects import NewItem
from groundup.feedback.work import Task

# Reviews


def sft_world(world: World) -> tuple[int, Task]:
    ann = world.person("ann", "reviewer")
    project = world.project("sft", [NewItem()], is_reviewed=True)
    task = claimed(world, ann.id, project.id)
    world.submit(ann, task, {"prompt": "Why?", "response": "Becuase."})
    return project.id, task


def test_nobody_reviews_their_own_work(world: World) -> None:
    project_id, _ = sft_world(world)
    ann = world.accounts.accounts(world.admin)[0]
    assert ann.name == "ann"
    assert world.work.claim(ann.id, project_id, review=True) is None
    assert world.work.offers(ann.id)[0].reviews_available == 0
    bob = world.person("bob", "reviewer")
    assert world.work.offers(bob.id)[0].reviews_available == 1
    with pytest.raises(Forbidden):
        world.work.claim(world.person("cid").id, project_id, review=True)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ({"decision": "approve"}, "approved"),
        ({"decision": "edit", "response": "Because.", "prompt": "Why then?"}, "edited"),
    ],
)
def test_an_answer_is_reviewed_once(world: World, answer: dict[str, str], state: str) -> None:
    project_id, _ = sft_world(world)
    bob, cid = world.person("bob", "reviewer"), world.person("cid", "admin")
    task = claimed(world, bob.id, project_id, review=True)
    assert (task.review_of, task.messages[-1].content, task.kind) == ("Becuase.", "Why?", "review")
    assert world.work.claim(cid.id, project_id, review=True) is None
    world.submit(bob, task, answer)
    written, review = submissions(world)
    assert written.review_state == state
    assert written.superseded_at is None
    assert review.answer["submission_id"] == written.id
    assert review.answer["response"] == answer.get("response", "Becuase.")
    assert review.answer["messages"][-1]["content"] == answer.get("prompt", "Why?")
    with pytest.raises(Conflict, match="reviewed"):
        world.work.undo(written.user_id, project_id)
    back = world.work.undo(bob.id, project_id)
    assert submissions(world)[0].review_state == "pending"
    world.submit(bob, back, {"decision": "approve"})
    assert submissions(world)[0].review_state == "approved"


def test_a_rejected_answer_goes_back_with_feedback(world: World) -> None:
    project_id, first = sft_world(world)
    ann = world.accounts.accounts(world.admin)[0]
    bob = world.person("bob", "reviewer")
    review = claimed(world, bob.id, project_id, review=True)
    with pytest.raises(Invalid, match="feedback"):
        world.submit(bob, review, {"decision": "reject"})
    with pytest.raises(Invalid, match="edit"):
        world.submit(bob, review, {"decision": "approve", "response": "sneaked in"})
    world.submit(bob, review, {"decision": "reject", "feedback": "mind the spelling"})
    with pytest.raises(Conflict, match="back with its author"):
        world.work.undo(bob.id, project_id)
    assert world.work.progress(ann.id, project_id).items_done == 0
    back = claimed(world, ann.id, project_id)
    assert (back.assignment_id, back.feedback) == (first.assignment_id, "mind the spelling")
    assert back.draft == {"prompt": "Why?", "response": "Becuase."}
    world.submit(ann, back, {"prompt": "Why?", "response": "Because."})
    world.submit(bob, claimed(world, bob.id, project_id, review=True), {"decision": "approve"})
    assert [(row.kind, row.review_state, row.superseded_because) for row in submissions(world)] == [
        ("sft", "rejected", "rejected"),
        ("review", None, None),
        ("sft", "approved", None),
        ("review", None, None),
    ]


def test_an_answer_taken_back_is_not_reviewed(world: World) -> None:
    project_id, _ = sft_world(world)
    ann = world.accounts.accounts(world.admin)[0]
    bob = world.person("bob", "reviewer")
    review = claimed(world, bob.id, project_id, review=True)
    back = world.work.undo(ann.id, project_id)
    with pytest.raises(Conflict):
        world.submit(bob, review, {"decision": "approve"})
    assert world.work.claim(bob.id, project_id, review=True) is None
    world.submit(ann, back, {"prompt": "Why?", "response": "Because."})
    assert claimed(world, bob.id, project_id, review=True).review_of == "Because."


# Entrance tests and gold items


@pytest.mark.parametrize(("right", "passes"), [(3, False), (4, True), (5, True)])
def test_an_entrance_test_guards_a_project(world: World, right: int, passes: bool) -> None:
    ann = world.person("ann")
    entrance = world.project("entrance", 5, pass_mark=0.8)
    project = world.project("preference", 1, entrance_id=entrance.id)
    [offer] = [offer for offer in world.work.offers(ann.id) if offer.kind == "preference"]
    assert "comes first" in offer.blocked_by
    assert offer.available == 0
    for number in range(5):
        with pytest.raises(Forbidden, match="comes first"):
            world.work.claim(ann.id, project.id)
        assert world.work.test_result(ann.id, entrance.id) is None
        task = claimed(world, ann.id, entrance.id)
        assert task.choices == ("less", str(number + 1), "more")
        with pytest.raises(Invalid, match="skipped"):
            world.work.skip(ann.id, task.assignment_id, "hard")
        world.submit(ann, task, {"answer": 1 if number < right else 0})
        with pytest.raises(Conflict, match="final"):
            world.work.undo(ann.id, entrance.id)
    result = world.work.test_result(ann.id, entrance.id)
    assert result is not None
    assert (result.right, result.questions, result.is_passed) == (right, 5, passes)
    if passes:
        claimed(world, ann.id, project.id)
    else:
        with pytest.raises(Forbidden, match="not passed"):
            world.work.claim(ann.id, project.id)
    bob = world.person("bob")
    assert claimed(world, bob.id, entrance.id).choices[1] == "1"  # everybody gets every question
    assert world.work.claim(ann.id, entrance.id) is None


def test_gold_items_are_mixed_in_and_known(world: World) -> None:
    ann = world.person("ann")
    gold = [an_item("preference", 100 + number, gold=Gold(answers=[0])) for number in range(50)]
    plain = [an_item("preference", number) for number in range(60)]
    project = world.project("preference", [*plain, *gold], gold_share=0.25)
    order = []
    while (task := world.work.claim(ann.id, project.id)) is not None:
        assert task.responses is not None
        is_gold = len(task.messages[0].content) == len("question 100")
        order.append(is_gold)
        is_left = task.responses[0].startswith("left")
        world.submit(ann, task, {"winner": 0 if is_left == (len(order) % 2 == 0) else 1, "rating": "better"})
    assert order.count(False) == 60
    assert 5 <= order.count(True) <= 40  # 20 are expected
    assert not all(order[: order.count(True)])
    rows = submissions(world)
    assert {row.gold_correct for row in rows} == {None, True, False}
    assert sum(row.gold_correct is not None for row in rows) == order.count(True)
    for row in rows:
        if row.gold_correct is not None:
            assert row.gold_correct == (row.answer["turns"][0]["winner"] == 0)
    progress = world.work.progress(ann.id, project.id)
    assert (progress.items_done, progress.items) == (60, 60)
