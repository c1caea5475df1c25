"""Every published layout bug that applies is found when it is put in, and named for what it is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.trainer.config import RunConfig
from support.oracles.transformers_models import DEEPSEEK
from support.processes.cluster import Cluster
from support.runs.layouts import in_slices, tiny
from support.runs.small_runs import findings_of

pytestmark = [pytest.mark.mp, pytest.mark.slow]

SPLIT = {"tensor": 2, "sequence_parallel": False}
STEPS = {"parameters_not_gathered": 2, "gradients_kept_from_the_last_step": 3}
"""The steps after which a bug shows, where one is not enough."""


def small(layout: dict[str, Any], model: dict[str, Any], steps: int = 1) -> RunConfig:
    """A tiny configuration of two micro-batches, or of one more than there are replicas."""
    config = tiny(layout, model, steps)
    replicas = layout.get("data", 1)
    rows = config.train.micro_batch * (replicas + (replicas > 2) if replicas > 1 else 2)
    return msgspec.structs.replace(
        config, train=msgspec.structs.replace(config.train, global_batch=rows)
    )


# (bug, layout, model, kind of the first finding, what its line says)
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    (
        "norm_weights_not_summed_over_tensor",
        {"tensor": 2},
        {},
        "gradient",
        "all_reduce over the tensor",
    ),
    (
        "shared_kv_heads_not_summed",
        {"tensor": 4},
        {},
        "gradient",
        "all_reduce over the tensor group is missing",
    ),
    ("replicated_weights_counted_by_every_rank", {"tensor": 2}, {}, "gradient norm", "counted"),
    ("tied_weight_counted_twice", {}, {"tie_embeddings": True}, "gradient", "embed_tokens"),
    ("copy_to_group_without_all_reduce", SPLIT, {}, "activation gradient", "backward all_reduce"),
    ("row_parallel_without_sum", SPLIT, {}, "activation", "forward all_reduce"),
    ("row_parallel_scatter_without_sum", {"tensor": 2}, {}, "activation", "embedding"),
    ("gradient_summed_once_too_often", SPLIT, {}, "activation gradient", "2 times too large"),
    ("cross_entropy_over_local_vocabulary", {"tensor": 2}, {}, "loss", "step 1"),
    ("vocabulary_split_rounded_down", {"tensor": 2}, {"vocab": 19}, "activation", "embedding"),
    ("dropout_equal_on_sequence_shards", {"tensor": 2}, {}, "activation", "embedding"),
    ("loss_averaged_over_replicas", {"data": 3}, {}, "loss", "step 1"),
    ("gradient_scaled_by_pipeline", {"pipeline": 2}, {}, "activation gradient", "head"),
    ("clipping_by_own_norm", {"pipeline": 2}, {}, "gradient norm", "squares is missing"),
    (
        "weight_gradients_computed_twice",
        {"pipeline": 2, "schedule": "zb-h1"},
        {},
        "gradient",
        "2 times the reference",
    ),
    ("replica_reads_another_ones_samples", {"data": 2}, {}, "activation", "embedding"),
    ("replicas_not_summed", {"data": 2}, {}, "gradient", "data-parallel replicas"),
    ("parameters_not_gathered", {"data": 2}, {}, "loss", "step 2"),
    ("gradients_kept_from_the_last_step", {}, {}, "loss", "step 3"),
]


KEYS = {"context": 2, "context_exchange": "keys"}
RING = {"context": 2, "context_exchange": "ring"}

# (bug, layout, packing, kind of the first finding)
IN_SLICES: list[tuple[str, dict[str, Any], str, str]] = [
    ("positions_restart_in_each_slice", {"context": 2}, "concatenated", "activation"),
    ("labels_shifted_after_the_split", {"context": 2}, "concatenated", "loss"),
    ("loss_scaled_by_context", {"context": 2}, "concatenated", "activation gradient"),
    ("dropout_equal_on_slices", {"context": 2}, "concatenated", "activation"),
    ("key_gradients_of_own_queries_only", KEYS, "concatenated", "activation gradient"),
    ("ring_keys_keep_no_gradients", RING, "concatenated", "activation gradient"),
    ("ring_attends_across_documents", RING, "documents", "activation"),
    ("slices_attend_across_documents", {"context": 2}, "documents", "activation"),
    ("documents_attend_to_each_other", {"data": 2}, "documents", "activation"),
    ("ends_of_documents_are_predicted", {"tensor": 2}, "documents", "loss"),
]


@pytest.mark.parametrize(("bug", "layout", "packing", "kind"), IN_SLICES, ids=lambda v: str(v)[:40])
def test_bug_of_slices_or_documents_is_found(
    cluster: Cluster, bug: str, layout: dict[str, Any], packing: str, kind: str
) -> None:
    chunks = 4 if layout.get("context", 1) > 1 else 1
    config = in_slices(small(layout, {}), chunks, packing)
    findings = findings_of(cluster, config, bug)
    assert findings[0].kind == kind, [str(finding) for finding in findings]


@pytest.mark.parametrize(
    ("bug", "layout", "model", "kind", "said"), CASES, ids=lambda v: str(v)[:40]
)
def test_bug_is_found_and_named(
    cluster: Cluster,
    bug: str,
    layout: dict[str, Any],
    model: dict[str, Any],
    kind: str,
    said: str,
) -> None:
    config = small(layout, model, STEPS.get(bug, 1))
    findings = findings_of(cluster, config, bug)
    kinds = [finding.kind for finding in findings]
    assert kind in kinds, [str(finding) for finding in findings]
    lines = [str(finding) for finding in findings if finding.kind == kind]
    assert any(said in line for line in lines), lines
    assert kinds[0] == kind, [str(finding) for finding in findings]


EXPERTS = {
    "family": "qwen3_moe",
    "experts": 4,
    "expert_intermediate": 8,
    "router_aux_loss_coef": 0.5,
}

# (bug, kind of the first finding)
OF_EXPERTS: list[tuple[str, str]] = [
    ("expert_gradients_scaled_by_ranks", "gradient"),
    ("router_loss_of_own_tokens_alone", "activation gradient"),
    ("router_not_summed_over_tensor", "gradient"),
    ("choices_carry_no_gradient", "activation gradient"),
    ("replicated_weights_counted_by_every_rank", "gradient norm"),
    ("clipping_by_own_norm", "gradient norm"),
    ("dropout_equal_on_sequence_shards", "activation"),
]


def test_experts_without_a_bug_have_no_findings(cluster: Cluster) -> None:
    assert findings_of(cluster, small({"tensor": 2}, EXPERTS, steps=2)) == []


@pytest.mark.parametrize(("bug", "kind"), OF_EXPERTS)
def test_bug_of_experts_is_found(cluster: Cluster, bug: str, kind: str) -> None:
    findings = findings_of(cluster, small({"tensor": 2}, EXPERTS), bug)
    assert findings[0].kind == kind, [str(finding) for finding in findings]


SECOND_TOKENS = DEEPSEEK | {"multi_token_layers": 1, "dense_layers": []}

# (bug, layout, packing, kind of the first finding)
OF_SECOND_TOKENS: list[tuple[str, dict[str, Any], str, str]] = [
    ("second_labels_rolled_in_each_slice", {"context": 2}, "concatenated", "activation gradient"),
    ("next_tokens_rolled_in_each_slice", {"context": 2}, "concatenated", "activation"),
    ("second_labels_of_the_next_document", {"context": 2}, "documents", "activation gradient"),
    ("second_loss_of_local_counts", {"context": 2}, "concatenated", "activation gradient"),
    ("embedding_of_second_tokens_not_summed", {"pipeline": 2}, "concatenated", "gradient"),
]


@pytest.mark.parametrize(
    ("layout", "packing"),
    [({"context": 2}, "concatenated"), ({"context": 2, "pipeline": 2}, "documents")],
    ids=str,
)
def test_second_tokens_without_a_bug_have_no_findings(
    cluster: Cluster, layout: dict[str, Any], packing: str
) -> None:
    config = in_slices(small(layout, SECOND_TOKENS, steps=2), 4, packing)
    assert findings_of(cluster, config) == []


@pytest.mark.parametrize(("bug", "layout", "packing", "kind"), OF_SECOND_TOKENS, ids=str)
def test_bug_of_second_tokens_is_found(
    cluster: Cluster, bug: str, layout: dict[str, Any], packing: str, kind: str
) -> None:
    config = in_slices(small(layout, SECOND_TOKENS), 4, packing)
    findings = findings_of(cluster, config, bug)
    assert findings[0].kind == kind, [str(finding) for finding in findings]


def test_messages_without_tags_are_found(cluster: Cluster) -> None:
    layout = {"pipeline": 2, "virtual": 2, "schedule": "interleaved-1f1b"}
    config = tiny(layout, {})
    assert findings_of(cluster, config, "messages_in_order_without_tags") == [], (
        "receives are posted in the order of the sends: nothing is mixed up even without tags"
    )
