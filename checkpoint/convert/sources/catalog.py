"""The catalog of a source of any format: tensors, their locations, and other knowledge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import (
    FLOATS,
    BlockScales,
    LogicalTensor,
    SourceTensor,
    ZipRecord,
)
from holdfast.checkpoint.convert.rules import (
    RuleBook,
    builtin_rules,
    find_values,
    load_rules,
    map_tensors,
)
from holdfast.checkpoint.convert.sources.model_files import carried_files
from holdfast.checkpoint.convert.sources.quantised import find_scales, without_quantisation
from holdfast.checkpoint.format import BUFFER, STEP, UNPREFIXED_KINDS, WEIGHT
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.optimizer import MASTER, OPTIMIZERS, OptimizerRule
from holdfast.parallel.reading import parse_json


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options for reading a source."""

    rules: Path | None = None
    """Rules to use instead of the format's own."""
    values: Mapping[str, int] = field(default_factory=dict)
    model_files: Path | None = None
    """A folder with config.json and tokenizer files, for a source that has none."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """Options for writing an output."""

    dtype: str = ""
    """The type of the weights, by safetensors' name; "" for the source's."""
    values: Mapping[str, int] = field(default_factory=dict)
    """Values for the rules of the target's format."""


_NO_STATE = (*UNPREFIXED_KINDS, MASTER, STEP)


@dataclass(slots=True)
class Catalog:
    """A checkpoint as a conversion sees it: a field for each thing that a format may know."""

    format: str
    root: Path
    """The folder that locations are relative to."""
    tensors: list[LogicalTensor]
    step: int = 0
    scalars: dict[str, Any] = field(default_factory=dict)
    """JSON values: `optimizer_step`, and what the format has beside tensors."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration of a run of holdfast."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Contents of small files that accompany the weights, by name."""
    checks: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """CRC-32C of byte ranges (file, byte, length), where the source has checksums."""
    records: dict[tuple[str, int, int], ZipRecord] = field(default_factory=dict)
    """The zip record of each byte range that has one."""
    by_rule: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason for each source tensor that is left out, by its key."""
    scales: BlockScales = field(default_factory=BlockScales)
    """The scales of 8-bit weights that become wider; none where they are copied."""
    precision: str = ""
    """The type of the weights in training, if the source has only their master copies."""

    def of_kind(self, *kinds: str) -> list[LogicalTensor]:
        """The tensors of these kinds, in the source's order."""
        return [tensor for tensor in self.tensors if tensor.kind in kinds]

    def states(self) -> list[LogicalTensor]:
        """The optimizer states: tensors with the name and the shape of a weight.

        Master copies and counts of steps are no states.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.of_kind(WEIGHT, MASTER)}
        return [
            tensor
            for tensor in self.tensors
            if tensor.kind not in _NO_STATE and shapes.get(tensor.name) == tensor.shape
        ]

    def state_kinds(self) -> tuple[str, ...]:
        """The kinds of the optimizer states; none if there are no states.

        First come the kinds of the run's rule, in its order, then the kinds of other tensors, as
        other programs save them.
        """
        found = dict.fromkeys(tensor.kind for tensor in self.states())
        rule = OPTIMIZERS.get(self.config.get("optimizer", {}).get("name", ""))
        told = [kind.name for kind in rule.kinds] if rule is not None else []
        return tuple(dict.fromkeys((*told, *found))) if found else ()

    def has_states_of(self, rule: OptimizerRule[Any]) -> bool:
        """Whether there are states of all kinds that an optimizer keeps, maybe beside others."""
        return {kind.name for kind in rule.kinds}.issubset(self.state_kinds())

    def take_for_weights(self, kind: str) -> str:
        """Put the states of a kind in the weights' place; all other states are left out.

        Returns:
            The type that the weights had.
        Raises:
            CheckpointError: a weight has no state of the kind.
        """
        weights = {tensor.name: tensor for tensor in self.of_kind(WEIGHT)}
        taken = {t.name: replace(t, kind=WEIGHT) for t in self.states() if t.kind == kind}
        if missing := [name for name in weights if name not in taken]:
            raise CheckpointError(
                f"{self.root} has no {kind!r} of {missing[0]}; its kinds of state are "
                f"{', '.join(self.state_kinds()) or 'none'}"
            )
        for tensor in self.tensors:
            if tensor.kind not in (WEIGHT, BUFFER, kind):
                self.left_out[tensor.full_name] = f"{kind} takes the weights' place"
        self.tensors = [*taken.values(), *self.of_kind(BUFFER)]
        return next(iter(weights.values())).dtype if weights else ""

    def leave_out_groups(self) -> None:
        """Tell that the run's groups of parameters are not written, if it has any."""
        if self.config.get("optimizer", {}).get("groups"):
            self.left_out["optimizer.groups"] = (
                "constants of groups of parameters: all are written with those of [optimizer]"
            )

    def trained(self) -> list[str]:
        """The names of the weights with optimizer state."""
        by_kind: dict[str, list[str]] = {kind: [] for kind in self.state_kinds()}
        for tensor in self.states():
            by_kind[tensor.kind].append(tensor.name)
        return list(dict.fromkeys(name for names in by_kind.values() for name in names))


def make_catalog(
    format: str,
    root: Path,
    tensors: Sequence[SourceTensor],
    options: ReadOptions,
    *,
    told: Mapping[str, Any] | None = None,
    rules: RuleBook | None = None,
) -> Catalog:
    """Map the tensors of a source to those of the model.

    Args:
        told: the source's description of itself, for the values of rules.
        rules: the rules unless the options name others; None: those that holdfast has for the
            format.
    Raises:
        CheckpointError: no rule fits a tensor, or a tensor is incomplete.
        ConfigError: the rules or values are wrong.
    """
    if options.rules is not None:
        rules = load_rules(options.rules)
    elif rules is None:
        rules = builtin_rules(format)
    files = carried_files(root) | given_files(options)
    facts = {**(told or {}), "config": _json(files.get("config.json", b"{}"), root)}
    values = find_values(rules, facts, options.values)
    mapped = map_tensors(rules, tensors, values, str(root))
    return Catalog(
        format,
        root,
        mapped.tensors,
        files=files,
        by_rule=mapped.by_rule,
        left_out=mapped.left_out,
        records={at: record for tensor in tensors for at, record in tensor.records.items()},
    )


def given_files(options: ReadOptions) -> dict[str, bytes]:
    """The files of the folder that the user names.

    Raises:
        ConfigError: the folder has no config.json.
    """
    if options.model_files is None:
        return {}
    found = carried_files(options.model_files)
    if "config.json" not in found:
        raise ConfigError(f"--model-files {options.model_files}: it has no config.json")
    return found


def _json(content: bytes, where: Path) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{where}/config.json is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def choose_output_dtypes(
    catalog: Catalog, dtype: str, *, masters: bool
) -> list[tuple[LogicalTensor, str]]:
    """The tensors to write, each with its type in the output.

    Weights come from their master copies if these are closer to the type asked for. They become the
    master copies if they are finer than the weights will be.

    Args:
        dtype: the type of the weights, by safetensors' name; "" for the source's.
        masters: whether the target keeps master copies beside 16-bit weights.
    Raises:
        CheckpointError: a type is asked for, and the source is quantised in a way that is not
            undone.
    """
    if dtype:
        catalog.tensors, catalog.scales, applied = find_scales(
            catalog.root, catalog.tensors, catalog.files, dtype
        )
        catalog.left_out |= applied
        if len(catalog.scales):
            catalog.files = without_quantisation(catalog.files)
    weights = {tensor.name: tensor for tensor in catalog.of_kind(WEIGHT)}
    fine = {tensor.name: tensor for tensor in catalog.of_kind(MASTER)}
    trained = bool(catalog.states()) or bool(fine)
    typed: list[tuple[LogicalTensor, str]] = []
    kept: list[tuple[LogicalTensor, str]] = []
    for name in _in_order(weights, fine):
        weight, master = weights.get(name), fine.get(name)
        first = weight or master
        assert first is not None
        out = _type_of(first, dtype or ("" if weight else catalog.precision))
        exact = master is not None and (weight is None or FLOATS[out] > FLOATS[weight.dtype])
        chosen = master if exact and master is not None else first
        typed.append((replace(chosen, kind=WEIGHT), out))
        finest = master or weight
        keeps = masters and trained and finest is not None and finest.dtype in FLOATS
        if keeps and finest is not None and FLOATS[out] < FLOATS[finest.dtype]:
            kept.append((replace(finest, kind=MASTER), finest.dtype))
    others = [
        (tensor, tensor.dtype) for tensor in catalog.tensors if tensor.kind not in (WEIGHT, MASTER)
    ]
    return typed + kept + others


def _in_order(*named: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for names in named for name in names))


def _type_of(tensor: LogicalTensor, dtype: str) -> str:
    return dtype if dtype and tensor.dtype in FLOATS else tensor.dtype


def files_for(catalog: Catalog, typed: Sequence[tuple[LogicalTensor, str]]) -> dict[str, bytes]:
    """The small files beside the output; config.json has the new type of the weights."""
    files = dict(catalog.files)
    described = _json(files.get("config.json", b"{}"), catalog.root)
    types = Counter(out for tensor, out in typed if tensor.kind == WEIGHT and out in FLOATS)
    for key in ("dtype", "torch_dtype"):
        if key in described and types:
            described[key] = _CONFIG_TYPES[types.most_common(1)[0][0]]
            files["config.json"] = (json.dumps(described, indent=2) + "\n").encode()
    return files


_CONFIG_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
