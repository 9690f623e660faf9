"""The chat page by keyboard, with a screen reader, on a phone, in the dark."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from tests.apps.browser import PHONE, wait_until, watched_page
from tests.apps.chat_page import Chat, World, open_chat, scripted_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with scripted_world() as world:
        yield world


@pytest.fixture
def chat(browser: Browser, world: World) -> Iterator[Chat]:
    with open_chat(browser, world) as chat:
        yield chat


def test_everything_works_without_a_mouse(chat: Chat) -> None:
    press = chat.page.keyboard.press
    press("Escape")
    press("?")
    expect(chat.page.locator("#help-dialog")).to_contain_text("Token probabilities")
    press("Escape")
    expect(chat.page.locator("#help-dialog")).to_be_hidden()
    chat.keys("/")
    chat.page.keyboard.type("say one")
    press("Shift+Enter")
    chat.page.keyboard.type("two")
    press("Enter")
    expect(chat.complete().locator(".body")).to_have_text("one\ntwo", use_inner_text=True)
    press("ArrowUp")
    assert chat.focused() == "", "the field of the question has the focus"
    press("Control+a")
    chat.page.keyboard.type("say three")
    press("Enter")
    expect(chat.complete().locator(".body")).to_have_text("three")
    press("Escape")
    press("k")
    assert "turn answer" in chat.focused()
    press("k")
    assert "turn user" in chat.focused()
    for key, pressed in (("c", "#compare"), ("p", "#probabilities")):
        press(key)
        expect(chat.page.locator(pressed)).to_have_attribute("aria-pressed", "true")
        press(key)
        expect(chat.page.locator(pressed)).to_have_attribute("aria-pressed", "false")
    press("m")
    assert chat.focused() == "model"
    press("ArrowDown")
    expect(chat.page.locator("#model")).to_have_value("late")
    press("Alt+n")
    expect(chat.page.locator("#welcome")).to_be_visible()
    assert chat.focused() == "composer-text"
    press("Escape")
    press("x")
    expect(chat.page.locator("#export-dialog")).to_be_visible()
    press("Escape")
    press("?")
    chat.page.uncheck("#single-keys")
    press("Escape")
    chat.keys("p")
    expect(chat.page.locator("#probabilities")).to_have_attribute("aria-pressed", "false")


NAMELESS = """[...document.querySelectorAll("button, input, select, textarea, a")]
    .filter((one) => !one.getAttribute("aria-label") && !one.textContent.trim() && !one.labels?.length)
    .map((one) => one.outerHTML)"""
LISTEN = """() => {
    const region = document.getElementById("announcer");
    window.said = [];
    new MutationObserver(() => said.push(region.textContent)).observe(region, {childList: true});
}"""


def test_every_control_has_a_name_and_answers_are_announced(chat: Chat) -> None:
    chat.page.click("#settings-open")
    chat.page.click("#compare")
    chat.ask("say hello. And a second sentence.")
    chat.page.locator(".pick").first.click()
    chat.page.click("#compare")
    assert chat.page.evaluate(NAMELESS) == []
    chat.page.evaluate(LISTEN)
    chat.ask("say one. Two.")
    wait_until(chat.page, "said.join(' ').includes('End of the answer')")
    assert "one. Two." in " ".join(chat.page.evaluate("said"))


def test_the_page_works_on_a_phone(browser: Browser, world: World) -> None:
    with watched_page(browser, world.site.url, **PHONE) as (page, noticed):
        chat = Chat(page, noticed, world).open()
        page.locator("#composer-text").fill(
            "say `a very long line of code that is wider than a phone can ever be`\n\n    " + "x" * 300
        )
        page.tap("#send")
        chat.complete()
        page.tap("#sidebar-open")
        expect(page.locator("#sidebar-close")).to_be_focused()
        assert page.evaluate("document.getElementById('main').inert")
        expect(chat.titles).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar-open")).to_be_focused()
        page.tap("#settings-open")
        expect(page.locator("#settings")).to_be_in_viewport()
        page.locator("#shade").tap(position={"x": 5, "y": 400})
        expect(page.locator("#settings")).not_to_be_in_viewport()
        page.tap("#compare")
        chat.ask("say both")
        upper, lower = (answer.bounding_box() for answer in chat.answers.all()[-2:])
        assert upper is not None
        assert lower is not None
        assert upper["y"] + upper["height"] <= lower["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = page.evaluate("""[...document.querySelectorAll("button")].filter((one) => one.checkVisibility())
            .map((one) => one.getBoundingClientRect()).filter(({width, height}) => width < 24 || height < 24).length""")
        assert small == 0, "targets of at least 24 pixels (WCAG 2.2)"
        assert noticed.nothing(), noticed


CONTRASTS = """() => {
    const probe = document.createElement("span");
    document.body.append(probe);
    const numbers = (name) => {
        probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    };
    const light = (name) => {
        const [r, g, b] = numbers(name).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const pairs = [["ink", "ground"], ["soft", "ground"], ["soft", "panel"], ["soft", "raised"], ["soft", "hover"],
        ["accent", "ground"], ["accent", "panel"], ["accent", "mine"], ["on-accent", "accent"], ["ink", "mine"],
        ["bad", "bad-ground"], ["bad", "panel"], ["ink", "notice-ground"], ["ground", "ink"]];
    const found = pairs.map(([front, back]) => {
        const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
        return [front, back, (high + 0.05) / (low + 0.05)];
    });
    probe.remove();
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_are_easy_to_read(browser: Browser, world: World, scheme: Any) -> None:
    with watched_page(browser, world.site.url, color_scheme=scheme, reduced_motion="reduce") as (page, noticed):
        chat = Chat(page, noticed, world).open()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
        poor = [pair for pair in page.evaluate(CONTRASTS) if pair[2] < 4.5]
        assert poor == []
        assert page.evaluate("getComputedStyle(document.getElementById('send')).transitionDuration") == "0s"
        page.keyboard.press("Escape")
        chat.keys(*("t",) * (1 if scheme == "dark" else 2))
        other = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert other != ground
        chat.open()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == other
        assert noticed.nothing(), noticed
