"""Training, loading, saving and decoding; parity with other libraries is in tests/parity."""

import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.base.errors import CorruptFile, UserError
from groundup.text import bulk
from groundup.text import sentencepiece_model as spm
from groundup.text.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_gguf_fields,
    train_tokenizer,
)

LETTERS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581\0"), max_size=40)


def test_trained_with_llama2_settings(sentencepiece_folder: Path) -> None:
    proto = spm.ModelProto.FromString((sentencepiece_folder / "tokenizer.model").read_bytes())
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert [piece.piece for piece in proto.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert len(proto.pieces) == 480
    assert spec.byte_fallback
    assert spec.split_digits
    assert spec.allow_whitespace_only_pieces
    assert (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id) == (0, 1, 2, -1)
    assert spec.character_coverage == pytest.approx(0.99995)
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert normalizer.add_dummy_prefix
    assert not normalizer.remove_extra_whitespaces
    pieces = {piece.piece for piece in proto.pieces}
    assert set(map(chr, range(0x21, 0x7F))) <= pieces
    assert not any(len(piece) > 1 and any(map(str.isdigit, piece)) for piece in pieces if not piece.startswith("<0x"))


def test_training_is_deterministic_and_leaves_only_its_files(
    small_corpus: list[str], sentencepiece_folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(iter(small_corpus), 480, tmp_path, seed=0)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (sentencepiece_folder / name).read_bytes(), name


def test_long_lines_and_reserved_characters_are_not_dropped(tmp_path: Path) -> None:
    # The trainer refuses words of 65,536 characters, and drops long lines and lines with NUL or U+2585.
    texts = ["zebra " * 30_000, "q" * 70_000, "walrus\u2585walrus\0walrus " * 50]
    tokenizer = train_tokenizer(texts, 385, tmp_path, seed=0)
    for word in ("zebra", "walrus", "q" * 8):
        assert len(tokenizer.encode(word)) <= 2, word


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "\0"]])
def test_empty_corpus(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text"):
        train_tokenizer(texts, 400, tmp_path, seed=0)


def test_vocabulary_that_the_corpus_does_not_support(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5000: this corpus supports at most (\d+) pieces") as caught:
        train_tokenizer(["hello world"], 5000, tmp_path, seed=0)
    largest = int(caught.value.message.split("at most ")[1].split()[0])
    assert train_tokenizer(["hello world"], largest, tmp_path, seed=0).vocab_size == largest
    with pytest.raises(UserError, match="need 354"):
        train_tokenizer(["hello world"], 300, tmp_path, seed=0)


@settings(deadline=None)
@given(text=LETTERS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(data=st.data())
def test_stream_equals_decode_whatever_the_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Ids beyond the vocabulary are padding rows of the embedding.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    decoder = tokenizer.stream_decoder()
    parts = [decoder.push(token_id) for token_id in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


def test_stream_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    text = "a😀日👨‍👩b"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "the characters must span tokens for this test to say anything"
    decoder = tokenizer.stream_decoder()
    parts = [decoder.push(token_id) for token_id in ids]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert decoder.flush() == ""


def test_stream_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    text = "".join(map(decoder.push, tokenizer.encode("x\u65e5")[:-1]))
    assert (text, decoder.flush(), decoder.flush()) == ("x", "\ufffd", "")


def test_control_ids_are_silent_and_do_not_use_up_the_leading_space(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("hello there"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hello there"


HOSTILE = [
    "</s>", "<s>", "a</s>b", "<unk>", "<0x0A>", "<s>[INST]", "</s ></s>",
    "<|im_end|>", " <|im_start|>system", "<|endoftext|>\n",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    control = set(tokenizer.control_tokens.values())
    for ids in (tokenizer.encode(text), tokenizer.encode_many([text])[0].tolist()):
        assert not control & set(ids)
        assert tokenizer.decode(ids) == text


def test_bulk_encoder_is_refused_where_it_would_make_control_tokens(tmp_path: Path) -> None:
    # A vocabulary without "<": the fast library then takes the text "</s>" for the token (fastokens 0.3.5).
    kinds = [spm.UNKNOWN, spm.CONTROL, spm.CONTROL, *[spm.BYTE] * 256]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [spm.Piece(name, 0.0, kind) for name, kind in zip(names, kinds)]
    pieces += [spm.Piece("ab", -1.0, spm.NORMAL), *(spm.Piece(c, -2.0, spm.NORMAL) for c in "\u2581ab")]
    tokenizer = SentencePieceTokenizer(spm.build_model(pieces, unk_id=0, bos_id=1, eos_id=2))
    assert tokenizer._bulk is None
    assert tokenizer.encode_many(["ab</s>"])[0].tolist() == tokenizer.encode("ab</s>")
    assert tokenizer.eos_id not in tokenizer.encode("ab</s>")


def test_encode_many(tokenizer: Tokenizer, small_corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*small_corpus, *HOSTILE, "", "\ud800 lone"]
    expected = [tokenizer.encode(text) for text in texts]
    fast = tokenizer.encode_many(texts)
    assert [row.tolist() for row in fast] == expected
    assert {str(row.dtype) for row in fast} == {"int32"}
    monkeypatch.setattr(bulk, "fastokens", None)  # a machine without the library
    plain = pickle.loads(pickle.dumps(tokenizer))
    assert plain._bulk is None
    assert [row.tolist() for row in plain.encode_many(texts)] == expected
    assert tokenizer.encode_many([]) == []


def test_lone_surrogates_count_as_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")


def test_pickles_and_serves_threads(tokenizer: Tokenizer, small_corpus: list[str]) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    expected = [tokenizer.encode(text) for text in small_corpus]
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(lambda _: [row.tolist() for row in copy.encode_many(small_corpus)], range(8)):
            assert rows == expected


def test_save_and_load(tokenizer: Tokenizer, small_corpus: list[str], tmp_path: Path) -> None:
    tokenizer.save(tmp_path, "{{ messages }}")
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "control_tokens"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert [loaded.encode(text) for text in small_corpus] == [tokenizer.encode(text) for text in small_corpus]
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_json_of_sentencepiece_loads_alone(sentencepiece_folder: Path, small_corpus: list[str], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((sentencepiece_folder / name).read_bytes())
    reference, loaded = load_tokenizer(sentencepiece_folder), load_tokenizer(tmp_path)
    assert isinstance(loaded, JsonTokenizer)
    for text in [*small_corpus, " lead", "", "\U0001f600"]:
        assert loaded.encode(text) == reference.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_tokens_added_after_training_are_kept(sentencepiece_folder: Path, tmp_path: Path) -> None:
    for path in sentencepiece_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["added_tokens"].append(value["added_tokens"][2] | {"id": 480, "content": "<|end|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 481
    assert loaded.control_tokens["<|end|>"] == 480
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 480}')
    with pytest.raises(UserError, match="added_tokens"):
        load_tokenizer(tmp_path)


def test_gguf_fields_round_trip(tokenizer: Tokenizer, small_corpus: list[str]) -> None:
    fields = tokenizer.gguf_fields()
    loaded = tokenizer_from_gguf_fields(fields)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert loaded.control_tokens == tokenizer.control_tokens
    for text in [*small_corpus, *HOSTILE]:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.gguf_fields() == fields


def test_gguf_mistakes(chatml: Tokenizer, sentencepiece_folder: Path) -> None:
    fields = chatml.gguf_fields()
    with pytest.raises(UserError, match="pre-tokenizer 'qwen2' is not known"):
        tokenizer_from_gguf_fields(fields | {"tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(UserError, match="kind 'bert'"):
        tokenizer_from_gguf_fields(fields | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(CorruptFile, match="no tokenizer.ggml.merges"):
        tokenizer_from_gguf_fields({key: value for key, value in fields.items() if not key.endswith("merges")})
    fields = load_tokenizer(sentencepiece_folder).gguf_fields()
    with pytest.raises(CorruptFile, match="479 scores"):
        tokenizer_from_gguf_fields(fields | {"tokenizer.ggml.scores": fields["tokenizer.ggml.scores"][1:]})
    with pytest.raises(CorruptFile, match="BOS 480"):
        tokenizer_from_gguf_fields(fields | {"tokenizer.ggml.bos_token_id": 480})


def test_files_that_are_no_tokenizers(sentencepiece_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing.model")
    model = tmp_path / "x.model"
    model.write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes()[:-7])
    with pytest.raises(CorruptFile, match="x.model"):
        load_tokenizer(model)
    model.write_bytes(b"")
    with pytest.raises(CorruptFile, match="without pieces"):
        load_tokenizer(model)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no eos_token"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    with pytest.raises(CorruptFile, match="not a tokenizers file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes((sentencepiece_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match="'<end>' is not one of"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_unigram_model_is_refused(small_corpus: list[str], tmp_path: Path) -> None:
    lines = [word for text in small_corpus for word in text.split()] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "u"),
        vocab_size=70,
        model_type="unigram",
        minloglevel=2,
    )
    with pytest.raises(UserError, match="not BPE"):
        load_tokenizer(tmp_path / "u.model")


def test_llama2c_file(sentencepiece_folder: Path, small_corpus: list[str], tmp_path: Path) -> None:
    reference = load_tokenizer(sentencepiece_folder)
    assert isinstance(reference, SentencePieceTokenizer)
    data = struct.pack("<i", 16)
    for index, piece in enumerate(reference._proto.pieces):
        shown = f"\n{piece.piece}\n" if index in (1, 2) else piece.piece.replace("\u2581", " ")
        data += struct.pack("<fi", piece.score, len(shown.encode())) + shown.encode()
    path = tmp_path / "tok480.bin"
    path.write_bytes(data)
    loaded = load_tokenizer(path)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (480, 1, 2)
    for text in [*small_corpus, *HOSTILE]:
        assert loaded.encode(text) == reference.encode(text)
    for damage in (data[:-3], data[:2000], b"\x00" * 64):
        path.write_bytes(damage)
        with pytest.raises(CorruptFile, match="tok480.bin"):
            load_tokenizer(path)
