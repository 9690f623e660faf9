"""The chat page in a real Chromium: what one does with conversations."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from tests.apps.browser import watched_page
from tests.apps.chat_page import Chat, World, open_chat, scripted_world
from tests.apps.raw_http import running

from groundup.data.comparisons import read_comparisons
from groundup.data.dialogues import DialogueReport, read_dialogues
from groundup.infer.engine import Engine
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.serve.engine_backend import EngineBackend


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with scripted_world() as world:
        yield world


@pytest.fixture
def chat(browser: Browser, world: World) -> Iterator[Chat]:
    with open_chat(browser, world) as chat:
        yield chat


def test_an_answer_streams_into_the_page_as_markdown(chat: Chat) -> None:
    late = chat.world.backends["early"]
    late.gate = gate = threading.Event()
    chat.send("wait **first** half of it and the second")
    expect(chat.answers.locator("strong")).to_have_text("first")
    expect(chat.answers).not_to_contain_text("second")
    expect(chat.page.locator("#stop")).to_be_visible()
    gate.set()
    expect(chat.complete().locator(".body")).to_have_text("first half of it and the second from early")
    expect(chat.answers.locator(".stats")).to_have_text(re.compile(r"^\d+ tokens · [\d.]+ tokens/s · first after \d"))
    expect(chat.questions).to_have_text("wait **first** half of it and the second")
    expect(chat.page.locator("#context")).to_contain_text("of 100,000 tokens of context used")
    assert chat.focused() == "composer-text"


def test_code_has_a_copy_button_and_tables_their_alignment(chat: Chat) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = chat.ask("say ```python\nprint(1 < 2) # yes\n```\n\n| a | b |\n|:-|-:|\n| 1 | 2 |")
    expect(answer.locator(".h-comment")).to_have_text("# yes")
    expect(answer.locator("td").last).to_have_css("text-align", "right")
    answer.get_by_text("Copy", exact=True).click()
    expect(answer.get_by_text("Copied")).to_be_visible()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print(1 < 2) # yes\n"


def test_stop_ends_the_answer_here_and_on_the_server(chat: Chat) -> None:
    chat.send("long story")
    expect(chat.answers.locator(".body")).to_contain_text("word after")
    chat.page.keyboard.press("Escape")
    answer = chat.complete()
    expect(answer.locator(".stats")).to_contain_text("stopped")
    expect(answer.locator(".body")).to_contain_text("word after")
    backend = chat.world.backends["early"]
    for _ in range(200):
        if backend.num_open == 0:
            break
        chat.page.wait_for_timeout(10)
    assert backend.num_open == 0
    text = answer.locator(".body").inner_text()
    expect(chat.ask("say on").locator(".body")).to_have_text("on")
    prompt = backend.tokenizer.decode(backend.prompts[-1])
    assert text[:40] in prompt, "a stopped answer is part of the conversation"


def test_regenerating_and_editing_make_branches_and_lose_nothing(chat: Chat) -> None:
    answer = chat.ask("say one")
    answer.get_by_label("Another answer").click()
    chat.complete()
    expect(chat.answers.locator(".branches")).to_have_text("2/2")
    chat.page.keyboard.press("Escape")
    chat.keys("[")
    expect(chat.answers.locator(".branches")).to_have_text("1/2")
    chat.ask("say two")
    chat.page.locator(".turn.user").first.hover()
    chat.page.get_by_label("Edit the question").first.click()
    editor = chat.page.locator(".edit-form textarea")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("say one")
    editor.fill("say three")
    editor.press("Enter")
    expect(chat.complete().locator(".body")).to_have_text("three")
    expect(chat.questions).to_have_text(["say three"])
    assert chat.focused() == "composer-text"
    chat.page.locator(".turn.user").get_by_label("Previous version").click()
    expect(chat.questions).to_have_text(["say one", "say two"])


def test_an_edit_can_be_given_up(chat: Chat) -> None:
    chat.ask("say one")
    chat.keys("e")
    chat.page.keyboard.type(" more")
    chat.page.keyboard.press("Escape")
    expect(chat.questions).to_have_text("say one")
    assert "turn user" in chat.focused()


def test_the_model_is_switched_and_remembered(chat: Chat) -> None:
    expect(chat.ask("hello").locator(".body")).to_have_text("early heard: hello")
    chat.page.select_option("#model", "late")
    answer = chat.ask("hello again")
    expect(answer.locator(".body")).to_have_text("late heard: hello again")
    expect(answer.locator(".speaker")).to_have_text("late")
    chat.page.click("#new-chat")
    expect(chat.page.locator("#model")).to_have_value("late")


def test_two_models_answer_at_once_and_the_better_answer_goes_on(chat: Chat, tmp_path: Path) -> None:
    early, late = chat.world.backends["early"], chat.world.backends["late"]
    gate = early.gate = late.gate = threading.Event()
    chat.page.click("#compare")
    chat.send("wait for both of us")
    expect(chat.answers).to_have_count(2)
    for answer in chat.answers.all():
        expect(answer.locator(".body")).to_contain_text("for both")
        expect(answer).to_have_attribute("aria-busy", "true")
    gate.set()
    chat.complete()
    expect(chat.answers.locator(".speaker")).to_have_text(["early", "late"])
    left, right = (answer.bounding_box() for answer in chat.answers.all())
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    chat.send("too early")
    expect(chat.page.locator(".notice")).to_contain_text("Choose the answer")
    expect(chat.field).to_have_value("too early")
    chat.field.fill("")
    chat.keys("2")
    expect(chat.answers).to_have_count(1)
    expect(chat.answers.locator(".speaker")).to_have_text("late")
    chat.page.click("#compare")
    chat.ask("and on")
    assert "for both of us" in early.tokenizer.decode(early.prompts[-1])
    chat.saved()
    chat.page.click("#export")
    with chat.page.expect_download() as download:
        chat.page.get_by_text("Choices between two answers").click()
    download.value.save_as(tmp_path / "choices.json")
    [comparison] = read_comparisons(tmp_path / "choices.json")
    assert (comparison.chosen.model, comparison.rejected.model) == ("late", "early")
    assert comparison.prompt[-1].content == "wait for both of us"


def test_hidden_names_stay_hidden_until_the_choice(chat: Chat) -> None:
    chat.page.click("#compare")
    chat.page.check("#blind")
    chat.send("say the same")
    expect(chat.page.locator(".pick")).to_have_count(2)
    expect(chat.answers.locator(".speaker")).to_have_text(["Answer 1", "Answer 2"])
    expect(chat.answers.locator(".stats")).to_have_text(["", ""])
    chat.page.locator(".pick").first.click()
    expect(chat.answers.locator(".speaker")).to_have_text(re.compile("^(early|late)$"))
    chat.answers.get_by_label("Show both answers again").click()
    expect(chat.page.locator(".pick")).to_have_count(2)


def test_probabilities_show_on_hover_and_by_keyboard(chat: Chat) -> None:
    chat.page.click("#probabilities")
    answer = chat.ask("say the quiet king hears a song")
    tokens = answer.locator(".token")
    expect(answer.locator(".tokens")).to_have_text("the quiet king hears a song")
    assert {"token", "token p0", "token p4"} <= {token.get_attribute("class") for token in tokens.all()}
    card = chat.page.locator("#token-card")
    tokens.nth(1).hover()
    expect(card.locator(".chosen")).to_have_count(1)
    expect(card.locator(".row")).to_have_count(3)
    expect(card.locator("h3 span")).to_have_text(re.compile(r"^\d+\.\d %$"))
    chat.page.mouse.move(5, 5)
    expect(card).to_have_count(0)
    tokens.first.focus()
    first = card.inner_text()
    chat.page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(card).to_be_visible()
    chat.page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    assert card.inner_text() != first
    chat.page.keyboard.press("Escape")
    expect(card).to_have_count(0)
    chat.page.click("#probabilities")
    expect(answer.locator(".text p")).to_have_text("the quiet king hears a song")


def test_a_reload_keeps_conversations_with_their_branches(chat: Chat) -> None:
    chat.ask("say one")
    chat.page.keyboard.press("Escape")
    chat.keys("r")
    chat.complete()
    chat.saved()
    chat.page.click("#new-chat")
    chat.ask("say the green river")
    chat.saved()
    chat.open()
    expect(chat.titles).to_have_text(["say the green river", "say one"])
    chat.titles.last.click()
    expect(chat.questions).to_have_text("say one")
    expect(chat.answers.locator(".branches")).to_have_text("2/2")
    expect(chat.answers.locator(".body")).to_have_text("one")


def test_an_answer_that_a_reload_interrupts_is_kept_and_can_be_had_again(chat: Chat) -> None:
    chat.send("long story")
    expect(chat.answers.locator(".body")).to_contain_text("word after")
    expect(chat.titles).to_have_text("long story")
    chat.page.wait_for_timeout(1200)
    chat.open()
    chat.titles.first.click()
    expect(chat.answers.locator(".body")).to_contain_text("word")
    expect(chat.answers.locator(".remark")).to_contain_text("was left before this answer was complete")


def test_conversations_are_searched_renamed_deleted_and_brought_back(chat: Chat) -> None:
    for text in ("say about rivers and boats", "say about kings"):
        chat.page.click("#new-chat")
        chat.ask(text)
    chat.page.keyboard.press("Control+k")
    assert chat.focused() == "search"
    chat.page.keyboard.type("BOATS")
    expect(chat.titles).to_have_count(1)
    chat.page.keyboard.press("ArrowDown")
    chat.page.keyboard.press("F2")
    chat.page.keyboard.type("Waters")
    chat.page.keyboard.press("Enter")
    chat.page.fill("#search", "waters")
    expect(chat.titles).to_have_text("Waters")
    chat.titles.first.focus()
    chat.page.keyboard.press("Delete")
    expect(chat.page.locator(".side-note")).to_have_text("Nothing is found.")
    chat.page.fill("#search", "")
    expect(chat.titles).to_have_text(["say about kings"])
    chat.page.locator(".notice").get_by_text("Undo").click()
    expect(chat.titles).to_have_count(2)
    expect(chat.questions).to_have_text("say about rivers and boats")


def test_export_is_read_by_sft_and_import_restores_all_branches(chat: Chat, tmp_path: Path) -> None:
    chat.page.keyboard.press("Escape")
    chat.keys(",")
    chat.page.fill("#system", "Be brief.")
    chat.ask("say one")
    chat.answers.last.get_by_label("Another answer").click()
    chat.complete()
    chat.saved()
    chat.page.click("#export")
    with chat.page.expect_download() as download:
        chat.page.get_by_text("All conversations").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    report = DialogueReport()
    [dialogue] = read_dialogues(file, report)
    assert [(turn.role, turn.content) for turn in dialogue.messages] == [
        ("system", "Be brief."), ("user", "say one"), ("assistant", "one"),
    ]  # fmt: skip
    assert not report.dropped
    lines = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {"rows": []}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken")
    chat.page.set_input_files("#import-file", file)
    expect(chat.titles).to_have_count(2)
    expect(chat.answers.locator(".branches")).to_have_text("2/2")
    expect(chat.page.locator("#system")).to_have_value("Be brief.")
    chat.page.set_input_files("#import-file", tmp_path / "more.jsonl")
    expect(chat.titles).to_have_count(3)
    expect(chat.page.locator(".notice").last).to_contain_text("1 conversation imported. 2 records left out")


def test_parameters_reach_the_model_and_wrong_ones_are_told(chat: Chat) -> None:
    chat.page.click("#settings-open")
    expect(chat.page.locator("#system")).to_be_focused()
    chat.page.fill("#system", "Speak like a sailor.")
    values = {"temperature": "0.3", "top_p": "0.8", "top_k": "40", "max_tokens": "3", "seed": "7"}
    values |= {"presence_penalty": "0.5", "frequency_penalty": "-0.5", "stop": "END\n###"}
    for name, value in values.items():
        chat.page.fill(f"#parameter-{name}", value)
    answer = chat.ask("say a b c d e")
    expect(answer.locator(".body")).to_have_text("a b c")
    expect(answer.locator(".remark")).to_contain_text("reached its greatest length")
    backend = chat.world.backends["early"]
    params = backend.params[-1]
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens, params.seed) == (0.3, 0.8, 40, 3, 7)
    assert (params.presence_penalty, params.frequency_penalty, params.stop) == (0.5, -0.5, ("END", "###"))
    assert "Speak like a sailor." in backend.tokenizer.decode(backend.prompts[-1])
    chat.page.fill("#parameter-temperature", "9")
    expect(chat.page.locator("#parameter-temperature-problem")).to_contain_text("a number from 0 to 2")
    chat.page.fill("#parameter-max_tokens", "")
    chat.ask("say f")
    assert backend.params[-1].temperature == 0.6
    chat.page.click("#parameters-reset")
    expect(chat.page.locator("#parameter-seed")).to_have_value("")


def test_with_a_real_engine(browser: Browser, world: World) -> None:
    checkpoint = world.checkpoint
    engine = Engine(checkpoint.model, checkpoint.tokenizer, max_slots=4)
    backend = EngineBackend("small", engine, checkpoint.tokenizer, checkpoint.chat, {})
    with (
        running(create_app({"small": backend}, ServeConfig())) as site,
        watched_page(browser, site.url) as (page, noticed),
    ):
        page.goto(site.url)
        page.click("#probabilities")
        page.click("#compare")
        page.fill("#composer-text", "the small dog")
        page.keyboard.press("Enter")
        expect(page.locator(".pick")).to_have_count(2)
        assert page.locator(".token").count() > 10
        page.locator(".token").nth(3).hover()
        expect(page.locator("#token-card .row")).to_have_count(6)
        expect(page.locator(".stats").first).to_contain_text("tokens/s")
        assert noticed.nothing(), noticed
