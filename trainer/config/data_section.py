"""The `[data]` section of a configuration. Imports neither torch nor numpy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from holdfast.parallel.errors import DataError, shown

_ENDLESS = 2**62
"""More steps than a run has."""
HELD_OUT = "held_out"
"""The name of the part of the corpora that is held out, among the validation sets."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ValidationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A validation set: a `[[data.validation]]` table. All of its tokens are evaluated on, at most.

    Attributes:
        name: what its loss is called.
        path: as `data.path`.
        kind: as `data.kind`; "": that of `[data]`.
        tokenizer: as `data.tokenizer`; "": that of `[data]`.
    """

    name: str
    path: list[str]
    kind: Literal["", "text", "megatron"] = ""
    tokenizer: str = ""


class MixtureStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shares of a mixture from a step on: a `[[data.stages]]` table.

    Attributes:
        start: the steps that are done before.
        weights: as `data.weights`; 0: nothing of this path.
    """

    start: int
    weights: list[float]


class Removal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples that a run trains without, from a step on: a `[[data.without]]` table.

    Attributes:
        start: the steps that are done before.
        samples: their numbers.
    """

    start: int = 0
    samples: list[int]


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The source of the tokens. A field for each key.

    Attributes:
        kind: "synthetic" (a seeded Markov chain), "text" (UTF-8 files and folders) or "megatron"
            (`.bin`/`.idx` prefixes).
        path: files, folders or prefixes. Text without a path is the Python standard library.
        tokenizer: "bytes", or the path of a `tokenizer.json`; for text only.
        json_key: the key of the text in a line of a .jsonl file, or in an object of a .json file;
            "": JSON is plain text. For text only.
        end_of_text: the token of `tokenizer` that ends a document; "": one of the known names.
            For text only.
        weights: one per path: the shares of a mixture. Empty: all paths are one corpus.
        stages: the shares from later steps on.
        packing: the documents in a training sequence. "concatenated": one text without borders;
            "documents": the same tokens, but attention, positions and predictions stay within
            documents; "best-fit": whole documents, packed with the least padding.
        packing_buffer: for "best-fit", the sequences that are open at once.
        fim_rate: the share of documents whose middle is moved to the end (fill-in-the-middle), in
            sequences that are trained on; 0: none. For text with a `tokenizer.json` only.
        fim_spm_rate: the share of these that have their suffix first (SPM, the others: PSM).
        fim_tokens: the tokens of `tokenizer` before prefix, suffix and middle, in this order.
        eval_fraction: share of every corpus, taken from its end, that is held out, in [0, 1).
        seed: keys the order of the samples; 0: `train.seed` does.
        without: the samples that are removed: nothing of them is read or predicted.
        validation: sets that the run evaluates on beside what is held out, by name.
    """

    kind: Literal["synthetic", "text", "megatron"] = "synthetic"
    path: list[str] = []
    tokenizer: str = "bytes"
    json_key: str = "text"
    end_of_text: str = ""
    weights: list[float] = []
    stages: list[MixtureStage] = []
    packing: Literal["concatenated", "documents", "best-fit"] = "concatenated"
    packing_buffer: int = 1024
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: list[str] = []
    eval_fraction: float = 0.05
    seed: int = 0
    without: list[Removal] = []
    validation: list[ValidationConfig] = []


_TEXT_ONLY = ("tokenizer", "json_key", "end_of_text")
_IGNORED = {
    "synthetic": ("path", "weights", "stages", *_TEXT_ONLY),
    "text": (),
    "megatron": _TEXT_ONLY,
}
"""The keys that have no effect, by `data.kind`."""
_ADVICE = {
    "synthetic": 'set data.kind = "text" or "megatron", or leave it out',
    "megatron": "the files hold tokens already; leave it out",
}


def check_data_config(data: DataConfig) -> None:
    """Check the values that can be checked without touching a file.

    Raises:
        DataError: a value is wrong; the message has the key, its value and what is allowed.
    """
    if not 0 <= data.eval_fraction < 1:
        raise DataError(
            f"data.eval_fraction = {data.eval_fraction}: allowed is 0 (nothing held out) up to, "
            "but not including, 1"
        )
    for key in _IGNORED[data.kind]:
        value = getattr(data, key)
        if value != getattr(DataConfig(), key):
            raise DataError(
                f'data.{key} = {shown(value)} with data.kind = "{data.kind}": it would not be '
                f"used; {_ADVICE[data.kind]}"
            )
    if data.packing == "best-fit" and data.kind == "synthetic":
        raise DataError(
            'data.packing = "best-fit" with data.kind = "synthetic": its sequences have documents '
            'of their own; set data.packing = "documents"'
        )
    if data.packing_buffer < 1:
        raise DataError(f"data.packing_buffer = {data.packing_buffer}: use 1 or more")
    if data.packing != "best-fit" and data.packing_buffer != DataConfig().packing_buffer:
        raise DataError(
            f"data.packing_buffer = {data.packing_buffer} with data.packing = "
            f'"{data.packing}": it would not be used; set data.packing = "best-fit", or leave it '
            "out"
        )
    if data.kind == "megatron" and not data.path:
        raise DataError(
            'data.path = [] with data.kind = "megatron": name at least one prefix of a '
            ".bin/.idx pair (holdfast data prepare writes them)"
        )
    _check_weights(data)
    _check_fill_in_middle(data)
    _check_validation(data)


def _check_fill_in_middle(data: DataConfig) -> None:
    for key in ("fim_rate", "fim_spm_rate"):
        if not 0 <= getattr(data, key) <= 1:
            raise DataError(f"data.{key} = {getattr(data, key)}: allowed are 0 to 1")
    if not data.fim_rate:
        for key in ("fim_spm_rate", "fim_tokens"):
            if getattr(data, key) != getattr(DataConfig(), key):
                raise DataError(
                    f"data.{key} = {shown(getattr(data, key))} with data.fim_rate = 0: it would "
                    "not be used; set data.fim_rate, or leave it out"
                )
        return
    said = f"data.fim_rate = {data.fim_rate}"
    if data.kind != "text" or data.tokenizer == "bytes":
        raise DataError(
            f"{said} needs tokens that stand before the parts of a document; set data.kind = "
            '"text" and data.tokenizer to a tokenizer.json that has them'
        )
    if data.packing != "concatenated":
        raise DataError(
            f'{said} with data.packing = "{data.packing}": set data.packing = "concatenated"; the '
            "changed documents of a window are one text"
        )
    if len(set(data.fim_tokens)) != 3 or len(data.fim_tokens) != 3:
        raise DataError(
            f"data.fim_tokens = {shown(data.fim_tokens)} with {said}: name three tokens of the "
            "tokenizer, those before prefix, suffix and middle"
        )


def lacking_removals(own: Sequence[Removal], others: Sequence[Removal]) -> list[Removal]:
    """What others remove, and `own` does not remove as early. Pure."""
    known = removed_before(own, _ENDLESS)
    found: dict[int, list[int]] = {}
    for sample, start in sorted(removed_before(others, _ENDLESS).items()):
        if known.get(sample, _ENDLESS) > start:
            found.setdefault(start, []).append(sample)
    return [Removal(start=start, samples=found[start]) for start in sorted(found)]


def removed_before(removals: Sequence[Removal], step: int) -> dict[int, int]:
    """By sample, the steps done before it was removed, for those that this was before a step. Pure.

    Args:
        step: the steps that are done.
    """
    found: dict[int, int] = {}
    for removal in removals:
        for sample in removal.samples if removal.start < step else ():
            found[sample] = min(removal.start, found.get(sample, removal.start))
    return found


def validation_names(data: DataConfig) -> tuple[str, ...]:
    """The names of all that a run can evaluate on, in order. Pure."""
    held_out = (HELD_OUT,) if data.eval_fraction > 0 else ()
    return (*held_out, *(own.name for own in data.validation))


def validation_data(data: DataConfig, own: ValidationConfig) -> DataConfig:
    """The `[data]` section of a validation set, whose text is read and cut as the run's is. Pure.

    Its order has a seed of its own, so that runs of any seed evaluate on the same sequences.
    """
    kind = own.kind or data.kind
    same = data if kind == data.kind else DataConfig()
    return DataConfig(
        kind=kind,
        path=own.path,
        tokenizer=own.tokenizer or same.tokenizer,
        json_key=same.json_key,
        end_of_text=same.end_of_text,
        packing=data.packing,
        packing_buffer=data.packing_buffer,
        eval_fraction=0.0,
    )


def _check_weights(data: DataConfig) -> None:
    if data.stages and not data.weights:
        raise DataError("data.stages without data.weights: give the weights of the first steps")
    last, used = 0, set[int]()
    shares = [("data.weights", data.weights)]
    for number, stage in enumerate(data.stages):
        name = f"data.stages[{number}]"
        if stage.start <= last:
            raise DataError(
                f"{name}.start = {stage.start}: must be more than {last}, the start of the one "
                "before it"
            )
        last = stage.start
        shares.append((f"{name}.weights", stage.weights))
    for name, weights in shares if data.weights else ():
        if len(weights) != len(data.path):
            raise DataError(
                f"{name} has {len(weights)} values and data.path has {len(data.path)}: give one "
                "weight per path, or none"
            )
        for position, weight in enumerate(weights):
            if not (math.isfinite(weight) and (weight > 0 or (weight == 0 and data.stages))):
                raise DataError(
                    f"{name}[{position}] = {weight}: every weight is a positive number; leave the "
                    "path out to use none of it, or set 0 where data.stages use it at other steps"
                )
        used |= {position for position, weight in enumerate(weights) if weight}
        if not any(weights):
            raise DataError(f"{name} = {shown(weights)}: one of them must be above 0")
    if data.weights and len(used) < len(data.path):
        position = next(place for place in range(len(data.path)) if place not in used)
        raise DataError(
            f"data.path[{position}] has the weight 0 at all steps; leave it out, or use it"
        )


def _check_validation(data: DataConfig) -> None:
    names: set[str] = {HELD_OUT}
    for number, own in enumerate(data.validation):
        where = f"data.validation[{number}]"
        if not _NAME.fullmatch(own.name):
            raise DataError(
                f"{where}.name = {shown(own.name)}: allowed are at most 64 letters, digits, "
                "'_', '.' and '-', the first of them a letter or digit"
            )
        if own.name in names:
            raise DataError(
                f"{where}.name = {shown(own.name)}: it is the name of another set "
                f"({HELD_OUT!r} is what the run holds out); give each its own"
            )
        names.add(own.name)
        if not own.path:
            raise DataError(f"{where}.path = []: name the files of {own.name!r}")
        kind = own.kind or data.kind
        if kind == "synthetic":
            raise DataError(
                f'{where}.kind = "" with data.kind = "synthetic": a validation set has files; set '
                f'{where}.kind = "text" or "megatron"'
            )
        if kind == "text" and data.kind == "megatron" and not own.tokenizer:
            raise DataError(
                f'{where}.kind = "text" with data.kind = "megatron": name the tokenizer that made '
                f"the tokens in {where}.tokenizer"
            )
        check_data_config(validation_data(data, own))
