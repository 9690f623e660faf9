"""Dialogues to token ids: the one place that knows `[INST]`. Training, evaluation and serving share these objects.

A chat format puts the frame around the messages by id; what a message says is only ever text.
"""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, Protocol

from groundup.base.errors import UserError
from groundup.base.files import read_json
from groundup.base.records import Dialogue, Message
from groundup.text.templates import render_template
from groundup.text.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, Tokenizer

OnTag = Literal["refuse", "neutralise"]

LLAMA2_TEMPLATE = files("groundup.text").joinpath("llama2.jinja").read_text(encoding="utf-8")
_TAG = re.compile(r"\[/?INST\]|<</?SYS>>|</?s>")


class ChatFormat(Protocol):
    """How a dialogue becomes ids.

    `on_tag` says what happens to text that looks like part of Llama 2's frame: an error, or a space put into it.
    """

    name: str
    stop_ids: tuple[int, ...]
    """The ids that end a response."""
    template: str
    """The same format in Jinja, for other programs."""

    def encode_prompt(self, messages: Sequence[Message], on_tag: OnTag = "refuse") -> list[int]:
        """Ids up to where the assistant begins; the last message is the user's."""
        ...

    def encode_dialogue(self, dialogue: Dialogue, on_tag: OnTag = "refuse") -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether it is a target: responses and the token that ends them. The last message is the
        assistant's."""
        ...


class Llama2Chat:
    """Llama 2's format: every exchange is BOS, `[INST] user [/INST] answer ` and EOS, the system text inside the first.

    Source: the paper says only that a special token separates prompt and answer (section 3.1); this is the format of
    the released models.
    Choice: the space after an answer is a target like the answer, because it stands between the answer and its EOS: a
    model not trained to write it would not reach EOS.
    """

    name = "llama2"
    stop_ids: tuple[int, ...]
    template = LLAMA2_TEMPLATE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = (tokenizer.eos_id,)

    def encode_prompt(self, messages: Sequence[Message], on_tag: OnTag = "refuse") -> list[int]:
        users, answers = _exchanges(messages, "user", on_tag)
        ids = [token for user, answer in zip(users, answers) for token in self._exchange(user, answer)[0]]
        return ids + self._prompt(users[-1])

    def encode_dialogue(self, dialogue: Dialogue, on_tag: OnTag = "refuse") -> tuple[list[int], list[bool]]:
        users, answers = _exchanges(dialogue.messages, "assistant", on_tag)
        ids: list[int] = []
        is_target: list[bool] = []
        for user, answer in zip(users, answers, strict=True):
            exchange, prompt_length = self._exchange(user, answer)
            ids += exchange
            is_target += [False] * prompt_length + [True] * (len(exchange) - prompt_length)
        return ids, is_target

    def _prompt(self, user: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(f"[INST] {user} [/INST]")]

    def _exchange(self, user: str, answer: str) -> tuple[list[int], int]:
        """Ids of a finished exchange, and how many of them are the prompt's."""
        prompt = self._prompt(user)
        ids = [
            self._tokenizer.bos_id,
            *self._tokenizer.encode(f"[INST] {user} [/INST] {answer} "),
            self._tokenizer.eos_id,
        ]
        if ids[: len(prompt)] != prompt:
            raise UserError(
                "in this vocabulary a token spans the end of [/INST], so Llama 2's chat format cannot be used"
            )
        return ids, len(prompt)


def _exchanges(messages: Sequence[Message], last: str, on_tag: OnTag) -> tuple[list[str], list[str]]:
    """The users' and the assistant's texts, stripped as Meta's code does; the system text is in the first user's."""
    check_roles(messages, last)
    contents = [_guard(message.content, position, on_tag) for position, message in enumerate(messages, 1)]
    if messages[0].role == "system":
        system, user, *contents = contents
        contents.insert(0, f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}")
    contents = [content.strip() for content in contents]
    return contents[::2], contents[1::2]


def _guard(content: str, position: int, on_tag: OnTag) -> str:
    """A message that holds none of the format's tags.

    Choice: neutralising puts a space behind a tag's first character: `[ INST]`, `< </SYS>>`, `< /s>`.
    """
    if on_tag == "neutralise":
        return _TAG.sub(lambda tag: f"{tag[0][0]} {tag[0][1:]}", content)
    if tag := _TAG.search(content):
        raise UserError(
            f"message {position} contains {tag[0]!r}, which belongs to the chat format",
            "remove it, or for training data have such tags neutralised",
        )
    return content


def check_roles(messages: Sequence[Message], last: str) -> None:
    """An optional system message, then user and assistant in turn, ending with the role `last`; else a UserError."""
    first = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages[first:], first):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if message.role != expected:
            raise UserError(
                f"message {index + 1} is from {message.role!r}; {expected!r} was expected",
                "after an optional system message, user and assistant take turns",
            )
    if len(messages) == first or messages[-1].role != last:
        raise UserError(f"the last of the {len(messages)} messages must be from {last!r}")


class TemplateChat:
    """The format that a model's own Jinja template describes, such as ChatML.

    Why: in a rendered template, a control token's name in a message looks the same as one of the frame. So the
    characters that start and end such names are replaced in the messages before rendering, by characters that no
    message has, and put back before the pieces between the frame's control tokens are encoded as plain text.
    """

    name = "template"
    stop_ids: tuple[int, ...]

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.template = template
        self._tokenizer = tokenizer
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._edges = sorted({edge for name in names for edge in (name[0], name[-1])})
        by_id = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
        self._special = {"bos_token": by_id[tokenizer.bos_id], "eos_token": by_id[tokenizer.eos_id]}
        self._end = self._end_of_response()
        end_id = tokenizer.control_tokens.get(self._end, tokenizer.eos_id)
        self.stop_ids = tuple(dict.fromkeys((end_id, tokenizer.eos_id)))

    def encode_prompt(self, messages: Sequence[Message], on_tag: OnTag = "refuse") -> list[int]:
        check_roles(messages, "user")
        return self._encode(messages)[0]

    def encode_dialogue(self, dialogue: Dialogue, on_tag: OnTag = "refuse") -> tuple[list[int], list[bool]]:
        check_roles(dialogue.messages, "assistant")
        return self._encode(dialogue.messages)

    def _end_of_response(self) -> str:
        """The control token that this template puts after a response; empty when there is none."""
        probe = [Message("user", "question"), Message("assistant", "answer")]
        response = _after(self._render(probe, prompt=False), self._render(probe[:1], prompt=True))
        found = self._control.search(response.rpartition("answer")[2])
        return found[0] if found else ""

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return render_template(self.template, turns, add_generation_prompt=prompt, special=self._special)

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        hide, show = self._disguise(messages)
        hidden = [Message(message.role, message.content.translate(hide)) for message in messages]
        writer = _IdWriter(self._tokenizer, self._control, show)
        written = ""
        for index, message in enumerate(hidden, 1):
            if message.role == "user":
                head = self._render(hidden[:index], prompt=True)
                writer.add(_after(head, written), is_target=False)
                written = head
            elif message.role == "assistant":
                response = _after(self._render(hidden[:index], prompt=False), written)
                # What follows the token that ends the response (ChatML's line break) is no part of it.
                end = response.rindex(self._end) + len(self._end) if self._end in response else len(response)
                writer.add(response[:end], is_target=True)
                writer.add(response[end:], is_target=False)
                written += response
        return writer.ids, writer.is_target

    def _disguise(self, messages: Sequence[Message]) -> tuple[dict[int, str], dict[int, str]]:
        """Tables for `str.translate` that hide the edges of control names behind unused characters, and back."""
        used = {character for message in messages for character in message.content}
        free = (character for character in map(chr, range(0xF0000, 0xFFFFE)) if character not in used)
        pairs = list(zip(self._edges, free))
        return {ord(edge): sign for edge, sign in pairs}, {ord(sign): edge for edge, sign in pairs}


class _IdWriter:
    """Collects the ids of a rendered template: its control tokens by id, all else as plain text."""

    def __init__(self, tokenizer: Tokenizer, control: re.Pattern[str], show: dict[int, str]) -> None:
        self.ids: list[int] = []
        self.is_target: list[bool] = []
        self._tokenizer, self._control, self._show = tokenizer, control, show
        self._open = ""  # the plain text since the last control token

    def add(self, text: str, is_target: bool) -> None:
        """Append the ids of a further stretch of the rendered text."""
        before = len(self.ids)
        for part in self._control.split(text):
            control_id = self._tokenizer.control_tokens.get(part)
            if control_id is not None:
                self.ids.append(control_id)
                self._open = ""
            elif part:
                self._add_plain(part.translate(self._show))
        self.is_target += [is_target] * (len(self.ids) - before)

    def _add_plain(self, text: str) -> None:
        """Append text that continues the open stretch.

        Choice: where a token would span the border between prompt and response, the response is encoded on its own,
        because that border is where a served model starts to write.
        """
        encode = self._tokenizer.encode
        head = encode(self._open) if self._open else []
        joined = encode(self._open + text)
        self.ids += joined[len(head) :] if joined[: len(head)] == head else encode(text)
        self._open += text


def _after(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise UserError(
            "this chat template rewrites earlier turns when one is added, so that responses cannot be told apart",
            "replace chat_template.jinja by a template that only appends",
        )
    return longer[len(shorter) :]


def chat_format_from_template(template: str | None, tokenizer: Tokenizer) -> ChatFormat:
    """The format of a model whose files carry this template.

    Choice: no template means Llama 2's format. A template that writes Llama 2's text for some sample dialogues is that
    format whatever its wording, so that such models get the check for tags in messages.
    """
    if template is None or template == LLAMA2_TEMPLATE:
        return Llama2Chat(tokenizer)
    chat = TemplateChat(tokenizer, template)
    return Llama2Chat(tokenizer) if _writes_llama2(template) else chat


def load_chat_format(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model folder."""
    file = folder / CHAT_TEMPLATE
    if file.exists():
        return chat_format_from_template(file.read_text(encoding="utf-8"), tokenizer)
    config_file = folder / TOKENIZER_CONFIG
    template = read_json(config_file).get("chat_template") if config_file.exists() else None
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return chat_format_from_template(template, tokenizer)


def _writes_llama2(template: str) -> bool:
    turns = [
        {"role": role, "content": f" {role} text "} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for sample in (turns[:2], turns[1:4], turns):
        expected = render_template(LLAMA2_TEMPLATE, sample, add_generation_prompt=False, special=special)
        try:
            if render_template(template, sample, add_generation_prompt=False, special=special) != expected:
                return False
        except UserError:  # it refuses what Llama 2's format takes
            return False
    return True
