"""Leases, drafts, submissions, undo: an item goes to exactly `overlap` people, never twice to one, and none is lost."""

import pytest
from sqlalchemy import select
from tests.apps.feedback_world import World, an_item, claimed, submissions

from groundup.feedback.contents import Gold, ItemContent
from groundup.feedback.errors import Conflict, Forbidden, Invalid, NotFound
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Assignment, Item

BETTER = {"winner": 0, "rating": "better"}
LEASE_SECONDS = 1800


# Leases


def test_items_are_given_out_in_order_to_exactly_overlap_people(world: World) -> None:
    people = [world.person(name) for name in ("ann", "bob", "cid")]
    project = world.project("preference", 4, overlap=2)
    said: dict[str, list[str]] = {}
    for _ in range(4):
        for person in people:
            if (task := world.work.claim(person.id, project.id)) is not None:
                said.setdefault(task.messages[0].content, []).append(person.name)
                world.submit(person, task, BETTER)
    assert list(said) == [f"question {number}" for number in range(4)]
    assert all(len(names) == len(set(names)) == 2 for names in said.values())
    assert [world.work.claim(person.id, project.id) for person in people] == [None] * 3


def test_claiming_again_gives_the_same_task(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 2)
    first = claimed(world, ann.id, project.id)
    world.clock.turn(60)
    again = claimed(world, ann.id, project.id)
    assert again.assignment_id == first.assignment_id
    assert again.lease_expires_at > first.lease_expires_at
    assert claimed(world, bob.id, project.id).messages != first.messages


def test_an_abandoned_item_goes_to_somebody_else(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    assert world.work.claim(bob.id, project.id) is None
    world.clock.turn(LEASE_SECONDS)
    assert claimed(world, bob.id, project.id).messages == task.messages
    with pytest.raises(Conflict, match="ran out"):
        world.submit(ann, task, BETTER)
    with pytest.raises(Conflict, match="ran out"):
        world.work.save_draft(ann.id, task.assignment_id, task.version, {})
    assert world.work.claim(ann.id, project.id) is None


def test_who_comes_back_late_to_a_free_place_loses_nothing(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    version = world.work.save_draft(ann.id, task.assignment_id, task.version, {"reason": "half a thought"})
    world.clock.turn(10 * LEASE_SECONDS)
    back = claimed(world, ann.id, project.id)
    assert (back.assignment_id, back.version, back.draft) == (task.assignment_id, version, {"reason": "half a thought"})
    assert world.work.claim(bob.id, project.id) is None
    world.clock.turn(10 * LEASE_SECONDS)
    world.submit(ann, back, BETTER)
    assert world.work.claim(bob.id, project.id) is None


def test_a_sign_of_life_keeps_the_lease(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    for _ in range(5):
        world.clock.turn(LEASE_SECONDS - 1)
        assert (world.work.heartbeat(ann.id, task.assignment_id) - world.clock()).total_seconds() == LEASE_SECONDS
        assert world.work.claim(bob.id, project.id) is None


def test_time_is_counted_without_breaks(world: World) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    for pause in (50, 1000, 30):
        world.clock.turn(pause)
        world.work.heartbeat(ann.id, task.assignment_id)
    world.clock.turn(20)
    world.submit(ann, task, BETTER)
    [submission] = submissions(world)
    assert submission.seconds == 50 + 120 + 30 + 20
    assert world.work.progress(ann.id, project.id).seconds_each == 220


def test_a_skipped_item_goes_to_another_and_never_back(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    world.work.skip(ann.id, task.assignment_id, "I know these people")
    assert world.work.claim(ann.id, project.id) is None
    world.submit(bob, claimed(world, bob.id, project.id), BETTER)
    with pytest.raises(Conflict, match="skipped"):
        world.submit(ann, task, BETTER)


def test_closed_batches_and_projects_give_out_nothing(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 2)
    task = claimed(world, ann.id, project.id)
    [batch] = world.projects.batches(project.id)
    world.projects.set_batch_open(world.admin, batch.id, False)
    assert world.work.claim(bob.id, project.id) is None
    world.projects.set_batch_open(world.admin, batch.id, True)
    world.projects.change_project(world.admin, project.id, 1, is_open=False)
    with pytest.raises(Forbidden, match="closed"):
        world.work.claim(bob.id, project.id)
    assert world.work.offers(bob.id) == []
    world.submit(ann, task, BETTER)


# Submissions


@pytest.mark.parametrize("order_seed", [0, 1])
def test_answers_are_kept_in_the_item_s_own_order(world: World, order_seed: int) -> None:
    ann = world.person("ann")
    content = an_item("preference").content.model_copy(update={"order_seed": order_seed})
    project = world.project("preference", [NewItem(content)], criterion="safety")
    task = claimed(world, ann.id, project.id)
    assert task.responses == (("left 0", "right 0") if order_seed == 0 else ("right 0", "left 0"))
    world.submit(ann, task, {"winner": 0, "rating": "better", "is_safe": [True, False], "reason": "clear"})
    [submission] = submissions(world)
    [turn] = submission.answer["turns"]
    assert (turn["winner"], turn["is_safe"], turn["shown_first"]) == (
        (0, [True, False], 0) if order_seed == 0 else (1, [False, True], 1)
    )
    assert [response["text"] for response in turn["responses"]] == ["left 0", "right 0"]
    assert [response["model"] for response in turn["responses"]] == ["secret-one", "secret-two"]
    assert turn["messages"] == [{"role": "user", "content": "question 0"}]


def test_the_order_is_drawn_for_each_person(world: World) -> None:
    people = [world.person(f"ann{number}") for number in range(6)]
    project = world.project("comparison", 6, overlap=6)
    shown = set()
    for person in people:
        for _ in range(6):
            task = claimed(world, person.id, project.id)
            assert task.responses is not None
            shown.add((task.messages[0].content, task.responses[0]))
            world.submit(person, task, {"score": -3 if task.responses[0].startswith("left") else 3})
    assert len(shown) == 12
    assert {submission.answer["score"] for submission in submissions(world)} == {-3}


def test_the_same_key_again_writes_nothing(world: World) -> None:
    ann = world.person("ann")
    project = world.project("preference", 2)
    task = claimed(world, ann.id, project.id)
    key = "a-key-of-this-form"
    first = world.work.submit(ann.id, task.assignment_id, task.version, key, BETTER)
    again = world.work.submit(ann.id, task.assignment_id, task.version, key, BETTER)
    assert (first.is_replay, again.is_replay) == (False, True)
    assert first.submission_id == again.submission_id
    with pytest.raises(Conflict, match="another answer"):
        world.work.submit(ann.id, task.assignment_id, task.version, key, BETTER | {"winner": 1})
    other = claimed(world, ann.id, project.id)
    with pytest.raises(Conflict, match="another answer"):
        world.work.submit(ann.id, other.assignment_id, other.version, key, BETTER)
    assert len(submissions(world)) == 1


def test_a_second_answer_is_refused(world: World) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    world.submit(ann, task, BETTER)
    with pytest.raises(Conflict, match="submitted"):
        world.submit(ann, task, BETTER)


def test_an_older_tab_overwrites_nothing(world: World) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    version = world.work.save_draft(ann.id, task.assignment_id, task.version, {"reason": "newer"})
    with pytest.raises(Conflict, match="another tab"):
        world.work.save_draft(ann.id, task.assignment_id, task.version, {"reason": "older"})
    with pytest.raises(Conflict, match="another tab"):
        world.submit(ann, task, BETTER)
    assert world.work.task(ann.id, task.assignment_id).draft == {"reason": "newer"}
    world.work.submit(ann.id, task.assignment_id, version, "a-key-of-this-form", BETTER)


@pytest.mark.parametrize(
    ("kind", "values", "answer"),
    [
        ("preference", {}, {}),
        ("preference", {}, {"winner": 2, "rating": "better"}),
        ("preference", {}, {"winner": 0}),
        ("preference", {}, {"rating": "better"}),
        ("preference", {}, {"winner": 0, "rating": "great"}),
        ("preference", {}, BETTER | {"is_safe": [True, True]}),
        ("preference", {}, BETTER | {"annotator": "somebody else"}),
        ("preference", {}, BETTER | {"reason": "x" * 4001}),
        ("preference", {}, BETTER | {"reason": "a\0b"}),
        ("preference", {"criterion": "safety"}, BETTER),
        ("preference", {"criterion": "safety"}, BETTER | {"is_safe": [True]}),
        ("comparison", {}, {"score": 4}),
        ("comparison", {}, {}),
        ("sft", {}, {"response": "  "}),
        ("sft", {}, {"prompt": "mine", "response": "given here"}),
        ("sft", {}, {"response": "half a pair \ud800"}),
        ("redteam", {}, {}),
        ("entrance", {}, {"answer": 3}),
        ("entrance", {}, {"answer": -1}),
    ],
)
def test_wrong_answers_are_refused_and_leave_the_task_as_it_was(
    world: World, kind: str, values: dict[str, str], answer: dict[str, object]
) -> None:
    ann = world.person("ann")
    project = world.project(kind, 1, **values)
    task = claimed(world, ann.id, project.id)
    if answer == {} and kind == "preference":
        world.submit(ann, task, answer)  # cannot tell: neither a winner nor a rating
        return
    with pytest.raises(Invalid):
        world.submit(ann, task, answer)
    assert submissions(world) == []
    assert world.work.task(ann.id, task.assignment_id).version == task.version


@pytest.mark.parametrize("key", ["", "short", "x" * 65, "käse-käse-käse-käse"])
def test_keys_have_a_form(world: World, key: str) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    with pytest.raises(Invalid):
        world.work.submit(ann.id, task.assignment_id, task.version, key, BETTER)


@pytest.mark.parametrize(
    "draft", [{"reason": "half a pair \ud800"}, {"score": float("nan")}, {"reason": "x" * 500_001}]
)
def test_drafts_that_cannot_be_kept(world: World, draft: dict[str, object]) -> None:
    ann = world.person("ann")
    project = world.project("preference", 1)
    task = claimed(world, ann.id, project.id)
    with pytest.raises(Invalid):
        world.work.save_draft(ann.id, task.assignment_id, task.version, draft)
    kept = {"reason": "NUL \0, smiles \U0001f600", "choices": [1, None]}
    world.work.save_draft(ann.id, task.assignment_id, task.version, kept)
    assert world.work.task(ann.id, task.assignment_id).draft == kept


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**63, 2**70])
def test_numbers_that_are_nobody_s(world: World, number: int) -> None:
    ann = world.person("ann")
    for call in (
        lambda: world.work.claim(ann.id, number),
        lambda: world.work.progress(ann.id, number),
        lambda: world.work.test_result(ann.id, number),
        lambda: world.work.undo(ann.id, number),
        lambda: world.work.task(ann.id, number),
        lambda: world.work.submit(ann.id, number, 1, "a-key-of-this-form", {}),
        lambda: world.dialogues.begin_turn(ann.id, number, 1, "hello"),
        lambda: world.projects.project(number),
        lambda: world.projects.batches(number),
        lambda: world.projects.endpoints_of(number),
        lambda: world.projects.open_batch(world.admin, number),
        lambda: world.projects.set_batch_open(world.admin, number, True),
        lambda: world.projects.change_endpoint(world.admin, number),
        lambda: world.accounts.set_active(world.admin, number, True),
        lambda: world.accounts.reset_password(world.admin, number),
    ):
        with pytest.raises(NotFound):
            call()


# Other people's work


def test_nobody_reaches_another_s_task(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob", "reviewer")
    project = world.project("preference", 1, overlap=2)
    task = claimed(world, ann.id, project.id)
    calls = (
        lambda user: world.work.task(user, task.assignment_id),
        lambda user: world.work.save_draft(user, task.assignment_id, 1, {}),
        lambda user: world.work.heartbeat(user, task.assignment_id),
        lambda user: world.work.skip(user, task.assignment_id, ""),
        lambda user: world.work.submit(user, task.assignment_id, 1, "a-key-of-this-form", BETTER),
        lambda user: world.dialogues.begin_turn(user, task.assignment_id, 1, "hello"),
        lambda user: world.dialogues.finish_turn(user, task.assignment_id, 1, []),
        lambda user: world.dialogues.judge_turn(user, task.assignment_id, 1, 1, {}),
        lambda user: world.dialogues.drop_turn(user, task.assignment_id, 1, 1),
        lambda user: world.dialogues.comparison_generations(user, task.assignment_id),
        lambda user: world.dialogues.set_comparison(user, task.assignment_id, []),
    )
    for user in (bob.id, world.admin.id, 999):
        for call in calls:
            with pytest.raises(NotFound):
                call(user)
    assert world.work.task(ann.id, task.assignment_id).version == 1


def test_what_annotators_see_is_blind(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    gold = an_item("preference", 7, gold=Gold(answers=[1]))
    project = world.project("preference", [gold, an_item("preference", 8)], overlap=2, gold_share=1.0)
    world.submit(bob, claimed(world, bob.id, project.id), BETTER | {"reason": "told by bob"})
    seen = [claimed(world, ann.id, project.id), world.work.offers(ann.id), world.work.progress(ann.id, project.id)]
    assert "left 7" in str(seen)
    for secret in ("secret", "gold", "told by bob", "bob", "endpoint"):
        assert secret not in str(seen)


# Undo


def test_undo_brings_the_answer_back(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 2)
    task = claimed(world, ann.id, project.id)
    world.submit(ann, task, BETTER | {"reason": "hasty"})
    following = claimed(world, ann.id, project.id)
    assert world.work.progress(ann.id, project.id).can_undo
    back = world.work.undo(ann.id, project.id)
    assert (back.assignment_id, back.draft) == (task.assignment_id, BETTER | {"reason": "hasty"})
    assert not world.work.progress(ann.id, project.id).can_undo
    with pytest.raises(Conflict, match="open again"):
        world.work.undo(ann.id, project.id)
    assert world.work.claim(bob.id, project.id) is None  # both places are ann's
    world.submit(ann, back, {"winner": 1, "rating": "slightly better"})
    assert claimed(world, ann.id, project.id).assignment_id == following.assignment_id
    old, new = submissions(world)
    assert (old.superseded_because, old.superseded_at) == ("undone", world.clock())
    assert new.superseded_at is None
    assert old.answer["turns"][0]["reason"] == "hasty"  # the audit keeps it


def test_an_undone_answer_may_be_left_to_others(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    world.submit(ann, claimed(world, ann.id, project.id), BETTER)
    world.work.undo(ann.id, project.id)
    world.clock.turn(LEASE_SECONDS)
    world.submit(bob, claimed(world, bob.id, project.id), BETTER)
    assert world.work.claim(ann.id, project.id) is None
    assert [(row.user_id, row.superseded_at is None) for row in submissions(world)] == [(ann.id, False), (bob.id, True)]


def test_nothing_to_undo(world: World) -> None:
    ann, bob = world.person("ann"), world.person("bob")
    project = world.project("preference", 1)
    world.submit(bob, claimed(world, bob.id, project.id), BETTER)
    with pytest.raises(Conflict, match="nothing"):
        world.work.undo(ann.id, project.id)


# Progress


def test_counts_of_done_items_are_true(world: World) -> None:
    people = [world.person(name) for name in ("ann", "bob")]
    project = world.project("preference", 3, overlap=2)
    for person in people:
        for _ in range(2):
            world.submit(person, claimed(world, person.id, project.id), BETTER)
    world.work.undo(people[0].id, project.id)
    with world.database.read() as session:
        assert [item.is_done for item in session.scalars(select(Item).order_by(Item.id))] == [True, False, False]
        assert len(session.scalars(select(Assignment)).all()) == 4
    progress = world.work.progress(people[1].id, project.id)
    assert (progress.submitted, progress.submitted_today, progress.items_done, progress.items) == (2, 2, 1, 3)
    assert world.work.offers(people[1].id)[0].available == 1
    assert ItemContent() == NewItem().content
