"""`holdfast generate`: text from a run's checkpoint, as transformers makes it from the folder."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from holdfast.launch.cli import application
from holdfast.launch.text import sources
from holdfast.parallel.errors import CheckpointError, ConfigError, HoldfastError
from support.runs.commands import holdfast, lines_of

TEXT = "Tyger Tyger, burning bright, in the forests of the night; caf\u00e9 \u4f60\u597d.\n"
CONFIG = """
[model]
family = "llama"
layers = 2
hidden = 32
heads = 4
kv_heads = 2
vocab = 257
max_seq_len = 96
[data]
kind = "text"
path = ["poem.txt"]
[[data.validation]]
name = "own"
path = ["own.txt"]
[train]
steps = 12
seq_len = 32
global_batch = 8
micro_batch = 4
eval_every = 6
eval_batches = 2
context_chunks = 2
vocab_chunk = 100
[numerics]
tensor_shards = 4
[parallel]
tensor = 2
[optimizer]
lr = 2e-2
warmup_steps = 1
[checkpoint]
every = 6
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "poem.txt").write_text(TEXT * 40)
    (folder / "own.txt").write_text(TEXT[::-1] * 5)
    (folder / "run.toml").write_text(CONFIG)
    done = holdfast(folder, "train", "run.toml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """The threads and kernels of other tests, after a command that takes those of a rank."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyrefly: ignore
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # pyrefly: ignore


def said(*arguments: str, stdin: str | None = None) -> Result:
    """What a command prints, in this process; its errors are raised."""
    done = CliRunner().invoke(
        application(arguments[0]), arguments, input=stdin, catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done


def answer(*arguments: str, stdin: str | None = None) -> Any:
    return json.loads(said(*arguments, "--json", stdin=stdin).stdout)


def refused(kind: type[HoldfastError], *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        application(arguments[0])(arguments, standalone_mode=False)
    return str(caught.value)


@pytest.mark.mp
@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(run / "checkpoints" / "step-00000012")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = ["Ty", "in the forests", "caf\u00e9 "]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    found = answer("generate", str(run), *options, "--tokens", "40")
    assert (found["model"], found["step"]) == (folder, 12)
    assert [one["prompt"] for one in found["texts"]] == prompts
    for one in found["texts"]:
        ids = tokenizer(one["prompt"], return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=40, do_sample=False)[0].tolist()
        new = made[ids["input_ids"].shape[1] :]
        assert one["tokens"] == [token for token in new if token != 256]
        text = tokenizer.decode(made, skip_special_tokens=True)
        assert one["prompt"] + one["text"] == text
        assert one["end"] == ("text" if 256 in new else "tokens")


@pytest.mark.mp
def test_text_goes_to_standard_output_and_is_the_same_again(run: Path) -> None:
    latest = run / "checkpoints"
    one = said("generate", str(run), "--prompt", "Ty", "--tokens", "8").stdout
    assert one.endswith("\n")
    found = answer("generate", str(latest), "--tokens", "8", stdin="Ty\n")
    [text] = found["texts"]
    assert (text["prompt"], text["text"] + "\n") == ("Ty", one)
    drawn = ("generate", str(run), "--prompt", "Ty", "--temperature", "2", "--tokens", "8")
    several = said(*drawn, "--samples", "3", "--prompt", "in").stdout
    heads = [line for line in several.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {p}, sample {s}" for p in (1, 2) for s in (1, 2, 3)]
    assert said(*drawn, "--samples", "3", "--prompt", "in").stdout == several
    texts = [one["text"] for one in answer(*drawn, "--samples", "3")["texts"]]
    assert len(set(texts)) == 3
    assert all(text in several for text in texts)
    other = answer(*drawn, "--samples", "3", "--seed", "1")["texts"]
    assert texts != [one["text"] for one in other]


@pytest.mark.mp
def test_prompts_come_from_files_and_may_be_empty(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_text("in the\n")
    given = ("--prompt-file", str(file), "--tokens", "4", "--prompt", "")
    texts = answer("generate", str(run), *given)["texts"]
    assert [one["prompt"] for one in texts] == ["", "in the"]
    assert len(texts[0]["tokens"]) == 4, "an empty prompt begins as documents do"
    file.write_bytes(b"a\xff")
    assert "not UTF-8 at byte 1" in refused(ConfigError, "generate", str(run), *given)
    missing = refused(ConfigError, "generate", str(run), "--prompt-file", str(tmp_path / "no"))
    assert "cannot be read: No such file" in missing


@pytest.mark.mp
def test_a_text_ends_where_sequences_do(run: Path) -> None:
    done = said("generate", str(run), "--prompt", "x" * 90, "--tokens", "50")
    assert "the text ends after 6 tokens" in done.stderr
    too_long = refused(ConfigError, "generate", str(run), "--prompt", "x" * 96)
    assert "has 96 tokens, and the model's sequences have 96 at most" in too_long


@pytest.mark.mp
def test_what_cannot_be_generated_from_is_named(run: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "a")
    nothing = refused(ConfigError, "generate", str(tmp_path / "none"), *prompt)
    assert "is neither a checkpoint, nor a run with one, nor a Hugging Face folder" in nothing
    assert "all would be the same" in refused(
        ConfigError, "generate", str(run), *prompt, "--samples", "2"
    )
    assert "allowed are 'auto', 'cpu', 'cuda'" in refused(
        ConfigError, "generate", str(run), *prompt, "--device", "tpu"
    )
    words = refused(ConfigError, "generate", str(run), *prompt, "--tokenizer", "words.json")
    assert 'words.json": cannot be read' in words.replace("'", '"')


@pytest.mark.mp
def test_a_live_run_that_removes_a_checkpoint_gives_its_newer_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live"
    shutil.copytree(run / "checkpoints", live / "checkpoints")
    newest, older = (live / "checkpoints" / f"step-000000{step}" for step in ("12", "06"))
    aside = newest.rename(tmp_path / "aside")
    (live / "checkpoints" / "latest").write_text(f"{older.name}\n")
    load = sources.load

    def remove_and_load(request: Any, *arguments: Any) -> Any:
        """The run commits a newer checkpoint, and removes this one."""
        if aside.exists():
            aside.rename(newest)
            shutil.rmtree(older)
        return load(request, *arguments)

    monkeypatch.setattr(sources, "load", remove_and_load)
    found = answer("generate", str(live), "--prompt", "Ty", "--tokens", "4")
    assert found["step"] == 12
    newest.rename(aside)
    shutil.copytree(aside, older)
    gone = refused(CheckpointError, "generate", str(older), "--prompt", "Ty")
    assert "was removed while it was read" in gone


@pytest.mark.mp
def test_the_loss_on_a_run_s_own_held_out_data_is_that_of_its_training_bit_for_bit(
    run: Path,
) -> None:
    """The run has two tensor ranks; shards, slices and chunks of the vocabulary fix its bits."""
    logged = [e for e in lines_of(run / "events.jsonl") if e["event"] == "evaluated"]
    assert [(e["step"], e["set"]) for e in logged] == [
        (step, name) for step in (6, 12) for name in ("held_out", "own")
    ]
    scores: list[dict[str, Any]] = []
    for step in (6, 12):
        found = answer("evaluate", str(run / "checkpoints" / f"step-{step:08d}"))
        scores = found["scores"]
        expected = {e["set"]: e["loss_hex"] for e in logged if e["step"] == step}
        assert found["step"] == step
        assert {score["name"]: score["loss_hex"] for score in scores} == expected
        assert [score["tokens"] for score in scores] == [2 * 8 * 32, 8 * 32]
    assert answer("evaluate", str(run), "--data", str(run / "config.toml"))["scores"] == scores
    more, _ = answer("evaluate", str(run), "--batches", "3")["scores"]
    assert more["tokens"] == 3 * 8 * 32
    separators = more["tokens"] - more["bytes"]
    assert 0 <= separators <= 3 * 8, "the token between documents stands for no text"


@pytest.mark.mp
@pytest.mark.slow
def test_the_loss_on_text_is_that_of_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(run / "checkpoints" / "step-00000012")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).double()
    texts = {"short.txt": TEXT[:20], "long.txt": TEXT * 3 + "the end"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "both.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts.values())
    )
    options = [part for name in (*texts, "both.jsonl") for part in ("--text", str(tmp_path / name))]
    found = answer("evaluate", str(run), *options, "--context", "24", "--stride", "7")["scores"]

    def loss_sum(text: str) -> float:
        """By the recipe of transformers' documentation, each token counted once."""
        ids = torch.tensor([[256, *tokenizer(text)["input_ids"]]])
        total, before = 0.0, 1
        ends = [min(24, ids.shape[1] - 1)]
        while ends[-1] < ids.shape[1] - 1:
            ends.append(min(ids.shape[1] - 1, ends[-1] + 7))
        for end in ends:
            window = ids[:, max(0, end - 24) : end + 1]
            targets = window.clone()
            count = end + 1 - before
            targets[:, :-count] = -100
            total += model(window, labels=targets).loss.item() * count
            before = end + 1
        return total

    sums = [loss_sum(text) for text in texts.values()]
    sizes = [len(text.encode()) for text in texts.values()]
    for score, total, size in zip(found, (*sums, sum(sums)), (*sizes, sum(sizes)), strict=True):
        assert (score["tokens"], score["bytes"]) == (size, size)
        assert score["loss"] == pytest.approx(total / size, rel=1e-5)
        assert score["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
        assert score["perplexity_per_byte"] == pytest.approx(math.exp(total / size), rel=1e-4)


@pytest.mark.mp
def test_scores_are_lines_for_a_person(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_text(TEXT)
    lines = said("evaluate", str(run), "--text", str(file), "--data", str(run / "config.toml"))
    first, second, third = lines.stdout.splitlines()
    assert first.startswith(f"{file}: ")
    assert first.endswith(f"({len(TEXT.encode())} tokens, {len(TEXT.encode())} bytes)")
    assert second.startswith("held_out: ")
    assert third.startswith("own: ")
    assert " nats a token, perplexity " in second
    assert " bits a byte, perplexity " in second


@pytest.mark.mp
def test_what_cannot_be_evaluated_is_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_text("")

    def message(*options: str) -> str:
        return refused(ConfigError, "evaluate", str(run), *options)

    assert "no token of it is predicted" in message("--text", str(file))
    assert '--text "nothing": No such file' in message("--text", "nothing")
    assert "takes 96 tokens at most" in message("--text", str(file), "--context", "97")
    assert "--stride 33: use 1 to 32, the context" in message("--text", str(file), "--stride", "33")
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace("seq_len = 32", "seq_len = 100"))
    assert "train.seq_len = 100" in message("--data", str(other))


TASK = """
task: tyger
dataset_path: json
dataset_kwargs:
  data_files:
    test: {lines}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[answer, wrong]}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.mp
@pytest.mark.slow
def test_a_task_of_one_s_own_is_evaluated_by_lm_eval(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lines = [
        {
            "question": "Tyger Tyger, burning",
            "answer": " bright",
            "wrong": "\u2603\u2603\u2603\u2603",
        },
        {"question": "in the forests", "answer": "\u2603\u2603\u2603\u2603", "wrong": " of the "},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tyger.yaml").write_text(TASK.format(lines=file))
    options = ("--tasks", "tyger", "--task-folder", str(tmp_path))
    found = answer("evaluate", str(run), *options)
    assert found["scores"] == []
    assert found["tasks"]["tyger"]["acc"] == 0.5


@pytest.mark.mp
def test_tasks_are_asked_of_lm_eval_with_the_folder_as_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> Any:
        asked.update(arguments)
        metrics = {"alias": "tyger", "acc,none": 0.25, "acc_stderr,none": "N/A", "em,strict": 1}
        return {"results": {"tyger": metrics}}

    def manager(include_path: str | None) -> Any:
        return SimpleNamespace(all_tasks=["tyger", "sky"], path=include_path)

    modules = {
        "accelerate": {},
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": manager},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    options = ("--tasks", "tyger", "--task-folder", "own", "--batch", "3")
    assert said("evaluate", str(run), *options).stdout == "tyger: acc 0.2500, em,strict 1.0000\n"
    assert asked.pop("task_manager").path == "own"
    assert asked == {
        "model": "hf",
        "model_args": {"pretrained": str(run / "checkpoints" / "step-00000012")},
        "tasks": ["tyger"],
        "batch_size": 3,
        "device": "cpu",
    }
    assert "did you mean tyger?" in refused(ConfigError, "evaluate", str(run), "--tasks", "tygr")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    missing = refused(ConfigError, "evaluate", str(run), "--tasks", "sky")
    assert "pip install 'holdfast[eval]'" in missing
