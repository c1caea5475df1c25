"""The compilation of a model's regions: its pure functions between linear layers and collectives.

Linear layers hand weight gradients to a queue and communicate, so a compiled layer would be many
graphs. A region is one graph of constant shapes, equal on every rank of a run. torch's compiler is
imported when the first region is compiled, or where torch's checkpointing needs it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from time import perf_counter
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from holdfast.parallel.errors import ConfigError, first_line
from holdfast.parallel.keyed_random import normal_box_, stream_key

logger = logging.getLogger("holdfast")

_MOST_GRAPHS = 64
"""The most graphs of a region. A run has two, with gradients and without; tests have many runs."""
P = ParamSpec("P")


class Region(NamedTuple):
    """A pure function of a model, with arguments like those of a run."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    """Tensors have the run's shapes and types; those that need gradients have any values."""


def import_compiler() -> None:
    """Import torch's compiler, as `torch.utils.checkpoint` does in its first call. Local.

    Amid a step others would wait for it. What it keeps of the frames that import it, and so all
    that these see, stays in memory: a thread of its own sees nothing.
    """
    if "torch._dynamo" not in sys.modules:
        thread = threading.Thread(target=import_module, args=("torch._dynamo",))
        thread.start()
        thread.join()


def mark_compiling(mark: Callable[[], AbstractContextManager[None]]) -> None:
    """Have a mark made whenever torch compiles in this process from now on.

    All of a run's shapes are compiled before its first step. A ramp of lengths has further ones.
    """
    from torch._dynamo.callback import callback_handler

    marks: list[AbstractContextManager[None]] = []

    def begin(_: Any) -> None:
        marks.append(mark())
        marks[-1].__enter__()

    def end(_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)


def compiled(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The function as torch compiles it at its first call with some shapes, in this process."""
    return _compiled(function, torch.get_num_threads())


@cache
def _compiled(function: Callable[P, Tensor], threads: int) -> Callable[P, Tensor]:
    from torch._dynamo import config as tracing
    from torch._inductor import config as generation

    # A pool of compiling processes would outlive the few kernels that there are.
    generation.compile_threads = 1
    tracing.recompile_limit = _MOST_GRAPHS
    # Bits must not follow from what ran faster in a trial, nor from an earlier run's threads.
    options: dict[str, Any] = {"deterministic": True, "cpp.threads": threads}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def compile_regions(regions: Iterable[Region], seed: int) -> list[Tensor]:
    """Compile regions for passes with gradients and without, and try them. Local.

    Args:
        seed: the seed of the arguments that need gradients; equal seeds give equal values.
    Returns:
        All outputs and gradients.
    Raises:
        ConfigError: torch cannot compile on this machine.
    """
    start, results = perf_counter(), []
    try:
        for number, region in enumerate(regions):
            results += _tried(region, seed, number)
    except (OSError, RuntimeError) as error:
        logger.debug("the compiler's error", exc_info=True)
        raise _explained(error) from error
    logger.info("compiled and tried the regions of the model in %.1f s", perf_counter() - start)
    return results


def _tried(region: Region, seed: int, number: int) -> list[Tensor]:
    """A region's output with gradients, these, and its output without."""
    function = compiled(region.function)
    learned = [a for a in region.arguments if isinstance(a, Tensor) and a.requires_grad]
    for index, argument in enumerate(learned):
        argument.data.copy_(_drawn(argument, seed, f"argument {number} {index}"))
    output = function(*region.arguments)
    gradient = _drawn(output, seed, f"gradient {number}").to(output)
    gradients = torch.autograd.grad(output, learned, gradient)
    # As in evaluation: parameters still say that they need gradients, hidden states do not.
    hidden = [a.detach() if type(a) is Tensor else a for a in region.arguments]
    with torch.no_grad():
        return [output.detach(), *gradients, function(*hidden)]


def _drawn(like: Tensor, seed: int, name: str) -> Tensor:
    """Keyed normal draws in a tensor's shape: float32 on the CPU."""
    values = torch.empty(like.shape, dtype=torch.float32)
    rows = values.view(-1, like.shape[-1])
    key = stream_key(seed, "region", name)
    normal_box_(rows, key, row=0, column=0, total_columns=rows.shape[1], std=1.0)
    return values


def _explained(error: Exception) -> Exception:
    """The error for a person if it is the compiler's; else itself."""
    if isinstance(error, OSError):
        return ConfigError(
            f"train.compile = true: compiled code cannot be kept: {error}; set "
            "TORCHINDUCTOR_CACHE_DIR to a folder with room that you may write, or train.compile "
            "to false"
        )
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return error
    lines = str(error).splitlines()
    reason = next((line.strip() for line in lines if "error:" in line), first_line(error))
    return ConfigError(
        f"train.compile = true: torch cannot compile on this machine ({reason}); install a C++ "
        "compiler (g++, or the one that CXX names) and Python's headers, and Triton for a GPU; or "
        "set train.compile = false"
    )
