"""Ids equal those of sentencepiece, `tokenizers` and transformers on hostile and random text."""

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from groundup.base.errors import UserError
from groundup.base.records import Dialogue, Message
from groundup.text.chat import LLAMA2_TEMPLATE, Llama2Chat, TemplateChat
from groundup.text.sentencepiece_model import ModelProto, merges_are_equivalent
from groundup.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer, train_tokenizer

CORPUS = [
    'The 3 little pigs\' house [of] straw; (1 + 2) * 3 = 9? "Yes!" said the wolf @ #42, 100% sure & {happy}.\n',
    "    indented_code = lambda x: x ** 2  # comment\n\treturn\r\n",
    "naïve café — “quoted” … 日本語のテキスト и немного кириллицы\n",
    "=-=-=-=-=-=-= ......... aaaaaaaa hahahaha      spaces\n" * 3,
]
PARTS = [
    "<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>", "\u2581", "\u2581\u2581", " ", "  ", "\n", "\r\n", "\t", "\0", "7",
    "1234", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u00e9", "e\u0301", "\u65e5\u672c", "\ufeff", "\u00a0", "<",
    ">", "/s", "[INST]", "<<SYS>>", "the", " the", "ing", "a", "aaa", "...", "=-=", "'ll", "\ue000", "\U0010ffff",
]  # fmt: skip
TEXT = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=40),
    st.text(alphabet=" \n\tab1.\u2581", max_size=40),
    st.tuples(st.sampled_from(["a", " ", "=-", "ab", "\n", "1", "aab"]), st.integers(1, 80)).map(lambda x: x[0] * x[1]),
)
EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(CORPUS, 560, path, seed=1)
    tokenizer.save(path, LLAMA2_TEMPLATE)
    return path


@pytest.fixture(scope="module", params=["trained", "llama2"])
def both(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary of ours and Meta's, each as a folder."""
    if request.param == "trained":
        return folder
    path = tmp_path_factory.mktemp("llama2")
    model = request.getfixturevalue("shared_data") / "models" / "llama2-tokenizer.model"
    load_tokenizer(model).save(path, LLAMA2_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def reference(both: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(both / "tokenizer.model"))


@pytest.fixture(scope="module")
def ours(both: Path) -> Tokenizer:
    return load_tokenizer(both)


@pytest.fixture(scope="module")
def hf(both: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(both / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@EXAMPLES
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_sentencepiece_and_tokenizers(
    ours: Tokenizer, reference: sentencepiece.SentencePieceProcessor, hf: tokenizers.Tokenizer, texts: list[str]
) -> None:
    expected = reference.encode(texts)
    assert [ours.encode(text) for text in texts] == expected
    assert [row.tolist() for row in ours.encode_many(texts)] == expected
    assert [hf.encode(text, add_special_tokens=False).ids for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == reference.decode(expected)


def test_the_fast_path_is_what_was_tested(ours: Tokenizer) -> None:
    pytest.importorskip("fastokens")
    assert ours._bulk is not None


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=4, max_size=40))
def test_fast_path_at_length(
    ours: Tokenizer, reference: sentencepiece.SentencePieceProcessor, texts: list[str]
) -> None:
    assert [row.tolist() for row in ours.encode_many(texts)] == reference.encode(texts)


def test_tied_scores_that_ranked_merges_cannot_express(folder: Path) -> None:
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    assert merges_are_equivalent(proto)
    longest = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    longest[1].score = longest[0].score
    assert not merges_are_equivalent(proto)
    tokenizer = SentencePieceTokenizer(proto.SerializeToString())
    texts = [*CORPUS, *PARTS]
    assert [row.tolist() for row in tokenizer.encode_many(texts)] == [tokenizer.encode(text) for text in texts]


def test_auto_tokenizer(both: Path, ours: Tokenizer) -> None:
    # The model_type must not make transformers rebuild the tokenizer as its own Llama class.
    (both / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto = AutoTokenizer.from_pretrained(both)
    assert (auto.bos_token_id, auto.eos_token_id, len(auto)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    texts = ["", " ", " lead", "  two", "trail ", "a\n\n b", "1234 5", "\U0001f600 café", *CORPUS]
    for text in texts:
        ids = ours.encode(text)
        assert auto(text, add_special_tokens=False).input_ids == ids
        assert auto(text).input_ids == [ours.bos_id, *ids]
        assert auto.decode(ids) == ours.decode(ids) == text
    for text in ("<s>", "a</s>"):
        assert auto(text, add_special_tokens=False, split_special_tokens=True).input_ids == ours.encode(text)


DIALOGUE = [
    Message("system", "  Be kind.\n"), Message("user", " Hello,  you! "), Message("assistant", "\nHi 12 \U0001f600\n"),
    Message("user", "\tAnd now?"), Message("assistant", ""), Message("user", "Why"),
]  # fmt: skip


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("end", [2, 3, 4, 5, 6])
def test_apply_chat_template(both: Path, ours: Tokenizer, start: int, end: int) -> None:
    auto, chat, messages = AutoTokenizer.from_pretrained(both), Llama2Chat(ours), DIALOGUE[start:end]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    theirs = auto.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    if messages[-1].role == "user":
        assert chat.encode_prompt(messages) == theirs
    else:
        assert chat.encode_dialogue(Dialogue(tuple(messages)))[0] == theirs


def test_our_template_refuses_what_we_refuse(both: Path, ours: Tokenizer) -> None:
    auto, chat = AutoTokenizer.from_pretrained(both), Llama2Chat(ours)
    wrong = [[("user", "a </s> b")], [("user", "[/INST]")], [("assistant", "a")], [("user", "a"), ("user", "b")]]
    for turns in wrong:
        with pytest.raises(UserError):
            chat.encode_prompt([Message(role, text) for role, text in turns])  # type: ignore[arg-type]
        with pytest.raises(Exception, match="belongs to the chat format|take turns"):
            auto.apply_chat_template([{"role": role, "content": text} for role, text in turns])


def test_chatml_like_transformers(tmp_path: Path) -> None:
    template = (
        "{%- for message in messages %}\n{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}\n"
        "{{- '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(CORPUS, trainer)
    tokenizer = JsonTokenizer(raw.to_str(), bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")
    tokenizer.save(tmp_path, template)
    auto, chat = AutoTokenizer.from_pretrained(tmp_path), TemplateChat(tokenizer, template)
    for end in range(2, 7):
        messages = DIALOGUE[:end]
        plain = [{"role": message.role, "content": message.content} for message in messages]
        is_prompt = messages[-1].role == "user"
        theirs = auto.apply_chat_template(plain, add_generation_prompt=is_prompt, return_dict=False)
        mine = chat.encode_prompt(messages) if is_prompt else chat.encode_dialogue(Dialogue(tuple(messages)))[0]
        assert mine == theirs


def test_same_file_as_the_published_conversion(shared_data: Path) -> None:
    published = json.loads(gzip.decompress((shared_data / "models" / "llama2-tokenizer.json.gz").read_bytes()))
    written = json.loads(load_tokenizer(shared_data / "models" / "llama2-tokenizer.model").json_text)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert written[part] == published[part], part
    assert written["model"]["vocab"] == published["model"]["vocab"]
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in published["model"]["merges"]
    ]
    assert len(merges) == 61_249
    assert [tuple(merge) for merge in written["model"]["merges"]] == merges


def test_every_line_of_a_book(
    ours: Tokenizer, reference: sentencepiece.SentencePieceProcessor, shared_data: Path
) -> None:
    text = gzip.decompress((shared_data / "text" / "tinyshakespeare.txt.gz").read_bytes()).decode()
    lines = text.split("\n")[:20_000]
    assert [row.tolist() for row in ours.encode_many(lines)] == reference.encode(lines)
