"""Projects, batches, items and models: what administrators set is checked, and two of them overwrite nothing."""

import pytest
from sqlalchemy import func, select
from tests.apps.feedback_world import World, an_item

from groundup.feedback.contents import Gold, ItemContent
from groundup.feedback.errors import Conflict, Invalid, NotFound
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Item

SAID = [{"role": "user", "content": "Why?"}]
PAIR = [{"text": "a"}, {"text": "b"}]


def content(**values: object) -> ItemContent:
    return ItemContent.model_validate(values)


def test_a_project_changes_by_its_version(world: World) -> None:
    endpoint = world.endpoint("one")
    project = world.projects.create_project(
        world.admin, name=" Week one ", kind="preference", guidelines="# Be fair", endpoint_ids=[endpoint]
    )
    assert (project.name, project.version, project.guidelines) == ("Week one", 1, "# Be fair")
    changed = world.projects.change_project(world.admin, project.id, 1, overlap=3)
    assert (changed.version, changed.overlap, changed.guidelines) == (2, 3, "# Be fair")
    assert [row.id for row in world.projects.endpoints_of(project.id)] == [endpoint]
    with pytest.raises(Conflict, match="somebody else"):
        world.projects.change_project(world.admin, project.id, 1, overlap=4)
    cleared = world.projects.change_project(world.admin, project.id, 2, guidelines=None, endpoint_ids=[])
    assert (cleared.guidelines, world.projects.endpoints_of(project.id)) == ("", [])
    with pytest.raises(NotFound):
        world.projects.change_project(world.admin, 99, 1)
    with pytest.raises(NotFound):
        world.projects.project(99)


@pytest.mark.parametrize(
    "values",
    [
        {"name": ""},
        {"name": "x" * 101},
        {"name": "a\0b"},
        {"kind": "poetry"},
        {"criterion": "beauty"},
        {"overlap": 0},
        {"lease_seconds": 1},
        {"gold_share": 1.5},
        {"pass_mark": 0},
        {"entrance_id": 99},
        {"endpoint_ids": [99]},
        {"colour": "blue"},
        {"id": 7},
        {"version": 7},
    ],
)
def test_wrong_settings_make_no_project(world: World, values: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        world.projects.create_project(world.admin, **({"name": "one", "kind": "sft"} | values))
    assert world.projects.projects() == []


def test_names_are_taken_once(world: World) -> None:
    world.project("sft", name="one")
    other = world.project("sft", name="two")
    with pytest.raises(Conflict, match="taken"):
        world.project("sft", name="one")
    with pytest.raises(Conflict, match="taken"):
        world.projects.change_project(world.admin, other.id, 1, name="one")
    with pytest.raises(Invalid, match="fixed"):
        world.projects.change_project(world.admin, other.id, 1, kind="redteam")
    world.endpoint("one")
    with pytest.raises(Conflict, match="taken"):
        world.endpoint("one")


def test_only_an_entrance_test_guards(world: World) -> None:
    plain = world.project("sft", name="plain")
    entrance = world.project("entrance", name="test")
    with pytest.raises(Invalid, match="entrance"):
        world.project("sft", name="guarded", entrance_id=plain.id)
    with pytest.raises(Invalid, match="entrance"):
        world.projects.change_project(world.admin, entrance.id, 1, entrance_id=entrance.id)
    assert world.project("sft", name="guarded", entrance_id=entrance.id).entrance_id == entrance.id


def test_batches_are_numbered_and_called_after_their_week(world: World) -> None:
    project = world.project("sft")
    world.clock.turn(7 * 24 * 3600)
    second = world.projects.open_batch(world.admin, project.id)
    third = world.projects.open_batch(world.admin, project.id, "the hard ones")
    assert [(batch.number, batch.label) for batch in world.projects.batches(project.id)] == [
        (1, "2026-W32"),
        (2, "2026-W33"),
        (3, "the hard ones"),
    ]
    assert not world.projects.set_batch_open(world.admin, second.id, False).is_open
    assert third.is_open
    with pytest.raises(NotFound):
        world.projects.open_batch(world.admin, 99)


def test_adding_items_again_adds_nothing(world: World) -> None:
    project = world.project("preference")
    [batch] = world.projects.batches(project.id)
    items = [an_item("preference", number, external_id=f"task-{number}") for number in range(5)]
    first = world.projects.add_items(world.admin, batch.id, items[:3])
    again = world.projects.add_items(world.admin, batch.id, [*items, items[4]])
    assert (first.added, first.already_there) == (3, 0)
    assert (again.added, again.already_there) == (2, 4)
    with world.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Item)) == 5


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("preference", NewItem(content(messages=[{"role": "assistant", "content": "hello"}]))),
        ("preference", NewItem(content(responses=PAIR))),
        ("preference", NewItem(content(messages=SAID), gold=Gold(answers=[0]))),
        ("preference", NewItem(content(messages=SAID, responses=PAIR), gold=Gold(answers=[2]))),
        ("comparison", NewItem()),
        ("sft", NewItem(content(messages=SAID, responses=PAIR))),
        ("redteam", NewItem(content(messages=SAID, responses=PAIR))),
        ("entrance", NewItem(content(question="Why?", choices=["a", "b"]))),
        ("entrance", NewItem(content(question="Why?", choices=["a"]), gold=Gold(answers=[0]))),
        ("entrance", NewItem(content(question="Why?", choices=["a", "b"]), gold=Gold(answers=[2]))),
        ("entrance", NewItem(content(choices=["a", "b"]), gold=Gold(answers=[0]))),
    ],
)
def test_items_fit_their_project(world: World, kind: str, item: NewItem) -> None:
    project = world.project(kind)
    [batch] = world.projects.batches(project.id)
    with pytest.raises(Invalid, match="item 2"):
        world.projects.add_items(world.admin, batch.id, [an_item(kind), item])
    with world.database.read() as session:
        assert session.scalars(select(Item)).all() == []


@pytest.mark.parametrize(
    "values",
    [
        {"base_url": "file:///etc/passwd"},
        {"base_url": "ftp://127.0.0.1/"},
        {"base_url": "127.0.0.1:8000"},
        {"base_url": "http://"},
        {"base_url": "http://user:password@127.0.0.1/v1"},
        {"base_url": "http://127.0.0.1/v1?key=1"},
        {"base_url": "http://127.0.0.1/v1#part"},
        {"api_key": "two\r\nlines"},
        {"api_key": "schlüssel"},
        {"min_temperature": 1.0, "max_temperature": 0.5},
        {"max_temperature": 3.0},
        {"max_new_tokens": 0},
        {"created_at": "now"},
    ],
)
def test_wrong_models_are_refused(world: World, values: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        world.endpoint("one", **values)
    assert world.projects.endpoints(world.admin) == []


def test_a_key_stays_with_its_address(world: World) -> None:
    endpoint = world.endpoint("one")
    changed = world.projects.change_endpoint(world.admin, endpoint, model="newer", max_temperature=0.9)
    assert (changed.model, changed.api_key) == ("newer", "key-of-one")
    moved = world.projects.change_endpoint(world.admin, endpoint, base_url="http://10.0.0.1/v1/")
    assert (moved.base_url, moved.api_key) == ("http://10.0.0.1/v1", "")
    given = world.projects.change_endpoint(world.admin, endpoint, base_url="http://10.0.0.2/v1", api_key="new")
    assert given.api_key == "new"
    with pytest.raises(NotFound):
        world.projects.change_endpoint(world.admin, 99)


def test_a_switched_off_model_answers_no_more(world: World) -> None:
    one, two = world.endpoint("one"), world.endpoint("two")
    project = world.project("preference", [NewItem()], endpoint_ids=[one, two])
    world.projects.change_endpoint(world.admin, one, is_active=False)
    ann = world.person("ann")
    task = world.work.claim(ann.id, project.id)
    assert task is not None
    _, generations = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "hello")
    assert {generation.endpoint_id for generation in generations} == {two}
