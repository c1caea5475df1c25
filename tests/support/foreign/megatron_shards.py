"""The weights of 2 x 2 ranks of Megatron-Core put together by torch, under Hugging Face names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.foreign.megatron_jobs import SIZES

LAYERS_A_STAGE = SIZES["layers"] // 2


def huggingface_weights(
    shards: list[dict[str, Any]], kind: str = "weights", expert: int = 1
) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, from the ranks' own, as Megatron's code defines
    them.
    """
    place = {(shard["tp"], shard["pp"]): shard[kind] for shard in shards}
    heads, kv_heads = SIZES["heads"], SIZES["kv_heads"]
    dim = SIZES["hidden"] // heads

    def rows(name: str, stage: int, axis: int = 0) -> Tensor:
        return torch.cat([place[index, stage][name] for index in range(2)], dim=axis)

    found = {
        "model.embed_tokens.weight": rows("embedding.word_embeddings.weight", 0)[: SIZES["vocab"]],
        "model.norm.weight": place[0, 1]["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in place[0, 1]:
        tied = torch.equal(
            rows("output_layer.weight", 1), rows("embedding.word_embeddings.weight", 0)
        )
        if not tied:
            found["lm_head.weight"] = rows("output_layer.weight", 1)[: SIZES["vocab"]]
    for stage in range(2):
        for local in range(LAYERS_A_STAGE):
            theirs = f"decoder.layers.{local}."
            ours = f"model.layers.{stage * LAYERS_A_STAGE + local}."
            qkv = rows(f"{theirs}self_attention.linear_qkv.weight", stage)
            grouped = qkv.view(kv_heads, heads // kv_heads + 2, dim, SIZES["hidden"])
            query, key, value = grouped.split([heads // kv_heads, 1, 1], dim=1)
            for name, part in (("q", query), ("k", key), ("v", value)):
                found[f"{ours}self_attn.{name}_proj.weight"] = part.reshape(-1, SIZES["hidden"])
            found[f"{ours}self_attn.o_proj.weight"] = rows(
                f"{theirs}self_attention.linear_proj.weight", stage, 1
            )
            if f"{theirs}mlp.router.weight" in place[0, stage]:
                router = place[0, stage][f"{theirs}mlp.router.weight"]
                found[f"{ours}block_sparse_moe.gate.weight"] = router
                found |= expert_weights(place, stage, theirs, ours, expert)
            else:
                pairs = [place[i, stage][f"{theirs}mlp.linear_fc1.weight"].chunk(2) for i in (0, 1)]
                found[f"{ours}mlp.gate_proj.weight"] = torch.cat([gate for gate, _ in pairs])
                found[f"{ours}mlp.up_proj.weight"] = torch.cat([up for _, up in pairs])
                down = rows(f"{theirs}mlp.linear_fc2.weight", stage, 1)
                found[f"{ours}mlp.down_proj.weight"] = down
            for norm, name in (
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
                ("self_attention.q_layernorm", "self_attn.q_norm"),
                ("self_attention.k_layernorm", "self_attn.k_norm"),
            ):
                if f"{theirs}{norm}.weight" in place[0, stage]:
                    found[f"{ours}{name}.weight"] = place[0, stage][f"{theirs}{norm}.weight"]
    return found


def gpt2_weights(shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Every weight of a tied GPT-2 under its Hugging Face name."""
    place = {(shard["tp"], shard["pp"]): shard["weights"] for shard in shards}

    def rows(name: str, stage: int, axis: int = 0) -> Tensor:
        return torch.cat([place[index, stage][name] for index in range(2)], dim=axis)

    found = {
        "transformer.wte.weight": rows("embedding.word_embeddings.weight", 0)[: SIZES["vocab"]],
        "transformer.wpe.weight": place[1, 0]["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": place[1, 1]["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": place[1, 1]["decoder.final_layernorm.bias"],
    }
    assert torch.equal(rows("output_layer.weight", 1), rows("embedding.word_embeddings.weight", 0))
    for stage in range(2):
        for local in range(LAYERS_A_STAGE):
            theirs = f"decoder.layers.{local}."
            ours = f"transformer.h.{stage * LAYERS_A_STAGE + local}."
            for what in ("weight", "bias"):
                # Query, key and value of each head, to all queries, all keys and all values.
                qkv = rows(f"{theirs}self_attention.linear_qkv.{what}", stage)
                heads = qkv.view(SIZES["heads"], 3, -1, *qkv.shape[1:])
                found[f"{ours}attn.c_attn.{what}"] = heads.transpose(0, 1).reshape(qkv.shape)
                found[f"{ours}mlp.c_fc.{what}"] = rows(f"{theirs}mlp.linear_fc1.{what}", stage)
                for norm, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
                    found[f"{ours}{name}.{what}"] = place[0, stage][f"{theirs}{norm}.{what}"]
            for module, name in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                found[f"{ours}{name}.weight"] = rows(f"{theirs}{module}.weight", stage, 1)
                found[f"{ours}{name}.bias"] = place[1, stage][f"{theirs}{module}.bias"]
    # GPT-2's linear layers have their weights the other way round.
    linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: value.T if name.endswith(linear) else value for name, value in found.items()}


def expert_weights(
    place: dict[tuple[int, int], dict[str, Tensor]], stage: int, theirs: str, ours: str, expert: int
) -> dict[str, Tensor]:
    """Experts that are whole on one of two ranks (expert 2), or cut over both."""
    found = {}
    for number in range(SIZES["experts"]):
        local = number % (SIZES["experts"] // expert)
        ranks = [number * expert // SIZES["experts"]] if expert > 1 else [0, 1]
        name = f"{theirs}mlp.experts.local_experts.{local}.linear_"
        pairs = [place[i, stage][f"{name}fc1.weight"].chunk(2) for i in ranks]
        into = f"{ours}block_sparse_moe.experts.{number}."
        found[f"{into}w1.weight"] = torch.cat([gate for gate, _ in pairs])
        found[f"{into}w3.weight"] = torch.cat([up for _, up in pairs])
        found[f"{into}w2.weight"] = torch.cat(
            [place[i, stage][f"{name}fc2.weight"] for i in ranks], dim=1
        )
    return found


def by_stage(shards: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Of 2 x 2 ranks, by names whose layers count across all stages: as two stages without
    chunks hold it.
    """
    held: dict[tuple[int, int], dict[str, Tensor]] = {
        (index, stage): {} for index in range(2) for stage in range(2)
    }
    for shard in shards:
        for name, value in shard[kind].items():
            stage, parts = shard["pp"], name.split(".")
            if name.startswith("decoder.layers."):
                stage, local = divmod(int(parts[2]), LAYERS_A_STAGE)
                parts[2] = str(local)
            held[shard["tp"], stage][".".join(parts)] = value
    return [{"tp": index, "pp": stage, "weights": own} for (index, stage), own in held.items()]
