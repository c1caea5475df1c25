"""8-bit weights count times the scales of their blocks, as transformers reads them, or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.parallel.errors import CheckpointError
from support.foreign.conversions import converted

NAME = "model.layers.0.mlp.up_proj.weight"
BLOCK = (4, 8)


def quantised(
    folder: Path, rows: int, columns: int, *, grid: tuple[int, ...], block: Any = BLOCK, **keys: Any
) -> tuple[Path, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator) + 0.01
    folder.mkdir()
    tensors = {NAME: values, f"{NAME}_scale_inv": scales, "model.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    config = {"dtype": "bfloat16", "quantization_config": told, **keys}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, values, scales


@pytest.mark.parametrize(
    ("rows", "columns", "grid", "block"),
    [
        (8, 16, (2, 2), BLOCK),
        (3, 7, (1, 1), BLOCK),
        (8, 16, (), None),
        (8, 16, (8, 1), None),
        (1, 64, (1, 8), BLOCK),
    ],
)
@pytest.mark.parametrize("to", ["hf", "holdfast", "dcp"])
def test_scales_are_applied_as_transformers_does(
    tmp_path: Path, rows: int, columns: int, grid: tuple[int, ...], block: Any, to: str
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    source, values, scales = quantised(tmp_path / "q", rows, columns, grid=grid, block=block)
    done = converted(source, tmp_path / "there", to, dtype="BF16")
    assert done.scaled
    back = tmp_path / "there"
    if to != "hf":
        converted(back, back := tmp_path / "back", "hf")
    found = load_file(back / "model.safetensors")
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.bfloat16)
    assert found.keys() == {NAME, "model.norm.weight"}
    assert torch.equal(found[NAME], theirs)
    assert done.left_out == {f"{NAME}_scale_inv": "applied to its 8-bit weight"}
    described = json.loads((back / "config.json").read_text())
    assert described == {"dtype": "bfloat16"}


def test_a_last_block_may_be_smaller_and_32_bits_keep_the_product(tmp_path: Path) -> None:
    source, values, scales = quantised(tmp_path / "q", 9, 20, grid=(3, 3))
    converted(source, tmp_path / "out", "hf", dtype="F32")
    wide = scales.repeat_interleave(4, 0)[:9].repeat_interleave(8, 1)[:, :20]
    found = load_file(tmp_path / "out/model.safetensors")[NAME]
    assert torch.equal(found, values.float() * wide)


def test_scales_of_a_weight_that_rules_have_turned_are_refused(tmp_path: Path) -> None:
    source, _, _ = quantised(tmp_path / "q", 8, 16, grid=(2, 2))
    (tmp_path / "rules.toml").write_text(
        f"""
format = "turned"
[[rule]]
source = "{NAME}_scale_inv"
target = "whole_scale_inv"
[[rule]]
source = "{NAME}"
target = "whole"
transpose = true
[[rule]]
source = "{{name}}"
target = "{{name}}"
"""
    )
    # A turned weight lies column by column, for which its scales are not laid out.
    with pytest.raises(CheckpointError, match=r"column by column|do not fit"):
        converted(source, tmp_path / "out", "hf", dtype="F32", rules=tmp_path / "rules.toml")


def test_a_copy_keeps_the_bits_and_says_so(tmp_path: Path) -> None:
    source, values, scales = quantised(tmp_path / "q", 8, 16, grid=(2, 2))
    done = converted(source, tmp_path / "out", "hf")
    found = load_file(tmp_path / "out/model.safetensors")
    assert not done.scaled
    assert torch.equal(found[NAME].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found[f"{NAME}_scale_inv"], scales)
    described = json.loads((tmp_path / "out/config.json").read_text())
    assert described["quantization_config"]["quant_method"] == "fp8"


def test_what_cannot_be_scaled_is_refused(tmp_path: Path) -> None:
    def refused(name: str, said: str, dtype: str = "BF16", **keys: Any) -> None:
        sizes: dict[str, Any] = {"rows": 8, "columns": 16, "grid": (2, 2), **keys}
        source, _, _ = quantised(tmp_path / name, **sizes)
        with pytest.raises(CheckpointError, match=said):
            converted(source, tmp_path / "out", "hf", dtype=dtype)

    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors"):
        told = {"quant_method": method}
        refused(method, f"is quantised by {method}", quantization_config=told)
    refused("grid", "do not fit both", grid=(3, 3))
    # Of 12 rows in blocks of 8, transformers would make two blocks of 6.
    refused("ambiguous", "do not fit both", rows=12, grid=(2, 1), block=(8, 16))
    refused("three", "matrices with scales", grid=(2, 2, 1))
    refused("again", "scales already", dtype="F8_E4M3")
    source, values, scales = quantised(tmp_path / "other", 8, 16, grid=(2, 2))
    for name, tensors in {
        "weight_scale": {NAME: values, f"{NAME}_scale": scales},
        "no scales": {NAME: values},
    }.items():
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"F8_E4M3 and has .*{name}"):
            converted(source, tmp_path / "out", "hf", dtype="BF16")
    assert not (tmp_path / "out").exists()


def test_a_quantised_llama_goes_to_megatron_and_back(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(
        str(tmp_path / "hf")
    )
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, value in load_file(tmp_path / "hf/model.safetensors").items():
        if "proj" not in name:
            tensors[name] = expected[name] = value.bfloat16()
            continue
        rows, columns = value.shape
        scales = torch.rand(-(-rows // 4), -(-columns // 8)) / 100
        wide = scales.repeat_interleave(4, 0)[:rows].repeat_interleave(8, 1)[:, :columns]
        tensors[name] = (value / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        expected[name] = (tensors[name].float() * wide).bfloat16()
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    described = json.loads((tmp_path / "hf/config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    (tmp_path / "hf/config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError):
        converted(tmp_path / "hf", tmp_path / "megatron", "megatron")
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron", dtype="BF16")
    converted(tmp_path / "megatron", tmp_path / "back", "hf")
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
