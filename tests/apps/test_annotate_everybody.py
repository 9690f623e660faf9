"""For people who see badly, use no mouse, work in the dark, or do not want shortcuts."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select
from tests.apps.annotation import Annotation, annotation, asked, begin, choose, pair, press, question, ready
from tests.apps.browser import Noticed
from tests.apps.page_checks import CONTRAST, KEYS, STRUCTURE

from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Submission

GUIDELINES = "Prefer what helps **most**.\n\n- Is it true?\n- Is it clear?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    with annotation(tmp_path_factory.mktemp("work")) as world:
        world.person("ann")
        world.person("rita", "reviewer")
        yield world


def shown_everywhere(world: Annotation, browser: Browser, check: Any, **options: Any) -> None:
    """Run `check(page, noticed)` on the pages that people work with."""
    projects = {
        "preference": [pair("one **bold** answer", "two")],
        "sft": [asked("Why?")],
        "comparison": [pair("one", "two")],
        "redteam": [NewItem()],
        "entrance": [question("Is 2 even?", 0)],
    }
    with world.page(browser, "ann", **options) as (page, noticed):
        for kind, items in projects.items():
            name = f"{kind} for everybody"
            found = [project for project in world.services.projects.projects() if project.name == name]
            project = found[0] if found else world.project(name, kind, items, guidelines=GUIDELINES)
            begin(page, world, project)
            check(page, noticed)
        for path in ("/", "/account", f"/projects/{project.id}", "/no/such/page"):
            page.goto(world.url + path)
            ready(page)
            check(page, noticed)


def test_names_landmarks_and_focus(world: Annotation, browser: Browser) -> None:
    """Every control has a name, ids are unique, there is one main heading, and Tab goes through all and out again."""

    def check(page: Page, noticed: Noticed) -> None:
        problems = page.evaluate(STRUCTURE)
        assert problems == [], page.url
        # From the first control to the last and then out of the page: no keyboard trap.
        page.evaluate("document.querySelector('.skip').focus()")
        seen: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            here = page.evaluate("document.activeElement === document.body ? '' : document.activeElement.outerHTML")
            if not here or here in seen:
                break
            seen.append(here)
            outline = page.evaluate(
                """() => [document.activeElement, document.activeElement.closest('label')].filter(Boolean)
                .some(one => getComputedStyle(one).outlineStyle !== 'none')"""
            )
            assert outline, f"focus is not to be seen: {here}"
        else:
            raise AssertionError(f"the focus goes round: {seen[-3:]}")
        assert len(seen) >= 4

    shown_everywhere(world, browser, check)


def every_control_has_a_key(page: Page, noticed: Noticed) -> None:
    if page.locator("#task").count():
        assert page.evaluate(KEYS) == [], page.url


def test_a_key_for_every_control_of_the_work(world: Annotation, browser: Browser) -> None:
    shown_everywhere(world, browser, every_control_has_a_key)


def test_a_key_for_every_control_of_a_dialogue(world: Annotation, browser: Browser) -> None:
    """In each of its states: before the first prompt, while it is judged, between turns, after the last one."""
    compare = world.project("keys of a dialogue", "preference", [NewItem()], criterion="safety", max_turns=2)
    attack = world.project("keys of an attack", "redteam", [NewItem()], max_turns=2)
    with world.page(browser, "ann") as (page, noticed):
        for project, judge in ((compare, ["q", "p", "1"]), (attack, ["1", "c", "1", "v", "1"])):
            begin(page, world, project)
            for turn in (1, 2):
                page.fill("#prompt", "Why does it rain?")
                every_control_has_a_key(page, noticed)
                press(page, "Control+Enter")
                expect(page.locator("fieldset.judged, .judged fieldset").last).to_be_visible()
                every_control_has_a_key(page, noticed)
                press(page, *judge, "Enter")
                stage = "judged 2" if (turn, project) == (2, compare) else f"prompt {turn}"
                expect(page.locator("#work")).to_have_attribute("data-stage", stage)
                ready(page)
                every_control_has_a_key(page, noticed)
            press(page, "b")
            choose(page) if project is compare else expect(page.get_by_text("How harmful")).to_be_visible()
        assert noticed.nothing(), noticed


def test_a_review_by_keyboard_alone(world: Annotation, browser: Browser) -> None:
    ann = next(person for person in world.services.accounts.accounts(world.admin) if person.name == "ann")
    project = world.project("keys of a review", "sft", [asked("Why?")], is_reviewed=True)
    task = world.services.work.claim(ann.id, project.id)
    assert task is not None
    world.services.work.submit(ann.id, task.assignment_id, task.version, "key-of-the-answer", {"response": "Because."})
    with world.page(browser, "rita") as (page, noticed):
        page.goto(f"{world.url}/projects/{project.id}")
        ready(page)
        press(page, "r")
        page.wait_for_selector("#review-of")
        ready(page)
        for decision in ("e", "d", "a"):
            press(page, decision)
            every_control_has_a_key(page, noticed)
        press(page, "Enter")
        page.wait_for_url(f"**/projects/{project.id}")
        assert noticed.nothing(), noticed
    with world.services.database.read() as session:
        (written,) = session.scalars(select(Submission).where(Submission.user_id == ann.id))
        assert written.review_state == "approved"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(world: Annotation, browser: Browser, scheme: Any) -> None:
    """WCAG AA: 4.5 to 1 for every text that is shown."""

    def check(page: Page, noticed: Noticed) -> None:
        assert page.evaluate(CONTRAST) == [], page.url

    shown_everywhere(world, browser, check, color_scheme=scheme)


def test_colours_and_shortcuts_are_the_persons_choice(world: Annotation, browser: Browser) -> None:
    project = world.project("choices", "preference", [pair("one", "two"), pair("three", "four")])
    with world.page(browser, "ann", color_scheme="light") as (page, noticed):
        begin(page, world, project)
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        press(page, "t", "t")
        dark = page.evaluate(background)
        assert dark != light
        page.reload()
        ready(page)
        assert page.evaluate(background) == dark, "kept by the server from the first byte on"
        press(page, "?")
        expect(page.locator("#help")).to_contain_text("Response A is significantly better")
        expect(page.locator("#help")).to_contain_text("Leave this one to somebody else")
        page.get_by_label("Single-letter shortcuts").uncheck()
        press(page, "Escape", "1")
        assert page.locator("input:checked").evaluate_all("all => all.filter(one => one.type === 'radio').length") == 0
        page.evaluate("localStorage.clear()")
        press(page, "1")
        expect(page.locator("input[name=choice]:checked")).to_have_count(1)
        press(page, "r")
        page.keyboard.type("8 x ?")
        expect(page.locator("#reason")).to_have_value("8 x ?")
        expect(page.locator("dialog[open]")).to_have_count(0)
        press(page, "Escape", "x")
        page.get_by_role("button", name="Skip it").click()
        expect(page.locator(".answer").nth(0)).to_have_text("three")
        assert noticed.nothing(), noticed
