"""The operations of a step, in order, with digests of what goes in and comes out.

Two runs of the same program have the same operations, so the first one that differs, by its name or
its result, is where their bits part. What native kernels write is seen where it goes into a later
operation: inputs differ there that no operation gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from holdfast.parallel.optimizer import operations_of
from holdfast.parallel.output import write_whole

_UNSET = ("aten::empty", "aten::new_empty")
"""Operations whose results have no value yet."""

_OVERWRITING = ("aten::copy_", "aten::zero_", "aten::fill_")
"""Operations that do not read the tensor that they write."""

OUTPUT = "output of the module"
"""What the line of a module's result has for the name of an operation."""


def tensor_digest(values: Tensor) -> int:
    """The weighted sum modulo 2**64 of the bits of a tensor in the order of its elements."""
    flat = values.detach().contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    if flat.element_size() == 1:
        flat = flat.view(torch.uint8).to(torch.int16)
    return operations_of(flat.device).bit_sums([(flat.reshape(-1), 0)])[0]


class OperationRecorder(TorchDispatchMode):
    """Records the operations that this thread runs while it is active. Local.

    It changes no bit, and takes as long as reading all inputs and results.
    """

    def __init__(self, micro_batch: Callable[[], int], kept: Collection[int] = ()) -> None:
        """Nothing is recorded yet.

        Args:
            micro_batch: gives the micro-batch that is computed.
            kept: the numbers of operations whose inputs and results are kept.
        """
        super().__init__()
        self._micro_batch, self._kept = micro_batch, frozenset(kept)
        self._modules = ModuleTracker()
        self._hook: RemovableHandle | None = None
        self.operations: list[dict[str, Any]] = []
        """A line for each operation."""
        self.values: dict[str, Tensor] = {}
        """What is kept, by "number.input.place" and "number.result.place"."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions run as they are: their results are seen where they go."""
        return True

    def __enter__(self) -> OperationRecorder:
        # Before the tracker's own hooks, which leave the module.
        self._hook = register_module_forward_hook(self._output)
        self._modules.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        if self._hook is not None:
            self._hook.remove()
        self._modules.__exit__(exc_type, exc_val, exc_tb)

    def _output(self, module: nn.Module, inputs: Any, result: Any) -> None:
        """Record what a module gives: also where programs differ, their modules are the same."""
        if not torch.compiler.is_compiling():
            with self._quiet():
                self._record(OUTPUT, [], _tensors(result))

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        super().__exit__(None, None, None)
        try:
            yield
        finally:
            super().__enter__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.name()
        quiet = name.startswith(_UNSET) or _is_view(func)
        given = [] if quiet else _read_by(name, args, kwargs or {})
        digests = [tensor_digest(value) for value in given]
        number = len(self.operations)
        if number in self._kept and not quiet:
            self._keep(f"{number}.input", given)
        result = func(*args, **(kwargs or {}))
        if not quiet:
            self._record(name, digests, _tensors(result))
        return result

    def _record(self, name: str, digests: list[int], results: list[Tensor]) -> None:
        number = len(self.operations)
        self.operations.append(
            {
                "number": number,
                "operation": name,
                "module": self._module(),
                "backward": self._modules.is_bw,
                "micro_batch": self._micro_batch(),
                "inputs": [f"{digest:016x}" for digest in digests],
                "results": [
                    {
                        "dtype": str(value.dtype).removeprefix("torch."),
                        "shape": list(value.shape),
                        "digest": f"{tensor_digest(value):016x}",
                    }
                    for value in results
                ],
            }
        )
        if number in self._kept:
            self._keep(f"{number}.result", results)

    def _keep(self, name: str, values: list[Tensor]) -> None:
        for place, value in enumerate(values):
            self.values[f"{name}.{place}"] = value.detach().cpu().contiguous().clone()

    def _module(self) -> str:
        """The innermost module that runs; in a backward pass the one whose gradients it gives."""
        return max(self._modules.parents, key=lambda name: (name.count("."), name), default="")


def _is_view(func: Any) -> bool:
    """Whether an operation only gives other views of its inputs."""
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _read_by(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What an operation reads: not what it only writes to."""
    read = args[1:] if name.startswith(_OVERWRITING) else args
    return _tensors((read, {key: value for key, value in kwargs.items() if key != "out"}))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def operations_file(folder: Path, step: int, rank: int) -> Path:
    """Where a rank's operations of a step, counted from 1, are written."""
    return folder / f"operations-{step:08d}-rank-{rank}.jsonl"


@contextmanager
def _written(recorder: OperationRecorder, path: Path) -> Iterator[None]:
    with recorder:
        yield
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(operation) + "\n" for operation in recorder.operations)
    write_whole(path, "".join(lines).encode())
    if recorder.values:
        write_whole(path.with_suffix(".safetensors"), save(recorder.values))


def recorded_operations(
    folder: Path,
    step: int,
    rank: int,
    micro_batch: Callable[[], int],
    *,
    steps: Collection[int],
    kept: Collection[int],
) -> AbstractContextManager[None]:
    """Write the operations of the block to a folder if its step, counted from 1, is asked for."""
    if step not in steps:
        return nullcontext()
    return _written(OperationRecorder(micro_batch, kept), operations_file(folder, step, rank))
