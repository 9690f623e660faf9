"""Administration in a real browser: from an empty application to numbers about finished work, and what is refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from tests.apps.annotation import Annotation, annotation, pair
from tests.apps.browser import PHONE, Noticed
from tests.apps.feedback_world import PASSWORD
from tests.apps.page_checks import CONTRAST, STRUCTURE

from groundup.feedback.accounts import Account
from groundup.feedback.contents import GivenResponse, Gold, ItemContent
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Project

PLACES = ("", "/items", "/settings")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    with annotation(tmp_path_factory.mktemp("admin")) as world:
        yield world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Annotation, dict[str, Project]]]:
    """Two people's finished work of each kind; ann has found one violation."""
    with annotation(tmp_path_factory.mktemp("finished")) as world:
        people = [world.person("ann"), world.person("ben")]
        world.person("rita", "reviewer")
        pairs = [pair(f"one {n}", f"two {n}") for n in range(6)]
        projects = {
            "preference": world.project("prefer", "preference", pairs, overlap=2, criterion="safety"),
            "comparison": world.project("evaluate", "comparison", pairs, overlap=2),
            "sft": world.project("write", "sft", [NewItem() for _ in range(4)], is_reviewed=True),
            "entrance": world.project(
                "enter", "entrance",
                [NewItem(ItemContent(question=f"{n}?", choices=["a", "b"]), gold=Gold(answers=[0])) for n in range(3)],
            ),
        }  # fmt: skip
        said: dict[str, Any] = {
            "preference": {"winner": 0, "rating": "slightly better", "is_safe": [True, True]},
            "comparison": {"score": -1},
            "sft": {"prompt": "Why?", "response": "Because."},
            "entrance": {"answer": 0},
        }
        for kind, project in projects.items():
            for number, person in enumerate(people):
                while (task := world.services.work.claim(person.id, project.id)) is not None:
                    key = f"key-{kind}-{person.id}-{task.assignment_id:08}"
                    world.services.work.submit(person.id, task.assignment_id, task.version, key, said[kind])
                    if kind == "sft" and number == 0 and task.assignment_id % 2:
                        break
        projects["redteam"] = world.project("attack", "redteam", [NewItem()])
        attack(world, people[0], projects["redteam"])
        yield world, projects


def attack(world: Annotation, person: Account, project: Project) -> None:
    dialogues, work = world.services.dialogues, world.services.work
    task = work.claim(person.id, project.id)
    assert task is not None
    number, (asked,) = dialogues.begin_turn(person.id, task.assignment_id, task.version, "How to harm?")
    given = GivenResponse(text="So.", model=asked.model, endpoint_id=asked.endpoint_id, seed=asked.seed)
    task = dialogues.finish_turn(person.id, task.assignment_id, number, [given])
    label = {"risk_category": "unqualified advice", "attack_vector": "other", "severity": 4}
    task = dialogues.judge_turn(person.id, task.assignment_id, task.version, number, label)
    work.submit(person.id, task.assignment_id, task.version, "key-of-the-attack", {})


def nothing_bad(noticed: Noticed) -> None:
    assert noticed.nothing(), noticed


def test_from_nothing_to_work_in_the_browser(world: Annotation, browser: Browser, tmp_path: Path) -> None:
    """A model, a project with prompts, a person who is invited and finds the work."""
    with world.page(browser, "admin") as (page, noticed):
        page.goto(f"{world.url}/admin/endpoints")
        for field, text in (("Name", "first"), ("Model", "alpha-7b"), ("Address of its API", f"{world.models_url}/v1")):
            page.get_by_label(field, exact=True).fill(text)
        page.get_by_role("button", name="Add it").click()
        page.get_by_role("button", name="Ask first something").click()
        expect(page.get_by_role("status").first).to_contain_text("first answers.")
        expect(page.get_by_role("status").first).to_contain_text("Rain is **water**")

        page.goto(f"{world.url}/admin")
        page.get_by_role("link", name="Compare").click()
        page.get_by_label("Name").fill("Helpful")
        page.get_by_label("Guidelines").fill("Prefer what *helps*.")
        page.get_by_label("first").check()
        page.get_by_label("People an item").fill("2")
        page.get_by_role("button", name="Make the project").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Helpful")

        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(60)))
        page.get_by_label("File of prompts").set_input_files(prompts)
        page.get_by_role("button", name="Add them").first.click()
        expect(page.get_by_text("60 items are added")).to_be_visible()
        page.get_by_role("link", name="Later").click()
        expect(page.get_by_text("What is 59?")).to_be_visible()
        page.get_by_label("How many").fill("5")
        page.get_by_role("button", name="Add them").last.click()
        expect(page.get_by_text("5 items are added")).to_be_visible()
        page.get_by_label("Its name").fill("second week")
        page.get_by_role("button", name="Open it").click()
        page.get_by_role("link", name="Numbers").click()
        page.get_by_role("button", name="Close batch 1").click()
        expect(page.get_by_text("Batch 1 is closed.")).to_be_visible()
        page.get_by_role("button", name="Open batch 1").click()

        page.get_by_role("link", name="People", exact=True).click()
        page.get_by_label("For whom").fill("Dora")
        page.get_by_role("button", name="Make a link").click()
        link = page.get_by_label("Link", exact=True).input_value()
        nothing_bad(noticed)
    context = browser.new_context()
    guest = context.new_page()
    guest.goto(link)
    guest.get_by_label("Name").fill("dora")
    for field in guest.locator("input[type=password]").all():
        field.fill(PASSWORD)
    guest.get_by_role("button").last.click()
    expect(guest.get_by_role("link", name="Helpful")).to_be_visible()
    assert "Administration" not in guest.content()
    context.close()


def pages_of(projects: dict[str, Project]) -> list[str]:
    of_projects = [f"/admin/projects/{project.id}{place}" for project in projects.values() for place in PLACES]
    return ["/admin", "/admin/people", "/admin/endpoints", "/admin/projects/new?kind=redteam", *of_projects]


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_every_page_is_for_everybody(
    finished: tuple[Annotation, dict[str, Project]], browser: Browser, options: dict[str, Any]
) -> None:
    world, projects = finished
    with world.page(browser, "admin", **options) as (page, noticed):
        for path in pages_of(projects):
            answer = page.goto(world.url + path)
            assert answer is not None
            assert answer.status == 200, path
            assert page.evaluate(STRUCTURE) == [], path
            assert page.evaluate(CONTRAST) == [], path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than the page"
        item = page.goto(f"{world.url}/admin/items/1")
        assert item is not None
        assert page.evaluate(STRUCTURE) == []
        nothing_bad(noticed)


def figure(page: Page, row: str) -> str:
    return page.get_by_role("row", name=re.compile(f"^{row} ")).inner_text()


def test_the_numbers_of_finished_work(finished: tuple[Annotation, dict[str, Project]], browser: Browser) -> None:
    world, projects = finished
    with world.page(browser, "admin") as (page, noticed):
        page.goto(f"{world.url}/admin/projects/{projects['preference'].id}")
        assert "n = 12" in page.get_by_role("row").filter(has_text="6 of 6").inner_text(), "all of them weak"
        # Both always chose what stood first on their page; the shares are of 6 decisions each.
        assert "100 %" in figure(page, "ann")
        agreement = page.get_by_role("row").filter(has_text="is it safe").filter(has_text="AC1").inner_text()
        assert "1.00" in agreement
        for measure in ("pairwise agreement", "Gwet's AC1", "Gwet's AC2", "Krippendorff's alpha"):
            assert page.get_by_role("rowheader", name=measure).count(), measure
        alpha = page.get_by_role("row").filter(has_text="alpha, nominal").inner_text()
        assert "everybody chose the same" in alpha
        page.goto(f"{world.url}/admin/projects/{projects['comparison'].id}")
        # Six items on which both chose the first model by one point.
        versus = page.get_by_role("row").filter(has_text="alpha-7b").inner_text()
        assert "beta-13b" in versus
        assert "100 %" in versus
        page.goto(f"{world.url}/admin/projects/{projects['entrance'].id}")
        assert "100 %" in figure(page, "ben")
        page.goto(f"{world.url}/admin/projects/{projects['sft'].id}")
        assert "pending" in figure(page, "ann")
        page.goto(f"{world.url}/admin/projects/{projects['redteam'].id}")
        expect(page.get_by_text("violations for each hour of a person")).to_contain_text("95 %")
        assert "100 %" in figure(page, "unqualified advice")
        nothing_bad(noticed)


def test_reviewers_read_numbers_without_names(finished: tuple[Annotation, dict[str, Project]]) -> None:
    world, projects = finished
    with world.client("rita") as client:
        assert client.get("/admin").status_code == 200
        page = client.get(f"/admin/projects/{projects['comparison'].id}").text
        assert "Agreement" in page
        for hidden in (">ann ", ">ben ", "Model against model", "/export", "/settings"):
            assert hidden not in page
        for path in ("/items", "/settings", "/export"):
            assert client.get(f"/admin/projects/{projects['comparison'].id}{path}").status_code == 403
        for path in ("/admin/people", "/admin/endpoints", "/admin/items/1", "/admin/projects/new?kind=sft"):
            assert client.get(path).status_code == 403


def send(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return client.post(path, data=fields, headers={"accept": "text/html"})


def test_mistakes_in_forms_come_back_with_what_was_typed(world: Annotation) -> None:
    with world.client("admin") as client:
        wrong = send(
            client,
            "/admin/projects",
            kind="sft",
            name="Writing",
            criterion="safety",
            overlap="many",
            lease_minutes="30",
        )
        assert wrong.status_code == 422
        assert 'value="Writing"' in wrong.text
        assert "Overlap:" in wrong.text
        fields = {"name": "bad", "model": "m", "base_url": "ftp://x", "min_temperature": "0.7", "max_temperature": "1"}
        wrong = send(client, "/admin/endpoints", **fields, max_new_tokens="9", revision="", api_key="sk-typed-in")
        assert wrong.status_code == 422
        assert "sk-typed-in" not in wrong.text
        assert send(client, "/admin/projects", kind="other", name="x").status_code == 422
        assert client.get("/admin/projects/new?kind=other").status_code == 422
        assert client.get("/admin/projects/9999").status_code == 404
        assert client.get("/admin/items/9999").status_code == 404
        assert client.get("/admin/endpoints/9999").status_code == 404
        made = send(
            client, "/admin/projects", kind="sft", name="Taken", criterion="safety", overlap="1", lease_minutes="30"
        )
        assert made.status_code == 303
        taken = send(
            client, "/admin/projects", kind="sft", name="Taken", criterion="safety", overlap="1", lease_minutes="30"
        )
        assert taken.status_code == 409


def test_the_slower_of_two_administrators_is_told(world: Annotation) -> None:
    project = world.project("contested", "sft", [])
    fields = {"name": "contested", "overlap": "1", "lease_minutes": "30", "version": "1", "criterion": "safety"}
    with world.client("admin") as client:
        path = f"/admin/projects/{project.id}/settings"
        assert send(client, path, **fields, is_open="yes").status_code == 303
        slower = send(client, path, **fields)
        assert slower.status_code == 409
        assert "Somebody else has changed" in slower.text
    found = world.services.projects.project(project.id)
    assert (found.criterion, found.is_open, found.version) == ("safety", True, 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.exe", b"MZ", "Files of this kind cannot be read"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
        ("x.jsonl", b"", "empty"),
        ("../../../etc/x.jsonl", b'{"x": 1}\n', "format"),
        ("x.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("x.jsonl", b'{"question": "?", "choices": ["a"]}\n', "two choices or more"),
    ],
)
def test_files_that_are_no_items_add_nothing(world: Annotation, name: str, content: bytes, words: str) -> None:
    project = next((p for p in world.services.projects.projects() if p.name == "uploads"), None) or world.project(
        "uploads", "entrance", []
    )
    (batch,) = world.services.projects.batches(project.id)
    with world.client("admin") as client:
        answer = client.post(
            f"/admin/projects/{project.id}/items", data={"how": "file", "batch_id": batch.id},
            files={"file": (name, content)}, headers={"accept": "text/html"},
        )  # fmt: skip
        assert answer.status_code == 422
        assert words in answer.text
        assert "There are none yet" in client.get(f"/admin/projects/{project.id}/items").text


def test_a_test_asks_the_address_on_record_and_no_other(world: Annotation) -> None:
    """Whatever a request says besides: nothing that anybody types in there is ever fetched."""
    world.endpoints()
    (endpoint_id,) = (e.id for e in world.services.projects.endpoints(world.admin) if e.name == "beta-13b")
    with world.client("admin") as client:
        before = len(world.models.asked)
        answer = send(
            client,
            f"/admin/endpoints/{endpoint_id}/test",
            base_url="http://127.0.0.1:9/v1",
            model="other",
            url="file:///",
        )
        assert "beta-13b answers." in answer.text
        assert [asked["model"] for asked in world.models.asked[before:]] == ["beta-13b"]
        world.models.failures["beta-13b"] = [500, 500, 500]
        assert "did not answer" in send(client, f"/admin/endpoints/{endpoint_id}/test").text
        world.models.failures.clear()


def test_a_key_is_never_shown_and_never_goes_to_a_new_address(world: Annotation) -> None:
    projects = world.services.projects
    endpoint = projects.create_endpoint(
        world.admin, name="keyed", base_url=f"{world.models_url}/v1", model="alpha-7b", api_key="sk-very-secret"
    )
    fields = {
        "name": "keyed", "model": "alpha-7b", "revision": "", "min_temperature": "0.5", "max_temperature": "1",
        "max_new_tokens": "100", "is_active": "yes",
    }  # fmt: skip
    path = f"/admin/endpoints/{endpoint.id}"
    with world.client("admin") as client:
        for page in ("/admin/endpoints", path):
            assert "sk-very-secret" not in client.get(page).text
        assert send(client, path, **fields, base_url=endpoint.base_url, api_key="").status_code == 303
        (kept,) = (one for one in projects.endpoints(world.admin) if one.id == endpoint.id)
        assert (kept.api_key, kept.min_temperature) == ("sk-very-secret", 0.5)
        assert send(client, path, **fields, base_url="http://127.0.0.1:9/v1", api_key="").status_code == 303
        (moved,) = (one for one in projects.endpoints(world.admin) if one.id == endpoint.id)
        assert moved.api_key == ""


def test_people_are_invited_promoted_and_locked_out(world: Annotation) -> None:
    eve = world.person("eve")
    with world.client("admin") as client, world.client("eve") as eves:
        assert send(client, f"/admin/people/{eve.id}/role", role="god").status_code == 422
        assert send(client, f"/admin/people/{eve.id}/role", role="reviewer").status_code == 303
        assert eves.get("/admin").status_code == 200
        assert send(client, f"/admin/people/{eve.id}/active", is_active="no").status_code == 303
        assert eves.get("/", headers={"accept": "application/json"}).status_code == 401
        assert send(client, f"/admin/people/{world.admin.id}/active", is_active="no").status_code == 409
        page = send(client, f"/admin/people/{eve.id}/password").text
        found = re.search(r'value="(http://[^"]+/invitations/[^"]+)"', page)
        assert found is not None
        assert found[1].startswith(world.url)
        assert found[1] not in client.get("/admin/people").text, "shown once"
        revoke = re.findall(r"/admin/people/invitations/(\d+)/revoke", client.get("/admin/people").text)
        assert send(client, f"/admin/people/invitations/{revoke[-1]}/revoke").status_code == 303
    assert httpx.get(found[1]).status_code == 404


def test_a_waiting_run_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "people" / "comparisons-1"
    folder.mkdir(parents=True)
    (folder / "tasks.jsonl").write_text("broken\n")
    with annotation(tmp_path) as world, world.client("admin") as client:
        handovers = world.app.state.handovers
        handovers._roots = [tmp_path / "people"]
        handovers.look(world.url)
        page = client.get("/admin").text
        assert "A run waits for ratings" in page
        assert "not valid JSON" in page
