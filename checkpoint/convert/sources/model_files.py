"""The files of a Hugging Face model folder beside its weights: which go along, and which do not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from holdfast.parallel.reading import read_regular

_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model*",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "encoder.json",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""The files that accompany the weights: descriptions of the model, tokenizers, chat templates."""
_WEIGHTS = (
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pt", ".pth",
    ".safetensors",
)  # fmt: skip


def carried_files(folder: Path) -> dict[str, bytes]:
    """The files that accompany the weights of a model folder, by their paths in it.

    Raises:
        OSError: one cannot be read.
    """
    return {name: read_regular(folder / name) for name in _carried_names(folder)}


def left_files(folder: Path, used: Collection[str]) -> Mapping[str, str]:
    """The reason for each file of a model folder that no conversion takes along.

    Folders are named as a whole. Hidden files, such as those of git, belong to no model.

    Args:
        used: the files of weights that are converted, or named elsewhere.
    """
    known = {*used, *_carried_names(folder)}
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in known:
            continue
        inner = {name for name in known if name.startswith(f"{path.name}/")}
        if not inner:
            found[path.name + "/" * path.is_dir()] = _reason(path)
            continue
        for each in sorted(path.iterdir()):
            if f"{path.name}/{each.name}" not in inner:
                found[f"{path.name}/{each.name}"] = _reason(each)
    return found


def _carried_names(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for pattern in _CARRIED
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]


def _reason(path: Path) -> str:
    if path.suffix == ".py":
        return "code, which is not copied: read it, and copy it if you trust it"
    if path.suffix in _WEIGHTS:
        return "transformers loads other files of weights"
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere"
    return "no part of the model, of its tokenizer or of its chat templates"
