import gzip
import json
import random

import pytest
import zstandard

from groundup.base.artifacts import new_artifact, open_artifact
from groundup.base.config import parse_config
from groundup.base.errors import UserError
from groundup.data.shards import TokenShards
from groundup.stages import shards as shards_stage
from groundup.stages import tokenizer as tokenizer_stage
from groundup.stages.job import Job
from groundup.stages.shards import ShardsConfig
from groundup.stages.tokenizer import TokenizerConfig
from groundup.text.tokenizer import load_tokenizer

TEXT = "once upon a time there was little girl who had cat and dog they played in the park"
WORDS = TEXT.split()


def make_corpus(path, train, held_out):
    characters = {"train": sum(map(len, train)), "held_out": sum(map(len, held_out))}
    manifest = {"kind": "corpus", "metrics": {split: {"characters": n} for split, n in characters.items()}}
    with new_artifact(path, manifest) as folder:
        for name, texts in (("train", train), ("held_out", held_out)):
            rows = [{"text": text, "id": str(i), "source": "s", "metadata": {}} for i, text in enumerate(texts)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return open_artifact(path)


def run_stage(module, config, inputs, tmp_path, name):
    work = tmp_path / f".{name}-work"
    work.mkdir(exist_ok=True)
    with new_artifact(tmp_path / name, {"kind": name}) as out:
        metrics = module.run(config, Job(name, 1, inputs, out, work))
    return open_artifact(tmp_path / name, verify=True), metrics


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 200))) + f" {i}." for i in range(300)]


@pytest.fixture
def corpus(tmp_path, texts):
    return make_corpus(tmp_path / "corpus", texts[:280], texts[280:])


def test_a_corpus_becomes_a_tokenizer_and_shards_that_decode_to_it(tmp_path, corpus, texts):
    tokenizer_artifact, metrics = run_stage(
        tokenizer_stage, TokenizerConfig(vocab_size=400), {"corpus": corpus}, tmp_path, "tokenizer"
    )
    assert metrics["vocab_size"] == 400
    assert 2 < metrics["bytes_per_token"] < 10
    inputs = {"corpus": corpus, "tokenizer": tokenizer_artifact}
    artifact, metrics = run_stage(shards_stage, ShardsConfig(shard_tokens=5000), inputs, tmp_path, "shards")
    tokenizer = load_tokenizer(tokenizer_artifact.path)
    for split, expected in (("train", texts[:280]), ("held_out", texts[280:])):
        shards = TokenShards(artifact.path, split, tokenizer)
        documents = {}
        tokens, ids = shards.read(0, 10**9).tolist(), shards.document_ids(0, 10**9).tolist()
        for token, number in zip(tokens, ids, strict=True):
            documents.setdefault(number, []).append(token)
        assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in documents.values())
        assert [tokenizer.decode(document) for document in documents.values()] == expected
        assert metrics[split] == {
            "documents": len(expected), "tokens": len(tokens), "text_bytes": sum(len(t.encode()) for t in expected),
        }  # fmt: skip
    assert len(TokenShards(artifact.path, "train").shards) > 1
    assert metrics["tokens"] == metrics["train"]["tokens"] + metrics["held_out"]["tokens"]
    names = {path.name for path in (artifact.path / "train").iterdir()}
    assert all(name.endswith((".tokens.npy", ".offsets.npy")) for name in names)


def test_a_killed_shards_stage_ends_with_the_same_artifact(tmp_path, corpus, shared_data, monkeypatch):
    with new_artifact(tmp_path / "tokenizer", {"kind": "tokenizer"}) as folder:
        load_tokenizer(shared_data / "models" / "tok512.bin").save(folder)
    inputs = {"corpus": corpus, "tokenizer": open_artifact(tmp_path / "tokenizer")}
    config = ShardsConfig(shard_tokens=4000)
    whole, _ = run_stage(shards_stage, config, inputs, tmp_path, "whole")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards_stage, "write_index", die)
        with pytest.raises(KeyboardInterrupt):
            run_stage(shards_stage, config, inputs, tmp_path, "again")
    assert not (tmp_path / "again").exists()
    (tmp_path / ".again-work" / "train" / "0002.json").unlink()
    again, _ = run_stage(shards_stage, config, inputs, tmp_path, "again")
    assert again.id == whole.id


def test_an_existing_tokenizer_is_taken_over(tmp_path, corpus, shared_data):
    source = shared_data / "models" / "llama2-tokenizer.model"
    config = TokenizerConfig(source=source)
    assert tokenizer_stage.raw_inputs(config) == [source]
    artifact, metrics = run_stage(tokenizer_stage, config, {"corpus": corpus}, tmp_path, "tokenizer")
    assert metrics["vocab_size"] == 32_000
    assert (artifact.path / "tokenizer.model").read_bytes() == source.read_bytes()


def test_a_corpus_without_held_out_text_is_measured_on_its_training_text(tmp_path, texts):
    corpus = make_corpus(tmp_path / "corpus", texts, [])
    artifact, metrics = run_stage(
        tokenizer_stage, TokenizerConfig(vocab_size=400), {"corpus": corpus}, tmp_path, "tokenizer"
    )
    assert metrics["bytes_per_token"] > 1
    inputs = {"corpus": corpus, "tokenizer": artifact}
    shards, metrics = run_stage(shards_stage, ShardsConfig(), inputs, tmp_path, "shards")
    assert metrics["held_out"]["tokens"] == TokenShards(shards.path, "held_out").num_tokens == 0


def test_an_empty_training_split_is_an_error(tmp_path, texts, shared_data):
    corpus = make_corpus(tmp_path / "corpus", [], texts[:3])
    with new_artifact(tmp_path / "tokenizer", {"kind": "tokenizer"}) as folder:
        load_tokenizer(shared_data / "models" / "tok512.bin").save(folder)
    inputs = {"corpus": corpus, "tokenizer": open_artifact(tmp_path / "tokenizer")}
    with pytest.raises(UserError, match="the training split is empty"):
        run_stage(shards_stage, ShardsConfig(), inputs, tmp_path, "shards")


def test_a_sample_is_spread_over_a_corpus_that_is_longer(tmp_path, shared_data):
    with gzip.open(shared_data / "text" / "tinyshakespeare.txt.gz", "rt") as file:
        book = file.read()
    corpus = make_corpus(tmp_path / "corpus", [book, *["x" * 500] * 4000], ["held out"])
    sample = list(tokenizer_stage._sample(corpus, 1_000_000, seed=3))
    assert 0.7e6 < sum(map(len, sample)) < 1.3e6
    assert 0.2 < sum(len(text) for text in sample if "x" * 500 not in text) / len(book) < 0.5
    assert sample == list(tokenizer_stage._sample(corpus, 1_000_000, seed=3))
    assert sample != list(tokenizer_stage._sample(corpus, 1_000_000, seed=4))
    assert len(list(tokenizer_stage._sample(corpus, 10**9, seed=3))) == 4001


def test_config_mistakes_name_the_key():
    with pytest.raises(UserError, match=r"tokenizer: unknown key 'vocab'; did you mean 'vocab_size'\?"):
        parse_config(TokenizerConfig, {"vocab": 10}, "tokenizer")
    with pytest.raises(UserError, match="vocab_size = 200"):
        parse_config(TokenizerConfig, {"vocab_size": 200}, "tokenizer")
