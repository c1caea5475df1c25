"""What of a module is its state, under which names, and what of its own code a load has to run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from holdfast.parallel.errors import CheckpointError

_EXTRA = "_extra_state"
"""The end of a key of Module.state_dict that has what get_extra_state gave."""
_WRAPPERS = re.compile(r"(?:(?<=\.)|\A)(?:_checkpoint_wrapped_module|_orig_mod)\.")
"""What torch's activation checkpointing and torch.compile add to the names inside a model."""


def _unwrapped(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those inside DistributedDataParallel and torch.compile, the bare one last."""
    inner: object = module
    while isinstance(inner, nn.Module):
        yield inner
        is_replica = isinstance(inner, nn.parallel.DistributedDataParallel)
        inner = inner.module if is_replica else getattr(inner, "_orig_mod", None)


def bare(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or torch.compile."""
    *_, found = _unwrapped(module)
    return found


def prefix_of(key: str) -> str:
    """The prefix of a module's names: none under "model", else its key."""
    return "" if key == "model" else f"{key}."


def canonical(name: str) -> str:
    """The name of a part of a module without what wrappers of modules inside add to it."""
    return _WRAPPERS.sub("", name)


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that have extra state, by the canonical key of Module.state_dict."""
    return {
        canonical(f"{name}.{_EXTRA}" if name else _EXTRA): inner
        for name, inner in module.named_modules(remove_duplicate=False)
        if type(inner).get_extra_state is not nn.Module.get_extra_state
    }


def module_tensors(module: nn.Module, key: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters, and the persistent buffers, by canonical name; each tensor once.

    Raises:
        CheckpointError: `state_dict` has something else as well; it is named.
    """
    saved = {canonical(n): value for n, value in module.state_dict(keep_vars=True).items()}
    parameters: dict[str, Tensor] = {canonical(n): p for n, p in module.named_parameters()}
    every: dict[str, Tensor] = {
        canonical(name): value
        for found in (module.named_parameters, module.named_buffers)
        for name, value in found(remove_duplicate=False)
    }
    extra = extra_states(module)
    buffers: dict[str, Tensor] = {}
    known = set(map(id, parameters.values()))
    for name, value in saved.items():
        if name in extra:
            continue
        if name not in every or value is not every[name]:
            raise CheckpointError(
                f"{prefix_of(key)}{name} cannot be saved or loaded: the module's state_dict gives "
                "it, and it is no parameter, buffer or extra state of the module as it is"
            )
        if id(value) not in known:
            known.add(id(value))
            buffers[name] = value
    return parameters, buffers


def has_own_loading(module: nn.Module) -> bool:
    """Whether a program's own code takes part in Module.load_state_dict: hooks, or methods."""
    return any(
        _is_foreign(code)
        for inner in module.modules()
        for code in (
            *inner._load_state_dict_pre_hooks.values(),
            *inner._load_state_dict_post_hooks.values(),
            type(inner)._load_from_state_dict,
            type(inner).load_state_dict,
        )
    )


def load_again(module: nn.Module) -> None:
    """Give a module its present state by load_state_dict, for the code that takes part in it."""
    own = _is_foreign(type(module).load_state_dict)
    module.load_state_dict(module.state_dict(), **({} if own else {"strict": False}))


def _is_foreign(code: object) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] != "torch"


def buffers_are_led(module: nn.Module) -> bool:
    """Whether the first rank's buffers replace the others' before the next forward pass."""
    for found in _unwrapped(module):
        if isinstance(found, nn.parallel.DistributedDataParallel):
            return bool(found.broadcast_buffers)
    return False
