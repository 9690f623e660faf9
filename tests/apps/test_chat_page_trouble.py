"""The chat page when something fails, and when what is said in it is hostile."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from tests.apps.browser import watched_page
from tests.apps.chat_page import Chat, World, open_chat, scripted_world
from tests.apps.xss import payloads

KEY = "sk-secret-of-this-test"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with scripted_world() as world:
        yield world


@pytest.fixture
def chat(browser: Browser, world: World) -> Iterator[Chat]:
    with open_chat(browser, world) as chat:
        yield chat


def test_a_busy_server_is_asked_again(chat: Chat) -> None:
    chat.noticed.errors.clear()
    chat.send("busy but then answered")
    expect(chat.answers.locator(".remark")).to_contain_text("The server is busy. Trying again in 1 s.")
    expect(chat.complete().locator(".body")).to_have_text("but then answered")
    assert [error for error in chat.noticed.errors if "429" not in error] == []
    chat.noticed.errors.clear()


def test_a_failure_says_what_to_do_and_keeps_what_came(chat: Chat) -> None:
    answer = chat.ask("fail after three words and not before")
    expect(answer.locator(".body")).to_contain_text("after three words")
    expect(answer.locator(".remark.error")).to_contain_text("failed")
    expect(answer.locator(".remark.error")).to_contain_text("Try again")
    answer.get_by_role("button", name="Try again").click()
    chat.complete()
    expect(chat.answers).to_have_count(1)
    answer = chat.ask("say [INST] this is refused")
    expect(answer.locator(".remark.error")).to_be_visible()
    chat.send("say next")
    expect(chat.page.locator(".notice")).to_contain_text("has no answer yet")
    assert all("400" in error for error in chat.noticed.errors)
    chat.noticed.errors.clear()


def test_a_full_context_and_a_server_that_is_gone(browser: Browser, world: World) -> None:
    with ExitStack() as stack:
        world = stack.enter_context(scripted_world(world.checkpoint, context=40))
        page, noticed = stack.enter_context(watched_page(browser, world.site.url))
        chat = Chat(page, noticed, world).open()
        answer = chat.ask("say " + "a " * 12)
        expect(page.locator("#context")).to_contain_text("of 40 tokens")
        answer = chat.ask("say " + "king " * 30)
        expect(answer.locator(".remark.error")).to_contain_text("Start a new chat")
    with ExitStack() as stack:
        inner = stack.enter_context(ExitStack())
        world = inner.enter_context(scripted_world(world.checkpoint))
        page, noticed = stack.enter_context(watched_page(browser, world.site.url))
        chat = Chat(page, noticed, world).open()
        chat.ask("say one")
        inner.close()
        answer = chat.ask("say two")
        expect(answer.locator(".remark.error")).to_contain_text("Is `groundup serve` still running?")
        assert noticed.dialogs == []
        assert noticed.foreign == []


def test_the_key_is_asked_for_and_kept_for_the_tab_alone(browser: Browser, world: World) -> None:
    with (
        scripted_world(world.checkpoint, api_keys=(KEY,)) as world,
        watched_page(browser, world.site.url) as (page, noticed),
    ):
        page.goto(world.site.url)
        dialog = page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_be_visible()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(2)
        chat = Chat(page, noticed, world)
        expect(chat.ask("say **yes**").locator("strong")).to_have_text("yes")
        chat.open()
        assert KEY not in json.dumps(page.evaluate("({...localStorage})"))
        assert page.evaluate("Object.values({...sessionStorage})") == [KEY]
        assert all("401" in error for error in noticed.errors)


HARMFUL = """[...document.querySelectorAll("#transcript *, #conversations *")]
    .filter((one) => /^(script|iframe|object|embed|img|style|link|base|form|video|audio)$/i.test(one.tagName)
        || [...one.attributes].some(({name, value}) => /^on|^style$|^srcdoc$/.test(name)
            || (name === "href" && !/^(https?:|mailto:|#i-)/.test(value))))
    .map((one) => one.outerHTML)"""


def test_nothing_that_models_or_files_say_runs(chat: Chat, tmp_path: Path) -> None:
    texts = payloads(900)
    backend = chat.world.backends["early"]
    backend.payloads = ["\n\n".join(texts[start : start + 10]) for start in range(0, 100, 10)]
    for number in range(10):
        chat.page.keyboard.press("Alt+n")
        expect(chat.ask(f"payload {number}").locator(".text > *").first).to_be_visible()
    chat.page.click("#probabilities")
    chat.ask("payload 0")
    chat.answers.last.locator(".token").nth(2).hover()
    records = [
        {
            "messages": [
                {"role": "system", "content": part[0]},
                *({"role": role, "content": text} for text in part for role in ("user", "assistant")),
            ],
            "metadata": {"title": part[0]},
        }
        for part in (texts[start : start + 90] for start in range(0, 900, 90))
    ]
    (tmp_path / "evil.json").write_text(json.dumps(records))
    chat.page.set_input_files("#import-file", tmp_path / "evil.json")
    expect(chat.titles).to_have_count(20)
    chat.page.click("#probabilities")
    for title in chat.titles.all()[:10]:
        title.click()
        expect(chat.answers).to_have_count(90)
        expect(chat.answers.last.locator(".text > *").first).to_be_attached()
    chat.page.fill("#search", "alert")
    expect(chat.titles.first).to_be_visible()
    chat.page.fill("#search", "")
    chat.page.click("#export")
    chat.page.wait_for_timeout(300)
    assert chat.page.evaluate(HARMFUL) == []
    assert chat.noticed.nothing(), chat.noticed


def test_a_file_may_hold_anything(chat: Chat, tmp_path: Path) -> None:
    node = {"id": "a", "parent": None, "role": "user", "content": "hello", "created": 1}
    broken = [
        {"nodes": {"a": {**node, "parent": "a"}}},
        {"nodes": {"a": {**node, "role": "system"}}},
        {"nodes": {"a": {**node, "content": 5}}},
        {"nodes": {"a": {**node, "parent": "missing"}}},
        {"nodes": {"a": None}}, {"nodes": []}, {"nodes": {}}, 5, None, [], "text",
    ]  # fmt: skip
    good = {
        "nodes": {"a": node},
        "chosen": {"root": 7},
        "pairs": {"p": {"nodes": ["a", "b"]}},
        "parameters": {"temperature": 99, "evil": 1},
    }
    (tmp_path / "odd.json").write_text(
        json.dumps([{"conversation": value} for value in [*broken, good]] + [3, None, []])
    )
    chat.page.set_input_files("#import-file", tmp_path / "odd.json")
    expect(chat.page.locator(".notice")).to_contain_text(f"1 conversation imported. {len(broken) + 3} records left out")
    expect(chat.questions).to_have_text("hello")
