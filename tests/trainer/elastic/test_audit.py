"""Audits of computation: wrong products are found, named, and leave no bit in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.runs.commands import holdfast, lines_of
from support.soak import in_soak, only_in_soak

CONFIG = """
[model]
family = "llama"
layers = 4
hidden = 32
intermediate = 48
heads = 4
kv_heads = 2
vocab = 64
[train]
steps = 10
seq_len = 32
global_batch = 12
micro_batch = 1
context_chunks = 2
[numerics]
tensor_shards = 2
[elastic]
audit_every = 1
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process in it, `alone`."""
    made = tmp_path_factory.mktemp("audit")
    (made / "run.toml").write_text(CONFIG)
    done = train(made, "alone", "elastic.audit_every=0")
    assert done.returncode == 0, done.stderr
    return made


def train(folder: Path, out: str, *keys: str) -> Any:
    words = [word for key in keys for word in ("--set", key)]
    return holdfast(folder, "train", "run.toml", "--out", out, "--resume", "none", *words)


def sick(rank: int, step: int, seconds: float = 60.0) -> str:
    fault = f"{{fault='corrupt-compute', rank={rank}, step={step}, seconds={seconds}}}"
    return f"elastic.chaos=[{fault}]"


def verdicts(folder: Path, out: str) -> list[dict[str, Any]]:
    events = lines_of(folder / out / "events.jsonl")
    return [event for event in events if event["event"] == "wrong_computation"]


def has_the_bits(folder: Path, out: str) -> bool:
    mine, alone = ((folder / name / "digests.jsonl").read_bytes() for name in (out, "alone"))
    return mine == alone


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        in_soak(("parallel.data=3",), 0),
        (("parallel.data=3", "parallel.pipeline=2", "parallel.schedule=zb-h1"), 3),
        in_soak(("parallel.data=3", "parallel.pipeline=2", "parallel.virtual=2",
                 "parallel.schedule=interleaved-1f1b"), 4),
        (("parallel.data=3", "parallel.pipeline=2", "parallel.stretches=2"), 1),
    ],
    ids=["first rank", "split backward", "interleaved", "stretches"],
)  # fmt: skip
def test_a_rank_that_computes_wrongly_is_named_and_left_out(
    folder: Path, layout: tuple[str, ...], rank: int
) -> None:
    """Each audit that looks at its work finds it, and no step has its results."""
    done = train(folder, "sick", *layout, "elastic.enabled=true", sick(rank, 3, 600))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = verdicts(folder, "sick")
    assert (found["ranks"], found["decided"]) == ([rank], True)
    events = lines_of(folder / "sick" / "events.jsonl")
    (lost,) = [event for event in events if event["event"] == "rank_lost"]
    assert lost["rank"] == rank
    assert f"rank {rank} computes wrongly" in done.stdout
    assert "is not replaced on this machine" in done.stdout + done.stderr
    assert not any(event["event"] == "rank_joined" for event in events)
    # Steps before the first audit that looked at its work have its wrong bits; none after.
    if found["step"] == 3:
        assert has_the_bits(folder, "sick")


@pytest.mark.chaos
@only_in_soak
def test_a_tensor_group_is_named_where_its_ranks_share_what_is_wrong(folder: Path) -> None:
    layout = ("parallel.data=3", "parallel.tensor=2", "elastic.enabled=true")
    done = train(folder, "tensor", *layout, sick(2, 1, 600))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = verdicts(folder, "tensor")
    assert found["decided"]
    assert 2 in found["ranks"]
    assert set(found["ranks"]) <= {2, 3}


@pytest.mark.chaos
def test_of_two_replicas_the_one_that_errs_once_is_named(folder: Path) -> None:
    """It gets the other's result when it computes the micro-batch again."""
    layout = ("parallel.data=2", "elastic.enabled=true", "elastic.respawn=false")
    wrong = None
    for step in range(1, 8):  # until an audit looks at a micro-batch with a flipped bit
        done = train(folder, "once", *layout, sick(1, step, 0.0))
        assert done.returncode == 0, done.stdout + done.stderr
        if wrong := verdicts(folder, "once"):
            break
    assert wrong
    assert (wrong[0]["ranks"], wrong[0]["decided"]) == ([1], True)
    assert has_the_bits(folder, "once")


@pytest.mark.chaos
def test_of_two_replicas_that_stay_apart_none_is_believed(folder: Path) -> None:
    layout = ("parallel.data=2", "elastic.enabled=true")
    done = train(folder, "apart", *layout, sick(1, 1, 600))
    assert done.returncode == 3, done.stdout + done.stderr
    (found,) = verdicts(folder, "apart")
    assert (sorted(found["ranks"]), found["decided"]) == ([0, 1], False)
    assert "three replicas would name it" in done.stdout + done.stderr


@pytest.mark.chaos
def test_audits_go_on_after_a_loss_that_leaves_stages_uneven(folder: Path) -> None:
    layout = ("parallel.data=3", "parallel.pipeline=2", "elastic.enabled=true")
    kill = "{fault='kill', rank=5, step=3, phase='backward'}"
    flip = "{fault='corrupt-compute', rank=1, step=6, seconds=600.0}"
    done = train(
        folder, "uneven", *layout, "elastic.respawn=false", f"elastic.chaos=[{kill}, {flip}]"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = verdicts(folder, "uneven")
    assert (found["ranks"], found["decided"]) == ([1], True)


@pytest.mark.slow
@only_in_soak
def test_no_audit_of_sound_ranks_finds_anything(folder: Path) -> None:
    """Dropout, recompute, offload and saves beside it included."""
    layout = ("parallel.data=2", "parallel.pipeline=2", "train.recompute=full", "train.steps=5")
    more = ("model.dropout=0.1", "checkpoint.every=3", "offload.activations=ssd")
    assert train(folder, "plain", *layout, *more, "elastic.audit_every=0").returncode == 0
    done = train(folder, "sound", *layout, *more, "offload.smallest_kib=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(folder, "sound") == []
    plain, sound = ((folder / name / "digests.jsonl").read_bytes() for name in ("plain", "sound"))
    assert plain == sound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("numerics.reduction=fast",), "only exact sums have the same bits on two ranks"),
        (("parallel.shard=gradients",), "a rank then keeps no sums of its own to audit"),
        (("parallel.data=1",), "no other rank can compute a stage's micro-batch"),
    ],
)
def test_what_cannot_be_audited_is_refused(folder: Path, keys: tuple[str, ...], line: str) -> None:
    done = train(folder, "refused", "parallel.data=2", *keys)
    assert done.returncode == 2
    assert line in done.stderr
