"""Training of a Llama of 1.3 billion parameters on one GPU, in bf16, beside plain loops.

All have float32 master weights and moments, fused AdamW and scaled-dot-product attention. The model
FLOPs of a token are 6 * matrix parameters + 6 * layers * hidden * sequence, which counts half of
the causal square, and the passes forward and backward once.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "tests"))

from reports import SkippedPiece

from holdfast.trainer.reports.flops import PEAK_BF16_FLOPS
from support.oracles.plain_llama import PlainLlama, Shape
from support.runs.small_runs import make_config

LARGE = {"layers": 24, "hidden": 2048, "intermediate": 5504, "heads": 16, "kv_heads": 16}
LARGE |= {"vocab": 32000}
TINY = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 4, "vocab": 67}
LR, CLIP, BETAS = 1e-4, 1.0, (0.9, 0.95)


def sizes(tiny: bool) -> tuple[dict[str, int], int, int, int]:
    """The model, sequence length, sequences of a micro-batch, and micro-batches of a step."""
    return (TINY, 16, 1, 2) if tiny else (LARGE, 4096, 2, 4)


def configuration(device: str, tiny: bool, **sections: dict[str, Any]) -> Any:
    model, seq_len, micro_batch, micro_batches = sizes(tiny)
    train = {
        "seq_len": seq_len,
        "global_batch": micro_batch * micro_batches,
        "micro_batch": micro_batch,
        "steps": 1000,
        "device": device,
        "precision": "bf16",
    }
    return make_config(
        model=model | {"dropout": 0.0, "max_seq_len": seq_len},
        train=train | sections.pop("train", {}),
        optimizer={"lr": LR, "block_elements": 1 << 20},
        **sections,
    )


def holdfast_step(config: Any) -> Callable[[], float]:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    training = open_training(config, local_world(0, 1), torch.distributed.HashStore())
    number = [0]

    def step() -> float:
        training.compute(number[0])
        outcome = training.vote(*training.reduce())
        training.apply(LR)
        number[0] += 1
        return outcome.loss

    return step


def plain_step(
    model: nn.Module, logits_of: Callable[[Any], Any], device: str, tiny: bool
) -> Callable[[], float]:
    shape, seq_len, micro_batch, micro_batches = sizes(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        shape["vocab"], (micro_batches, micro_batch, seq_len + 1), generator=generator
    ).to(device)
    total = micro_batches * micro_batch * seq_len

    def step() -> float:
        optimizer.zero_grad()
        losses = []
        for part in tokens:
            with torch.autocast(device, torch.bfloat16):
                logits = logits_of(model(part[:, :-1]))
            targets = part[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum") / total
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(torch.stack(losses).sum())

    return step


def measured(step: Callable[[], float], device: str, tiny: bool) -> dict[str, Any]:
    """Times, rates and memory of steps."""
    model, seq_len, micro_batch, micro_batches = sizes(tiny)
    times = []
    loss = 0.0
    for _ in range(2 if tiny else 9):
        begin = time.perf_counter()
        loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    times = times[1 if tiny else 4 :]
    tokens = micro_batches * micro_batch * seq_len
    flops = tokens * flops_of_token(model, seq_len)
    median = statistics.median(times)
    found: dict[str, Any] = {
        "s a step": median,
        "min..max s": [min(times), max(times)],
        "tokens a step": tokens,
        "tokens/s": tokens / median,
        "TFLOP/s": flops / median / 1e12,
        "last loss": loss,
    }
    if device == "cuda":
        found["memory GiB"] = torch.cuda.max_memory_allocated() / 2**30
        name = torch.cuda.get_device_name()
        peak = next((v for n, v in PEAK_BF16_FLOPS.items() if name.startswith(n)), None)
        found |= {"peak TFLOP/s": peak and peak / 1e12, "MFU": peak and flops / median / peak}
    return found


def flops_of_token(model: Mapping[str, int], seq_len: int) -> float:
    """6 * matrix parameters (without the embedding's rows) + 6 * layers * hidden * sequence."""
    with torch.device("meta"):
        parts = PlainLlama(Shape(**model)).named_parameters()
    matrices = sum(p.numel() for name, p in parts if p.ndim == 2 and "embed_tokens" not in name)
    return 6.0 * matrices + 6.0 * model["layers"] * model["hidden"] * seq_len


def exact(device: str, tiny: bool) -> dict[str, Any]:
    return measured(holdfast_step(configuration(device, tiny)), device, tiny)


def fast(device: str, tiny: bool) -> dict[str, Any]:
    config = configuration(device, tiny, numerics={"reduction": "fast"})
    return measured(holdfast_step(config), device, tiny)


def plain(device: str, tiny: bool) -> dict[str, Any]:
    with torch.device(device):
        model = PlainLlama(Shape(**sizes(tiny)[0]))
    return measured(plain_step(model, lambda out: out, device, tiny), device, tiny)


def transformers(device: str, tiny: bool) -> dict[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        raise SkippedPiece("transformers is neither installed nor carried as a wheel")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, seq_len, *_ = sizes(tiny)
    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=seq_len,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.train()
    return measured(plain_step(model, lambda out: out.logits, device, tiny), device, tiny)


def offload(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Steps whose activations wait on a drive or in host memory, beside steps that keep them."""
    places: dict[str, dict[str, Any]] = {
        "none": {},
        "host": {"activations": "host"},
        "ssd": {"activations": "ssd", "path": str(folder)},
    }
    if device == "cpu":
        places.pop("host")  # it saves nothing there, and is refused
    found: dict[str, Any] = {}
    for name, offloading in places.items():
        config = configuration(device, tiny, numerics={"reduction": "fast"}, offload=offloading)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found[name] = measured(holdfast_step(config), device, tiny)
    return found
