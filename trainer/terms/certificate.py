"""The certificate of a rank: hashes of what its device computes. Equal hashes promise equal bits.

The operations are those of the run: the modules of its model family, forwards and backwards, at
small sizes, matrix products of its own sizes up to a bound, its optimizer's update, elementwise
functions; all in the run's precision, on the run's device, from keyed inputs. With `train.compile`
this is also where a rank compiles: before it is connected, so that no rank waits in vain. Local.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from math import gcd

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.parallel.keyed_random import normal_box_, stream_key
from holdfast.parallel.layout import slices_of
from holdfast.parallel.optimizer import MASTER, BlockUpdate, ParameterGroups
from holdfast.parallel.pipeline import Batch, MicroBatchContext
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import build_whole_model, family_of
from holdfast.trainer.step import compile_model, state_format

_SEED = 20_260_101
_MOST = 512
"""The longest side of a matrix."""
_MOST_ROWS = 64
_TOKENS = 33
_BLOCK = 4096 + 3
"""Elements of the updated block: no multiple of a vector's length."""


def make_certificate(config: RunConfig, device: torch.device) -> dict[str, str]:
    """The hashes, by kind of operation. They are made once in a process."""
    key = (msgspec.json.encode(config), str(device))
    if key not in _made:
        _made[key] = _certificate(config, device)
    return _made[key]


_made: dict[tuple[bytes, str], dict[str, str]] = {}


def _certificate(config: RunConfig, device: torch.device) -> dict[str, str]:
    return {
        **_of_products(config, device),
        "functions": _hashed(_functions(config, device)),
        **_of_model(config, device),
        **_of_regions(config, device),
        "update": _hashed(_updated(config, device)),
    }


def _of_products(config: RunConfig, device: torch.device) -> dict[str, str]:
    """A linear layer of the run's sizes: its product, and both of its gradients."""
    train, model = config.train, config.model
    rows = min(_MOST_ROWS, train.seq_len * train.micro_batch)
    hidden, intermediate = min(_MOST, model.hidden), min(_MOST, model.intermediate)
    dtype = PRECISIONS[train.precision].dtype
    value, weight, gradient = (
        _drawn(name, size, device).to(dtype)
        for name, size in (
            ("value", (rows, hidden)),
            ("weight", (intermediate, hidden)),
            ("gradient", (rows, intermediate)),
        )
    )
    return {
        "matrix products": _hashed([F.linear(value, weight)]),
        "gradients of matrix products": _hashed([gradient @ weight, gradient.t() @ value]),
    }


def _functions(config: RunConfig, device: torch.device) -> list[Tensor]:
    """Elementwise functions and reductions of a row."""
    dtype = PRECISIONS[config.train.precision].dtype
    value = _drawn("functions", (16, min(_MOST, config.model.hidden)), device).to(dtype)
    wide = value if value.element_size() >= 4 else value.float()
    return [
        value.exp(),
        F.silu(value),
        wide.cos(),
        wide.softmax(-1),
        wide.logsumexp(-1),
        wide.square().sum(dtype=torch.float64),
        F.rms_norm(wide, wide.shape[-1:], None, 1e-6),
    ]


def _of_model(config: RunConfig, device: torch.device) -> dict[str, str]:
    """The loss of a small model of the run's family, and the gradients of its parameters."""
    train = config.train
    shards = min(config.numerics.tensor_shards, _TOKENS - 1)
    strips = gcd(_TOKENS - 1, config.numerics.tensor_strips)
    model = family_of(config.model.family).tiny(config.model, shards, 1, shards)
    model = msgspec.structs.replace(model, max_seq_len=max(model.max_seq_len, _TOKENS))
    rows = min(train.micro_batch, 2)
    chunk = build_whole_model(
        model,
        dtype=PRECISIONS[train.precision].dtype,
        device=device,
        seq_len=_TOKENS - 1,
        micro_batch=rows,
        seed=_SEED,
        vocab_chunk=model.vocab // (2 * shards) if train.vocab_chunk else 0,
        shards=shards,
        strips=strips,
    )
    tokens = torch.arange(rows * _TOKENS).view(rows, _TOKENS) * 7 % model.vocab
    batch = Batch(tokens[:, :-1], tokens[:, 1:]).to(device)
    count = gcd((_TOKENS - 1) // max(shards, strips), train.context_chunks)
    slices = slices_of(_TOKENS - 1, count, 1, 0)
    loss = chunk(None, MicroBatchContext(0, 0, True, batch, slices=slices)).sum()
    loss.backward()
    gradients = [p.grad for _, p in chunk.rows() if p.grad is not None]
    return {"forward pass": _hashed([loss.detach()]), "backward pass": _hashed(gradients)}


def _of_regions(config: RunConfig, device: torch.device) -> dict[str, str]:
    """The compiled parts of a layer, if there are any: at the run's sizes, with its own code."""
    results = compile_model(config, device)
    return {"compiled passes": _hashed(results)} if results else {}


def _updated(config: RunConfig, device: torch.device) -> list[Tensor]:
    """A block after an update of the run's optimizer, with its state."""
    form = state_format(config)
    groups = ParameterGroups.of(form.rule, config.optimizer)
    held = [
        _drawn(name, (1, _BLOCK), device).to(form.precision_of(of).dtype).flatten().abs()
        for name, of in [(MASTER, MASTER), ("gradient", MASTER), *((k, k) for k in form.held[1:])]
    ]
    master, gradient, *state = held
    rest = len(groups.groups) - 1
    block = BlockUpdate(master, gradient, tuple(state), decays=True, group=rest)
    groups.update([block], torch.tensor(2.0, device=device), config.optimizer.lr)
    return [master, *state]


def _drawn(name: str, size: tuple[int, int], device: torch.device) -> Tensor:
    """Keyed normal draws: float32[size]."""
    values = torch.empty(size, dtype=torch.float32)
    key = stream_key(_SEED, "certificate", name)
    normal_box_(values, key, row=0, column=0, total_columns=size[1], std=1.0)
    return values.to(device)


def _hashed(values: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
