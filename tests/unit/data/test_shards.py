import numpy as np
import pytest

from groundup.base.errors import CorruptFile, UserError
from groundup.data import shards as shards_module
from groundup.data.shards import TokenShards, token_dtype, tokenizer_fingerprint, write_index, write_split
from groundup.text.tokenizer import load_tokenizer

TEXTS = [f"Document number {i}: " + "some words, über straße 漢字. " * (i % 7) for i in range(50)] + [""]


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "models" / "tok512.bin")


@pytest.fixture
def folder(tmp_path, tokenizer):
    infos = write_split(TEXTS, tokenizer, tmp_path / "train", shard_tokens=1000)
    held_out = write_split(TEXTS[:1], tokenizer, tmp_path / "held_out", shard_tokens=1000)
    write_index(tmp_path, tokenizer, {"train": infos, "held_out": held_out})
    return tmp_path


def test_shards_hold_every_document_between_bos_and_eos(folder, tokenizer):
    shards = TokenShards(folder, "train", tokenizer)
    expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    flat = [token for document in expected for token in document]
    assert len(shards.shards) > 3
    assert shards.num_tokens == len(flat)
    assert shards.num_documents == len(TEXTS)
    assert shards.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards.read(0, len(flat) + 10).tolist() == flat
    ids = [i for i, document in enumerate(expected) for _ in document]
    assert shards.document_ids(0, len(flat) + 10).tolist() == ids
    for start, stop in [(0, 1), (999, 1203), (len(flat) - 3, len(flat) + 3), (1500, 1500)]:
        assert shards.read(start, stop).tolist() == flat[start:stop]
        assert shards.document_ids(start, stop).tolist() == ids[start:stop]
    assert TokenShards(folder, "held_out").num_documents == 1


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_files(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards_module, "_BLOCK_CHARACTERS", 100)
    whole = write_split(TEXTS, tokenizer, tmp_path / "whole", shard_tokens=500)

    def dying_texts():
        yield from TEXTS[:33]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(dying_texts(), tokenizer, tmp_path / "killed", shard_tokens=500)
    done_before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.npy")}
    assert 0 < len(done_before) < 2 * len(whole)
    assert write_split(TEXTS, tokenizer, tmp_path / "killed", shard_tokens=500) == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    for name, modified in done_before.items():
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == modified, f"{name} was written twice"


def test_types_follow_the_vocabulary():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("part", ["tokens", "offsets"])
def test_a_truncated_shard_is_named(folder, tokenizer, part):
    path = folder / "train" / f"0001.{part}.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptFile, match=rf"0001\.{part}\.npy: truncated"):
        TokenShards(folder, "train", tokenizer)


def test_a_missing_or_other_shard_is_named(folder):
    path = folder / "train" / "0002.tokens.npy"
    np.save(path, np.zeros(3, dtype=np.uint16))
    with pytest.raises(CorruptFile, match=r"0002\.tokens\.npy: uint16 of shape \(3,\), but index.json says"):
        TokenShards(folder, "train")
    path.unlink()
    with pytest.raises(CorruptFile, match=r"0002\.tokens\.npy: missing"):
        TokenShards(folder, "train")


def test_a_pickle_in_place_of_a_shard_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (ran.write_text, ("",))

    np.save(folder / "train" / "0000.tokens.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFile):
        TokenShards(folder, "train")
    assert not ran.exists()


def test_a_token_beyond_the_vocabulary_is_named_when_read(folder):
    path = folder / "train" / "0001.tokens.npy"
    array = np.load(path)
    array[5] = 60_000
    np.save(path, array)
    shards = TokenShards(folder, "train")
    with pytest.raises(CorruptFile, match=r"0001\.tokens\.npy: token id 60000"):
        shards.read(0, shards.num_tokens)


def test_a_bad_index_is_named(folder):
    (folder / "index.json").write_text('{"splits": []}')
    with pytest.raises(CorruptFile, match=r"index\.json"):
        TokenShards(folder)
    (folder / "index.json").write_text('{"splits"')
    with pytest.raises(UserError, match=r"index\.json"):
        TokenShards(folder)


def test_another_tokenizer_is_refused(folder, shared_data, tokenizer):
    llama = load_tokenizer(shared_data / "models" / "llama2-tokenizer.model")
    with pytest.raises(UserError, match="vocabulary of 512, but the tokenizer has 32000"):
        TokenShards(folder, "train", llama)
    index = folder / "index.json"
    index.write_text(index.read_text().replace(tokenizer_fingerprint(tokenizer), "0" * 64))
    with pytest.raises(UserError, match="another tokenizer of the same size"):
        TokenShards(folder, "train", tokenizer)


def test_the_fingerprint_is_that_of_what_the_tokenizer_does(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    from_json = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer_fingerprint(from_json) == tokenizer_fingerprint(tokenizer)


def test_an_unknown_split_is_named(folder):
    with pytest.raises(UserError, match="no split 'test'; it has held_out, train"):
        TokenShards(folder, "test")
