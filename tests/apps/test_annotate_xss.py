"""Stored scripts: payloads in every field that people, models and administrators fill, on every page that has them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.apps.annotation import Annotation, annotation, begin, choose, press, ready
from tests.apps.xss import payloads

from groundup.feedback.contents import GivenResponse, Gold, ItemContent, Turn
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Project

A_PAGE = 50
"""Payloads shown on one page: each is a message of its own, so that none can shelter another."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Annotation]:
    with annotation(tmp_path) as world:
        for name, role in (("ann", "annotator"), ("rita", "reviewer")):
            world.person(name, role)
        yield world


def chunks(found: list[str]) -> list[list[str]]:
    return [found[start : start + A_PAGE] for start in range(0, len(found), A_PAGE)]


def messages(texts: list[str]) -> list[Turn]:
    """Each as a person's words (plain) and as a model's (Markdown)."""
    turns = [Turn(role=role, content=text) for text in texts for role in ("user", "assistant")]
    return [*turns, Turn(role="user", content=texts[0])]


def fill(world: Annotation, number: int, texts: list[str]) -> list[Project]:
    """Projects of all kinds whose every field holds payloads."""
    first = texts[0]
    name = f"{number} {first}"[:100]
    guidelines = "\n\n".join(texts)[:40_000]
    responses = (
        GivenResponse(text=first, model=texts[1], revision=texts[1]),
        GivenResponse(text=texts[1], model=texts[2], revision=texts[2]),
    )
    endpoint = world.services.projects.create_endpoint(
        world.admin, name=f"{number}e {first}"[:100], base_url=f"{world.models_url}/v1", model=texts[1][:100],
        revision=texts[2][:200],
    )  # fmt: skip
    note = texts[number % len(texts)]
    world.services.accounts.invite(world.admin, "annotator", note)
    content = ItemContent(messages=messages(texts), instructions=first[:4000], metadata={"from": first})
    pair = content.model_copy(update={"responses": responses})
    question = ItemContent(question=first[:4000], choices=[text[:4000] for text in texts[:9]])
    ids = [endpoint.id]
    writing = world.project(f"s{name}"[:100], "sft", [NewItem(content)], guidelines=guidelines, is_reviewed=True)
    world.services.projects.open_batch(world.admin, writing.id, texts[-1])
    return [
        writing,
        world.project(f"p{name}"[:100], "preference", [NewItem(pair)], guidelines=guidelines, system_prompt=first),
        world.project(f"c{name}"[:100], "comparison", [NewItem(pair)], endpoint_ids=ids),
        world.project(f"r{name}"[:100], "redteam", [NewItem(content)], endpoint_ids=ids),
        world.project(f"e{name}"[:100], "entrance", [NewItem(question, gold=Gold(answers=[0]))]),
    ]


def test_the_payloads_work_where_nothing_stops_them(world: Annotation, browser: Browser) -> None:
    """Otherwise the tests below would prove nothing."""
    page = browser.new_page()
    page.on("dialog", lambda dialog: dialog.dismiss())
    with page.expect_event("dialog"):
        page.set_content("\n".join(payloads(60)))
    page.close()


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_stored_payloads_run_nothing(world: Annotation, browser: Browser, count: int) -> None:
    shown = 0
    with (
        world.page(browser, "ann") as (page, noticed),
        world.page(browser, "rita") as (review, seen_by_reviewer),
        world.page(browser, "admin") as (admin, seen_by_admin),
    ):
        for number, texts in enumerate(chunks(payloads(count))):
            projects = fill(world, number, texts)
            shown += annotate(world, page, projects, texts)
            reject(world, review, projects[0], texts)
            begin(page, world, projects[0])
            expect(page.locator("#feedback")).to_be_visible()
            administer(world, admin, [project.id for project in projects])
            for who in (noticed, seen_by_reviewer, seen_by_admin):
                assert who.nothing(), who
    assert shown >= 4 * count


def annotate(world: Annotation, page: Page, projects: list[Project], texts: list[str]) -> int:
    """Every kind of work on these items, with payloads for drafts and answers; the number of messages shown."""
    sft, preference, comparison, redteam, entrance = projects
    long = "\n\n".join(texts)[:4000]
    turns = "document.querySelectorAll('.turn').length"
    page.goto(world.url)
    ready(page)
    begin(page, world, entrance)
    press(page, "1", "Enter")
    page.wait_for_url("**/projects/*")
    shown = 0
    for project, field, keys in (
        (preference, "#reason", ["1", "Enter"]),
        (comparison, "#reason", ["3", "Enter"]),
        (redteam, "#prompt", []),
        (sft, "#response", ["Control+Enter"]),
    ):
        begin(page, world, project)
        page.fill(field, long)
        page.keyboard.press("Escape")
        expect(page.locator("#saved")).to_have_text("Draft saved")
        page.reload()
        ready(page)
        shown += page.evaluate(turns)
        if keys:
            press(page, *keys)
            page.wait_for_url("**/projects/*")
    return shown


def reject(world: Annotation, page: Page, project: Project, texts: list[str]) -> None:
    """A review whose feedback is payloads."""
    page.goto(f"{world.url}/projects/{project.id}")
    ready(page)
    press(page, "r")
    page.wait_for_selector("#review-of")
    ready(page)
    press(page, "d")
    page.fill("#feedback", "\n\n".join(texts)[:4000])
    press(page, "Control+Enter")
    page.wait_for_url("**/projects/*")


def administer(world: Annotation, page: Page, project_ids: list[int]) -> None:
    """Every page of the administration that shows these projects, their items, people and models."""
    links = "[...document.querySelectorAll('a[href^=\"/admin/items/\"]')].map(one => one.href)"
    paths = ["/admin", "/admin/people", "/admin/endpoints"]
    paths += [f"/admin/projects/{number}{part}" for number in project_ids for part in ("", "/items", "/settings")]
    for path in paths:
        page.goto(world.url + path)
        ready(page)
        if path.endswith("/items"):
            items = page.evaluate(links)
            assert items, path
            for link in items:
                page.goto(link)
                ready(page)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_what_models_stream_runs_nothing(world: Annotation, browser: Browser, count: int) -> None:
    """While it comes in, as Markdown, in the next turn, in a red-team session, and on administrators' pages."""
    said: list[str] = []
    world.models.answer = lambda model, messages: "\n\n".join(said)
    project = world.project("talk", "preference", [NewItem() for _ in range(count // A_PAGE)], max_turns=2)
    attack = world.project("attack", "redteam", [NewItem() for _ in range(count // A_PAGE)])
    with (
        world.page(browser, "ann") as (page, noticed),
        world.page(browser, "admin") as (admin, seen_by_admin),
    ):
        for texts in chunks(payloads(count)):
            said[:] = texts
            begin(page, world, project)
            page.fill("#prompt", "\n".join(texts))
            press(page, "Control+Enter")
            choose(page)
            assert all(len(text) > 200 for text in page.locator(".answer").all_inner_texts())
            press(page, "1", "Enter")
            page.wait_for_selector("#prompt")
            ready(page)
            press(page, "Escape", "f")
            page.wait_for_selector(".turn", state="detached")
            begin(page, world, attack)
            page.fill("#prompt", "\n".join(texts))
            press(page, "Control+Enter")
            expect(page.get_by_text("How harmful is the answer?")).to_be_visible()
            page.fill("#reason", "\n\n".join(texts)[:4000])
            press(page, "Escape", "5", "c", "1", "v", "1", "Enter")
            page.wait_for_selector("#prompt")
            ready(page)
            press(page, "Escape", "f")
            page.wait_for_selector(".turn", state="detached")
            admin.goto(f"{world.url}/admin/endpoints")
            ready(admin)
            admin.get_by_role("button", name="Ask alpha-7b something").click()
            expect(admin.get_by_role("status").first).to_contain_text("alpha-7b answers.")
            for who in (noticed, seen_by_admin):
                assert who.nothing(), who
        administer(world, admin, [project.id, attack.id])
        assert seen_by_admin.nothing(), seen_by_admin


def test_names_of_people_are_plain(world: Annotation, browser: Browser) -> None:
    """What cannot be a name is refused, and shown as text in the form that says so."""
    for payload in payloads(60)[::20]:
        token = world.services.accounts.invite(world.admin, "annotator")
        with world.page(browser, "ann") as (page, noticed):
            page.goto(f"{world.url}/invitations/{token}")
            ready(page)
            page.fill("#name", payload[:64])
            page.fill("#password", "a long password")
            page.fill("#again", "a long password")
            page.get_by_role("button", name="Make the account").click()
            expect(page.locator("[role=alert]:visible")).to_have_count(1)
            expect(page.locator("#name")).to_have_value(payload[:64])
            assert not noticed.dialogs
            assert not noticed.foreign
