"""What goes wrong at work: models, the network, the server, two tabs, time. Nothing that was written may be lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from tests.apps.annotation import Annotation, annotation, asked, begin, choose, press, ready
from tests.apps.feedback_world import PASSWORD, Hands

from groundup.feedback.projects import NewItem


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    with annotation(tmp_path_factory.mktemp("work")) as world:
        world.person("ann")
        yield world


@pytest.fixture(autouse=True)
def well_behaved_models(world: Annotation) -> None:
    world.models.failures.clear()
    world.models.cut_off.clear()
    world.models.asked.clear()


def test_a_model_that_fails_costs_no_words(world: Annotation, browser: Browser) -> None:
    """One of two answers fails: it is told without its name, asked again alone, and the prompt may be changed."""
    project = world.project("failing", "preference", [NewItem()])
    world.models.failures["alpha-7b"] = [400, 400, 503, 503]
    with world.page(browser, "ann") as (page, noticed):
        begin(page, world, project)
        page.fill("#prompt", "Why does it rain?")
        press(page, "Control+Enter")
        expect(page.locator("#failed-words")).to_contain_text("refused (status 400)")
        assert "alpha" not in page.content()
        before = len(world.models.asked)
        press(page, "Enter")
        choose(page)
        assert {body["model"] for body in world.models.asked[before:]} == {"alpha-7b"}, "what succeeded is kept"
        press(page, "3", "Enter")
        page.wait_for_selector("#prompt")
        ready(page)
        world.models.cut_off.add("beta-13b")
        page.fill("#prompt", "And snow?")
        press(page, "Control+Enter")
        expect(page.locator("#failed-words")).to_contain_text("cut off")
        press(page, "e")
        page.wait_for_selector("#prompt")
        ready(page)
        assert [error for error in noticed.errors if "Failed to load resource" not in error] == []
        world.models.cut_off.clear()
        page.fill("#prompt", "And hail?")
        press(page, "Control+Enter")
        choose(page)


def test_a_reload_in_the_middle_loses_no_answer(world: Annotation, browser: Browser) -> None:
    project = world.project("reload", "preference", [NewItem()])
    world.models.seconds_a_word = 0.05
    try:
        with world.page(browser, "ann") as (page, noticed):
            begin(page, world, project)
            page.fill("#prompt", "Why does it rain?")
            press(page, "Control+Enter")
            expect(page.locator(".state").first).to_have_text("writing")
            page.reload()
            choose(page)
            assert noticed.nothing(), noticed
        assert len(world.models.asked) == 2, "nobody was asked twice"
    finally:
        world.models.seconds_a_word = 0


def test_offline_keeps_the_draft(world: Annotation, browser: Browser) -> None:
    project = world.project("offline", "sft", [asked("Why?")])
    with world.page(browser, "ann") as (page, noticed):
        begin(page, world, project)
        page.context.set_offline(True)
        page.fill("#response", "Because.")
        expect(page.locator("#saved")).to_contain_text("Offline")
        press(page, "Control+Enter")
        expect(page.locator("#trouble")).to_contain_text("cannot be reached")
        page.context.set_offline(False)
        page.evaluate("dispatchEvent(new Event('online'))")
        expect(page.locator("#saved")).to_have_text("Draft saved")
        press(page, "Control+Enter")
        page.wait_for_url(f"**/projects/{project.id}")
        assert not noticed.dialogs
    assert world.answers(project)[0]["response"] == "Because."


def test_a_failing_server_keeps_the_draft(world: Annotation, browser: Browser) -> None:
    project = world.project("error 500", "sft", [asked("Why?")])
    with world.page(browser, "ann") as (page, _):
        begin(page, world, project)
        page.route("**/submit", lambda route: route.fulfill(status=500, body="{}"))
        page.fill("#response", "Because.")
        press(page, "Control+Enter")
        expect(page.locator("#trouble")).to_contain_text("What you wrote is kept")
        expect(page.locator("#response")).to_have_value("Because.")
        page.unroute("**/submit")
        press(page, "Control+Enter")
        page.wait_for_url(f"**/projects/{project.id}")
    assert len(world.answers(project)) == 1


def test_sending_twice_counts_once(world: Annotation, browser: Browser) -> None:
    """A double click, and an answer that is lost on its way back and sent again with the same key."""
    project = world.project("twice", "sft", [asked("One?"), asked("Two?")])
    with world.page(browser, "ann") as (page, _):
        begin(page, world, project)
        sent: list[Any] = []

        def lose(route: Any) -> None:
            sent.append(json.loads(route.request.post_data))
            route.fetch()
            route.abort() if len(sent) == 1 else route.continue_()

        page.route("**/submit", lose)
        page.fill("#response", "Because.")
        page.get_by_role("button", name="Hand in").dblclick()
        expect(page.locator("#trouble")).to_contain_text("cannot be reached")
        press(page, "Control+Enter")
        expect(page.get_by_text("Two?")).to_be_visible()
        assert sent[0]["key"] == sent[1]["key"]
    assert len(world.answers(project)) == 1


def test_a_lost_lease_is_told_and_the_words_stay(tmp_path: Path, browser: Browser) -> None:
    clock = Hands()
    with annotation(tmp_path, clock) as world:
        ann, ben = world.person("ann"), world.person("ben")
        project = world.project("lease", "sft", [asked("Why?")], lease_seconds=60)
        with world.page(browser, "ann") as (page, _):
            begin(page, world, project)
            clock.turn(61)
            task = world.services.work.claim(ben.id, project.id)
            assert task is not None
            page.fill("#response", "Because.")
            expect(page.locator("#trouble")).to_contain_text("ran out")
            expect(page.locator("#response")).to_have_value("Because.")
            expect(page.locator("#saved")).to_contain_text("kept on this device")
            press(page, "Control+Enter")
            expect(page.locator("#trouble")).to_contain_text("ran out")
        assert world.answers(project) == []
        assert ann.id != ben.id


def test_signed_out_in_another_tab(world: Annotation, browser: Browser) -> None:
    project = world.project("signed out", "sft", [asked("Why?")])
    with world.page(browser, "ann") as (page, _):
        begin(page, world, project)
        other = page.context.new_page()
        other.goto(world.url)
        other.click("text=Sign out")
        other.wait_for_url("**/login")
        page.fill("#response", "Because.")
        expect(page.locator("#trouble")).to_contain_text("signed out")
        expect(page.locator("#response")).to_have_value("Because.")
        other.fill("#name", "ann")
        other.fill("#password", PASSWORD)
        press(other, "Enter")
        other.wait_for_url(f"{world.url}/")
        begin(page, world, project)
        expect(page.locator("#response")).to_have_value("Because.")
