"""Ranks train together only if they are going to train with the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, Store

from holdfast.elastic import Generation
from holdfast.elastic.generation import Identity, Member
from holdfast.parallel.errors import DataError, MembershipError
from holdfast.trainer.elastic.interruption import Interruption
from holdfast.trainer.elastic.run_terms import RunTerms
from holdfast.trainer.run.run_directory import RunDirectory
from holdfast.trainer.terms import Terms, TermsDiffer, config_terms, judge, require_equal_terms
from support.processes.fake_clock import FakeClock
from support.runs.small_runs import make_config

EXACT = {"numerics.reduction": '"exact"', "elastic.enabled": "false"}


def terms(data: str = "d", certificate: str = "c", **config: str) -> Terms:
    named = {key.replace("__", "."): value for key, value in config.items()}
    return Terms(EXACT | named, data, "here", {"torch": "2"}, {"update": certificate})


def test_each_difference_is_one_line_with_all_values_and_their_ranks() -> None:
    found = {rank: terms(train__steps="9" if rank in (1, 2, 5) else "8") for rank in range(6)}
    found[3] = terms(train__steps="8", data="other")
    lines = judge(found).refused
    assert lines[0].startswith("train.steps: 8 on ranks 0,3-4, 9 on ranks 1-2,5; start all with")
    assert lines[1].startswith(
        "data: fingerprint d (here) on ranks 0-2,4-5, fingerprint other (here) on rank 3; "
    )
    assert len(lines) == 2


def test_keys_of_a_machine_may_differ_and_places_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(**sections: dict[str, Any]) -> dict[str, str]:
        return config_terms(make_config(**sections))

    assert of(data={"kind": "text", "path": ["a"]}) == of(data={"kind": "text", "path": ["b"]})
    assert of(log={"every": 7}, offload={"path": "/x"}, elastic={"lighthouse": "n:1"}) == of()
    assert of(train={"threads_per_rank": 2}) != of()
    assert of(checkpoint={"keep": 7}) != of()
    relative = {"path": "checkpoints"}
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    here = of(checkpoint=relative)
    assert here == of(checkpoint={"path": str(tmp_path / "one/../checkpoints")})
    monkeypatch.chdir(tmp_path / "one")
    assert of(checkpoint=relative) != here


def test_other_certificates_are_refused_where_bits_are_promised_or_copies_compared() -> None:
    def verdict(**config: str) -> Any:
        return judge({0: terms(**config), 1: terms(certificate="other", **config)})

    (line,) = verdict().refused
    assert line.startswith("certificate: c on rank 0, other on rank 1; these machines compute")
    fast = verdict(numerics__reduction='"fast"')
    assert not fast.refused
    assert "as numerics.reduction = 'fast' allows" in fast.notes[0]
    assert verdict(numerics__reduction='"fast"', elastic__enabled="true").refused


@dataclass
class Ranks:
    """Ranks as threads, and how each of them ended."""

    store: Store = field(default_factory=HashStore)
    ended: dict[int, Any] = field(default_factory=dict)

    def run(self, count: int, body: Callable[[int, Store], Any]) -> dict[int, Any]:
        def on(rank: int) -> None:
            try:
                self.ended[rank] = body(rank, self.store)
            except Exception as error:
                self.ended[rank] = error

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return self.ended


def test_the_same_lines_are_raised_on_every_rank() -> None:
    def body(rank: int, store: Store) -> Any:
        own = terms(train__steps="9" if rank == 2 else "8")
        return require_equal_terms(lambda: own, rank, range(4), store)

    ended = Ranks().run(4, body)
    assert all(isinstance(error, TermsDiffer) for error in ended.values()), ended
    assert len({str(error) for error in ended.values()}) == 1
    assert "9 on rank 2" in str(ended[0])
    assert set(
        Ranks().run(4, lambda r, s: require_equal_terms(terms, r, range(4), s)).values()
    ) == {()}


@pytest.mark.parametrize("broken", [0, 2])
def test_a_rank_that_cannot_read_its_data_ends_the_wait_of_all(broken: int) -> None:
    def body(rank: int, store: Store) -> Any:
        def own() -> Terms:
            if rank == broken:
                raise DataError('data.path "x": No such file or directory')
            return terms()

        return require_equal_terms(own, rank, range(3), store)

    ended = Ranks().run(3, body)
    assert type(ended.pop(broken)) is DataError
    for error in ended.values():
        assert isinstance(error, TermsDiffer)
        assert str(error) == f'rank {broken}: data.path "x": No such file or directory'


def member(rank: int) -> Member:
    return Member(Identity(rank), f"node {rank}", "host:1", 0, 0, "", False)


@dataclass
class Spec:
    """What of a `WorkerSpec` is used here."""

    rank: int
    settings: Any


@dataclass
class Start:
    run: str


def run_terms(root: Path, rank: int, own: Terms, start: str = "first") -> RunTerms:
    spec: Any = Spec(rank, Start(start))
    return RunTerms(lambda: own, spec, RunDirectory(root), Interruption(), lambda _: None)


def test_newcomers_are_held_to_the_terms_of_this_start_of_the_run(tmp_path: Path) -> None:
    generation = Generation(1, (member(0), member(1)))

    def founded(rank: int, store: Store) -> None:
        run_terms(tmp_path, rank, terms()).compare(generation, PrefixStore("g", store))

    assert Ranks().run(2, founded) == {0: None, 1: None}
    run_terms(tmp_path, 2, terms()).require_admission()
    with pytest.raises(TermsDiffer) as caught:
        run_terms(tmp_path, 2, terms(data="other")).require_admission()
    assert str(caught.value).startswith(
        "data: fingerprint d (here) on the run, fingerprint other (here) on this newcomer; "
    )
    clock = FakeClock()
    with pytest.raises(MembershipError, match="belongs to an earlier start"):
        run_terms(tmp_path, 2, terms(), "second").require_admission(clock=clock, sleep=clock.sleep)


def test_a_newcomer_need_not_know_which_samples_the_run_has_removed(tmp_path: Path) -> None:
    """The ranks with state tell it; its configuration may be older, or newer, than the run's."""

    def founded(rank: int, store: Store) -> None:
        own = terms(data__without="[]")
        run_terms(tmp_path, rank, own).compare(Generation(1, (member(0),)), PrefixStore("g", store))

    Ranks().run(1, founded)
    removed = terms(data__without='[{"samples": [5]}]')
    run_terms(tmp_path, 2, removed).require_admission()
    with pytest.raises(TermsDiffer):
        run_terms(tmp_path, 2, terms(data__seed="7")).require_admission()
