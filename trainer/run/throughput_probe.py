"""`python -m holdfast.trainer.run.throughput_probe LOCAL_RANK`: measures one rank and its drive.

It reads the configuration as a line of JSON, says that it is ready, and measures at the next line.
Its answer is `Throughput` as JSON. It is a process of its own because its caller must have neither
threads nor a GPU context.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from time import perf_counter

import msgspec
import torch
from torch import Tensor

from holdfast.parallel.errors import HoldfastError
from holdfast.parallel.offload import DiskFile, DriveRequest
from holdfast.parallel.pipeline import Chunk, MicroBatchContext
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.models import build_chunk, family_of, layer_specs
from holdfast.trainer.run.throughput import Throughput
from holdfast.trainer.step import choose_device

_REPETITIONS = 3
_MOVED_BYTES = 64 << 20
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 4096


def forward_rate(config: RunConfig, device: torch.device) -> float:
    """The operations a second of one rank's part of a transformer layer, forward. Local.

    A tensor-parallel rank's part is measured as a layer with as many heads and features. Messages
    are not measured. The first pass warms up and does not count.
    """
    train = config.train
    model = family_of(config.model.family).tensor_share(config.model, config.parallel.tensor)
    dtype = PRECISIONS[train.precision].dtype
    specs = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        precision=train.precision,
        recompute="none",
    )
    layer = build_chunk(
        model,
        range(1, 2),
        specs,
        dtype=dtype,
        device=device,
        seq_len=train.seq_len,
        seed=train.seed,
    )
    shape = (train.seq_len, train.micro_batch, model.hidden)
    hidden = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
    seconds = [_forward_s(layer, hidden) for _ in range(1 + _REPETITIONS)]
    return specs[1].forward_flops / statistics.median(seconds[1:])


def _forward_s(layer: Chunk, hidden: Tensor) -> float:
    _synchronize(hidden.device)
    start = perf_counter()
    layer(hidden, MicroBatchContext(0, 0, True, None))
    _synchronize(hidden.device)
    return perf_counter() - start


def drive_rate(config: RunConfig) -> float:
    """The bytes a second written to the drive or read back, whichever is slower. Local.

    Raises:
        ConfigError: offload.path does not allow a file to be made.
        OSError: the drive has no room, or fails.
    """
    offload = config.offload
    file = DiskFile(offload.path or tempfile.gettempdir())
    try:
        memory = torch.ones(_MOVED_BYTES + _ALIGNMENT, dtype=torch.uint8)
        start = memory.data_ptr() + -memory.data_ptr() % _ALIGNMENT
        offset = file.take(_MOVED_BYTES)
        if offset is None:
            raise OSError(file.fault or "no room on the drive")
        for begin in (file.write, file.read):  # the first round meets pages and blocks that are new
            _moved_s(file, begin, offset, start)
        seconds = max(_moved_s(file, begin, offset, start) for begin in (file.write, file.read))
    finally:
        file.close()
    rate = _MOVED_BYTES / seconds
    limit = offload.limit_mib_per_s * 2**20
    return min(rate, limit) if limit else rate


def _moved_s(
    file: DiskFile, begin: Callable[[int, int, int], DriveRequest], offset: int, address: int
) -> float:
    start = perf_counter()
    places = range(0, _MOVED_BYTES, _PIECE_BYTES)
    transfers = [begin(offset + place, address + place, _PIECE_BYTES) for place in places]
    for transfer in transfers:
        file.wait(transfer)
    return perf_counter() - start


def host_rate(device: torch.device) -> float:
    """The bytes a second copied to host memory or back, whichever is slower. Local."""
    here = torch.ones(_MOVED_BYTES, dtype=torch.uint8, device=device)
    there = torch.ones(_MOVED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    seconds = 0.0
    for target, source in ((there, here), (here, there)) * 2:
        _synchronize(device)
        start = perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(device)
        seconds = max(seconds, perf_counter() - start)
    return _MOVED_BYTES / seconds


def measure(config: RunConfig, device: torch.device) -> Throughput:
    """Both rates, to three digits: more would be noise. Local."""
    flops_per_s = forward_rate(config, device)
    to_host = config.offload.activations == "host"
    bytes_per_s = host_rate(device) if to_host else drive_rate(config)
    return Throughput(float(f"{flops_per_s / 1e12:.3g}"), float(f"{bytes_per_s / 1e9:.3g}"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    config = convert_config(msgspec.json.decode(sys.stdin.readline()))
    try:
        device = choose_device(config, int(sys.argv[1]))
        print("ready", flush=True)  # noqa: T201
        if not sys.stdin.readline():
            return 1
        rates = measure(config, device)
    except (HoldfastError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    print(msgspec.json.encode(rates).decode(), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
