"""Small models of transformers, and the weights of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.foreign.megatron_jobs import SIZES

WIDE = {
    "vocab_size": SIZES["vocab"],
    "hidden_size": SIZES["hidden"],
    "num_hidden_layers": SIZES["layers"],
    "intermediate_size": SIZES["ffn"],
    "num_attention_heads": SIZES["heads"],
    "num_key_value_heads": SIZES["kv_heads"],
    "max_position_embeddings": SIZES["max_len"],
}
EXPERTS = {"num_local_experts": SIZES["experts"], "intermediate_size": SIZES["expert_ffn"]}

GPT2 = {
    "vocab_size": SIZES["vocab"],
    "n_embd": SIZES["hidden"],
    "n_layer": SIZES["layers"],
    "n_head": SIZES["heads"],
    "n_positions": SIZES["max_len"],
}


def make_model(kind: str, folder: Path, **keys: Any) -> Any:
    """A model with random weights of a kind that Megatron knows, saved to a folder."""
    import transformers

    torch.manual_seed(11)
    sizes = {} if kind == "GPT2" else WIDE
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Norms and biases that are not all alike.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(str(folder))
    return model


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every weight of a folder of safetensors."""
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
