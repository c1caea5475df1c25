"""The places that a configuration names, as paths that are the same from every folder."""

from __future__ import annotations

import msgspec

from holdfast.checkpoint.format import expanded
from holdfast.trainer.config.sections import RunConfig


def anchored(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, for a file that is read from another folder. Local.

    A relative path lies below the folder in which the command runs.
    """
    data, checkpoint, offload = config.data, config.checkpoint, config.offload
    model = config.model
    path = checkpoint.path if checkpoint.url else _absolute(checkpoint.path)
    replace = msgspec.structs.replace
    return replace(
        config,
        model=replace(model, from_hf=_absolute(model.from_hf)),
        data=replace(
            data,
            path=[_absolute(path) for path in data.path],
            tokenizer=_tokenizer(data.tokenizer),
            validation=[
                replace(
                    own,
                    path=[_absolute(path) for path in own.path],
                    tokenizer=_tokenizer(own.tokenizer),
                )
                for own in data.validation
            ],
        ),
        checkpoint=replace(checkpoint, path=path),
        offload=replace(offload, path=_absolute(offload.path)),
    )


def _tokenizer(name: str) -> str:
    return name if name == "bytes" else _absolute(name)


def _absolute(path: str) -> str:
    return str(expanded(path, "a path").absolute()) if path else path
