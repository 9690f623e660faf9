"""For people who see badly, use no mouse, work in the dark, or do not want shortcuts."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.apps.annotation import Annotation, annotation, asked, begin, pair, press, question, ready
from tests.apps.browser import Noticed
from tests.apps.page_checks import CONTRAST, STRUCTURE

from groundup.feedback.projects import NewItem

GUIDELINES = "Prefer what helps **most**.\n\n- Is it true?\n- Is it clear?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    with annotation(tmp_path_factory.mktemp("work")) as world:
        world.person("ann")
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
