"""Configurations: every broken rule is one line that says what to change, and none is found too
late.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import config_notes
from holdfast.trainer.config.loading import check_config, dump_toml, load_config

MISSPELLED = (
    *("s3:/bucket/run", "s3:bucket/run", "s3//bucket/run", "S3:/x", "s3:", "s3:///run", "s3://"),
    *("://x", ":/x", "file:/x", "file://", "hdfs:/x", "new-store:/x", "https:/host/x"),
)
"""URLs that are none, and would be names of folders."""


def test_defaults_are_those_of_the_contract(smallest: Path) -> None:
    config = load_config(smallest)
    assert (config.model.heads, config.model.kv_heads, config.model.vocab) == (6, 3, 320)
    assert (config.train.global_batch, config.train.micro_batch, config.train.seed) == (16, 2, 1234)
    assert (config.numerics.reduction, config.numerics.fraction_bits) == ("exact", 44)
    assert config.model.intermediate == 224
    assert config.optimizer.block_elements == 2**20
    assert config.parallel.schedule == "1f1b"


def test_the_resolved_file_reads_back_equal(smallest: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-4", "log.trace_steps=[1, 2]", "data.kind=text"]
    overrides.append('data.path=["a \\"b\\"", "c\\\\d"]')
    config = load_config(smallest, overrides)
    written = tmp_path / "resolved.toml"
    written.write_text(dump_toml(config))
    assert load_config(written) == config
    assert config.optimizer.lr == 1e-4
    assert config.data.path == ['a "b"', "c\\d"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "train.steps = 'many': expected `int`"),
        ("model.hidden=1.5", "model.hidden = 1.5: expected `int`"),
        ("parallel.schedule=zb", "allowed are 'gpipe', '1f1b'"),
        ("parallel.reduce_dtype=bf16", "leave it out, or set numerics.reduction = 'fast'"),
        ("parallel.reduce_dtype=fp8", "parallel.reduce_dtype = 'fp8'"),
        ("train.steps", "--set section.key=value"),
        ("train.steps=0", "train.steps = 0: must be 1 or more"),
        ("model.heads=5", "model.hidden = 96 is not divisible by model.heads = 5"),
        ("model.kv_heads=4", "model.heads = 6 is not divisible by model.kv_heads = 4"),
        ("model.hidden=97", "rotary embedding needs an even one"),
        ("model.hidden=18 and model.heads=6", "rotary embedding needs an even one"),
        ("parallel.tensor=4", "model.heads = 6 is not divisible by parallel.tensor = 4"),
        ("parallel.tensor=2", "model.kv_heads = 3 and parallel.tensor = 2"),
        ("parallel.pipeline=4", "model.layers = 6 is not divisible"),
        ("parallel.virtual=2", "'1f1b' has one chunk per rank"),
        ("parallel.blocks_per_chunk=[4, 2]", "must be 1 numbers"),
        (
            "train.micro_batch=3",
            "train.global_batch = 16 is not divisible by train.micro_batch = 3",
        ),
        ("parallel.data=9", "fewer than parallel.data = 9"),
        ("train.seq_len=4096", "exceeds model.max_seq_len"),
        ("optimizer.lr=0", "optimizer.lr = 0.0: must be greater than 0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1] = 1.0"),
        ("optimizer.min_lr=1", "exceeds optimizer.lr"),
        ("model.dropout=1.0", "model.dropout = 1.0"),
        ("numerics.fraction_bits=63", "must be at most 60"),
        ("log.trace_steps=[0]", "steps are counted from 1"),
        ("data.eval_fraction=1.5", "data.eval_fraction = 1.5"),
        ("parallel.expert=2", "model.family = 'llama' has no experts"),
        ("offload.most_share=1.5", "must be at most 1"),
        (
            "offload.least_share=0.9 and offload.most_share=0.5",
            "the least must not be above the most",
        ),
        ("offload.activations=host and train.device=cpu", "in host memory already"),
        ("offload.staging_mib=4096", "must be at most 1024"),
        ("train.recompute=auto", "say how much memory activations may take"),
        ("elastic.activation_headroom=-0.1", "must be 0 or more of the fullest rank's activation"),
        ("elastic.redundancy=3", "must be at most 2 shadows per block"),
        *((f"checkpoint.path='{place}'", f"checkpoint.path = '{place}'") for place in MISSPELLED),
        ("offload.path='s3://bucket/x'", "a URL cannot be used here"),
        ("offload.path='s3:/bucket/x'", "a URL cannot be used here"),
        *(
            (f"elastic.lighthouse='{address}'", "must be HOST:PORT or http://HOST:PORT")
            for address in ("../..", "1", "h:0", "h:65536", "h:1/x", "ftp://h:1", "a b:1", "-h:1")
        ),
    ],
)
def test_a_broken_rule_says_what_to_change(smallest: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(smallest, override.split(" and "))
    matching = [line for line in str(caught.value).splitlines() if said in line]
    assert len(matching) == 1, str(caught.value)


def test_mpi_carries_cpu_tensors(smallest: Path) -> None:
    overrides = ["parallel.backend=mpi", "train.device=cuda"]
    with pytest.raises(ConfigError, match="'mpi' carries CPU tensors"):
        load_config(smallest, overrides)
    assert load_config(smallest, ["parallel.backend=mpi", "train.device=cpu"])


def test_byte_text_needs_a_vocabulary_of_bytes(smallest: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab = 200 is too small"):
        load_config(smallest, ["data.kind=text", "model.vocab=200"])


def test_wanted_workers_decide_the_replicas_that_are_not_set(smallest: Path) -> None:
    pipeline = ["parallel.pipeline=2"]
    assert load_config(smallest, pipeline, workers=6).parallel.data == 3
    assert load_config(smallest, pipeline).parallel.data == 1
    with pytest.raises(ConfigError, match=r"--nproc 3: a replica of pipeline 2 needs 2 workers"):
        load_config(smallest, pipeline, workers=3)
    fixed = load_config(smallest, [*pipeline, "parallel.data=2"], workers=6)
    with pytest.raises(ConfigError, match=r"6 workers were started, but .* needs 4; change"):
        check_config(fixed, 6)


def test_a_warm_up_that_outlasts_the_run_is_noted(smallest: Path) -> None:
    assert list(config_notes(load_config(smallest, ["optimizer.warmup_steps=100"]))) == []
    [note] = config_notes(load_config(smallest, ["optimizer.warmup_steps=101"]))
    assert "the learning rate does not reach optimizer.lr" in note


def test_sequences_must_split_over_tensor_ranks(smallest: Path) -> None:
    overrides = ["parallel.tensor=3", "train.seq_len=128"]
    with pytest.raises(ConfigError, match=r"parallel\.sequence_parallel = false"):
        load_config(smallest, overrides)
    assert load_config(smallest, [*overrides, "parallel.sequence_parallel=false"])


def test_the_number_of_workers_must_be_that_of_the_layout(smallest: Path) -> None:
    config = load_config(smallest, ["parallel.data=2"])
    check_config(config, 2)
    with pytest.raises(ConfigError, match=r"3 workers were started, but .* needs 2"):
        check_config(config, 3)


def test_required_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nfamily = "llama"\nlayers = 2\n')
    with pytest.raises(ConfigError, match=r"model\.hidden is missing"):
        load_config(path)
    path.write_text("[train]\nsteps = 2\n")
    with pytest.raises(ConfigError, match=r"\[model\] is missing"):
        load_config(path)


@pytest.mark.parametrize(
    "place",
    [
        *("s3://bucket/run", "file:///x/run", "memory://run", "new-store://x"),
        *("here", "/there/s3:/x", "./s3:/x", "~/x", "a b", "runs/a:/b", "run:1", "s3", "12:30"),
    ],
)
def test_paths_and_urls_are_places_of_checkpoints(smallest: Path, place: str) -> None:
    found = load_config(smallest, [f"checkpoint.path='{place}'"]).checkpoint
    assert (found.path, bool(found.url)) == (place, "://" in place)


@pytest.mark.parametrize(
    "address", ["node0:29510", "http://10.0.0.1:1", "[::1]:65535", "a.b-c.d:80"]
)
def test_a_lighthouse_may_be_named_by_host_and_port(smallest: Path, address: str) -> None:
    assert load_config(smallest, [f"elastic.lighthouse='{address}'"]).elastic.lighthouse == address


def test_a_byte_order_mark_before_a_configuration_is_passed_over(smallest: Path) -> None:
    expected = load_config(smallest)
    smallest.write_bytes(b"\xef\xbb\xbf" + smallest.read_bytes())
    assert load_config(smallest) == expected
