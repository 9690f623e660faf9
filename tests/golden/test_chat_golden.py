"""Ids that Meta's own tokenizer file and reference code give."""

from pathlib import Path

import pytest

from groundup.base.records import Dialogue, Message
from groundup.text.chat import Llama2Chat
from groundup.text.tokenizer import Tokenizer, load_tokenizer

INST, END_INST = [518, 25580, 29962], [518, 29914, 25580, 29962]
SYSTEM, END_SYSTEM = [3532, 14816, 29903, 6778, 13], [13, 29966, 829, 14816, 29903, 6778, 13, 13]


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "models" / "llama2-tokenizer.model")


def test_vocabulary(llama2: Tokenizer) -> None:
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (32_000, 1, 2, None)
    assert llama2.encode("1234567") == [29871, 29896, 29906, 29941, 29946, 29945, 29953, 29955]
    assert llama2.encode("\n") == [29871, 13]
    assert (llama2.encode(" "), llama2.encode("")) == ([259], [])
    assert [llama2.token_bytes(byte + 3) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("tag", ["<s>", "</s>", "<unk>"])
def test_control_strings_are_text(llama2: Tokenizer, tag: str) -> None:
    assert not {0, 1, 2} & set(llama2.encode(tag))


def test_prompt_with_system(llama2: Tokenizer) -> None:
    ids = Llama2Chat(llama2).encode_prompt([Message("system", "sysinfo"), Message("user", "Hello")])
    assert ids == [1, *INST, *SYSTEM, 9675, 3888, *END_SYSTEM, 10994, *END_INST]


def test_prompt_without_system(llama2: Tokenizer) -> None:
    assert Llama2Chat(llama2).encode_prompt([Message("user", "Hello")]) == [1, *INST, 15043, *END_INST]


def test_finished_exchanges(llama2: Tokenizer) -> None:
    chat = Llama2Chat(llama2)
    turns = [Message("user", " Hello\n"), Message("assistant", " Hello "), Message("user", "Hello")]
    first = [1, *INST, 15043, *END_INST, 15043, 29871, 2]
    assert chat.encode_prompt(turns) == [*first, 1, *INST, 15043, *END_INST]
    ids, is_target = chat.encode_dialogue(Dialogue(tuple(turns[:2])))
    assert ids == first
    assert is_target == [False] * 9 + [True] * 3


def test_llama2c_tokenizer_is_the_one_of_the_story_model(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "models" / "tok512.bin")
    assert tokenizer.vocab_size == 512
    text = "Once upon a time, there was a little girl named Lily."
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode(text)) == text
