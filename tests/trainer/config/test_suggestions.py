"""A key that does not exist is answered by what was meant, or by what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import known_keys, load_config
from holdfast.trainer.config.suggestions import PEERS


def refusal(path: Path, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.tensr=2", "parallel.tensr is not a key; did you mean parallel.tensor?"),
        ("train.lr=1", "train.lr is not a key; did you mean optimizer.lr?"),
        ("model.lrr=1", "model.lrr is not a key; did you mean optimizer.lr?"),
        ("train.every=1", "did you mean checkpoint.every or log.every?"),
        ("train.dtype='bf16'", "here it is train.precision ('fp32', 'bf16', 'fp64')"),
        ("train.fp8=true", "here it is train.precision"),
        ("train.grad_accum=4", "a step accumulates the gradients of global_batch / micro_batch"),
        ("train.gradientAccumulationSteps=4", "here it is train.global_batch and"),
        ("train.max-steps=4", "here it is train.steps"),
        ("data.val_split=4", "here it is train.eval_every, train.eval_batches and data.eval"),
        ("model.z_loss=1", "model.z_loss is not a key; [model] has family, layers, hidden"),
        ("model.bias=1", "model.bias is not a key; [model] has family"),
        ("paralel.tensor=2", "[paralel] is not a section; did you mean [parallel]?"),
        ("wandb.name=2", "[wandb] is not a section; there are model, data"),
    ],
)
def test_an_unknown_key_is_answered(smallest: Path, override: str, said: str) -> None:
    assert said in refusal(smallest, override)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr = 1", "lr = 1 is outside a section; write it as optimizer.lr"),
        ("batch_size = 1", "here it is train.global_batch"),
        ("whatever = 1", "write it as [whatever]"),
    ],
)
def test_a_key_outside_a_section_is_answered(smallest: Path, line: str, said: str) -> None:
    smallest.write_text(f"{line}\n{smallest.read_text()}")
    with pytest.raises(ConfigError) as caught:
        load_config(smallest)
    assert said in str(caught.value)


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    names = {key.partition(".")[2] for key in known_keys()}
    sections = {key.partition(".")[0] for key in known_keys()}
    assert not PEERS.keys() & names, "these need no other name"
    for advice in PEERS.values():
        words = advice.replace(";", "").replace(",", "").replace(":", "").split()
        keys = [word for word in words if word.partition(".")[0] in sections and "." in word]
        assert keys or advice.startswith("holdfast train --"), advice
        assert set(keys) <= set(known_keys())


def test_one_path_is_a_list_of_one(smallest: Path) -> None:
    config = load_config(smallest, ["data.kind=text", "data.path=mine.txt"])
    assert config.data.path == ["mine.txt"]
    assert "log.trace_steps = 3: expected a list" in refusal(smallest, "log.trace_steps=3")
