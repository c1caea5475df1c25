"""The recognition of formats by the names of files; `formats.registry` says which is which."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from holdfast.checkpoint.format import INDEX
from holdfast.checkpoint.stores import find_checkpoint
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import parse_json, read_name, read_regular

DCP_METADATA: Final = ".metadata"
MEGATRON_TRACKER: Final = "latest_checkpointed_iteration.txt"
MEGATRON_RANK: Final = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?(?:_(\d{3}))?")
MEGATRON_FILE: Final = "model_optim_rng.pt"
ZERO_FILE: Final = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt"
)
BIN_INDEX: Final = "pytorch_model.bin.index.json"
BIN_FILES: Final = "pytorch_model*.bin"


def is_holdfast(path: Path) -> bool:
    """Whether the path is a checkpoint of ours, or a folder or run that has some."""
    try:
        find_checkpoint(path)
    except PermissionError:  # it may be one
        raise
    except (CheckpointError, OSError):
        return False
    return True


def is_megatron(path: Path) -> bool:
    """Whether Megatron has saved to the folder, or the folder is one iteration, of either form."""
    if (path / MEGATRON_TRACKER).is_file() or is_torch_dist(path):
        return True
    return path.is_dir() and any(
        MEGATRON_RANK.fullmatch(folder.name) and (folder / MEGATRON_FILE).is_file()
        for folder in path.iterdir()
    )


def is_torch_dist(path: Path) -> bool:
    """Whether a folder is an iteration of Megatron-Core's dist_checkpointing."""
    return torch_dist_backend(path) is not None


def torch_dist_backend(path: Path) -> Any:
    """The `sharded_backend` that metadata.json names in a folder; None where there is none."""
    try:
        described = parse_json(read_regular(path / "metadata.json"))
    except (OSError, ValueError):
        return None
    return described.get("sharded_backend") if isinstance(described, dict) else None


def is_deepspeed(path: Path) -> bool:
    """Whether DeepSpeed has saved to the folder, or the folder is one tag."""
    if not path.is_dir():
        return False
    folder = path
    if (path / "latest").is_file():
        with suppress(OSError):  # the reading of it says why, where the format is named
            tag = read_name(path / "latest")
            folder = path / tag if "/" not in tag else path
    return folder.is_dir() and any(ZERO_FILE.fullmatch(f.name) for f in folder.iterdir())


def is_universal(path: Path) -> bool:
    """Whether the folder is a universal checkpoint of DeepSpeed, or its latest one is."""
    return (path / "zero").is_dir() or (path / "latest_universal").is_file()


def is_dcp(path: Path) -> bool:
    """Whether torch.distributed.checkpoint has saved to the folder."""
    return (path / DCP_METADATA).is_file()


def is_hugging_face(path: Path) -> bool:
    """Whether the path is a folder of safetensors or pytorch_model.bin, or one safetensors file."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / index).is_file() for index in (INDEX, BIN_INDEX)) or any(
        any(path.glob(pattern)) for pattern in ("*.safetensors", BIN_FILES)
    )
