"""Whatever a foreign checkpoint's files say, planning its conversion ends with a plan or a line."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from holdfast.checkpoint.convert.work.journal import ConversionJournal, Lock
from holdfast.checkpoint.convert.work.request import Conversion, check, prepare
from holdfast.parallel.errors import CheckpointError, ConfigError, HoldfastError
from support.runs.mutations import COUNT, mutated

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
    "vocab_size": 11, "num_hidden_layers": 0, "num_attention_heads": 2, "num_key_value_heads": 1,
    "torch_dtype": "float32", "intermediate_size": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in NAMES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of two files of weights, with an index."""
    folder = tmp_path / "source"
    folder.mkdir()
    where = {}
    for number, (name, tensor) in enumerate(weights().items()):
        file = f"model-{number % 2}.safetensors"
        where.setdefault(file, {})[name] = tensor
    for file, held in where.items():
        save_file(held, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, held in where.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def planned(source: Path, to: str = "holdfast", dtype: str = "") -> bool:
    """Whether a conversion is planned; if it is refused, then in printable lines."""
    told = ""
    try:
        prepare(Conversion(source, source.parent / "out", to, dtype=dtype))
    except HoldfastError as error:
        told = str(error)
    assert told.replace("\n", "").isprintable()
    return not told


def test_the_sound_folder_is_planned(folder: Path) -> None:
    assert planned(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_any_small_file_is_read_or_refused(folder: Path, name: str) -> None:
    document = json.loads((folder / name).read_bytes())
    for number in range(COUNT):
        (folder / name).write_bytes(mutated(document, number))
        planned(folder, ("holdfast", "hf", "megatron")[number % 3], ("", "BF16")[number % 2])


def test_any_header_is_read_or_refused(folder: Path) -> None:
    path = folder / "model-0.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for number in range(COUNT):
        text = mutated(header, number)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        planned(folder)


def _dcp(folder: Path) -> Path:
    dcp.save(weights(), checkpoint_id=folder, no_dist=True)
    return folder / ".metadata"


def _bin(folder: Path) -> Path:
    folder.mkdir()
    torch.save(weights(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "pytorch_model.bin"


def _universal(folder: Path) -> Path:
    parts = folder / "global_step1" / "zero" / "model.norm.weight"
    parts.mkdir(parents=True)
    torch.save({"param": torch.ones(8), "cat_dim": 0}, parts / "fp32.pt")
    (folder / "latest_universal").write_text("global_step1")
    torch.save({"module": {}, "ds_config": {}}, parts.parents[1] / "mp_rank_00_model_states.pt")
    return parts.parents[1] / "mp_rank_00_model_states.pt"


def _megatron(folder: Path) -> Path:
    place = folder / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    state = {
        "args": {"num_layers": 1},
        "model": {"embedding.weight": torch.ones(4, 2)},
        "iteration": 1,
    }
    torch.save(state, place / "model_optim_rng.pt")
    return place / "model_optim_rng.pt"


@pytest.mark.parametrize("make", [_dcp, _bin, _universal, _megatron])
def test_any_pickle_is_read_or_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Bytes of a pickle are changed, within the archive of torch.save where there is one."""
    path = make(tmp_path / "source")
    content = path.read_bytes()
    is_archive = zipfile.is_zipfile(path)
    pickled = _pickle_in(path) if is_archive else content
    for number in range(COUNT // 3):
        chance = random.Random(number)
        changed = bytearray(pickled)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        if is_archive:
            _with_pickle(path, content, bytes(changed))
        else:
            path.write_bytes(changed)
        planned(tmp_path / "source")


def _pickle_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("data.pkl")]
        return archive.read(name)


def _with_pickle(path: Path, content: bytes, pickled: bytes) -> None:
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, held in entries:
            archive.writestr(
                entry.filename, pickled if entry.filename.endswith("data.pkl") else held
            )


def test_a_pickle_that_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    path = _bin(tmp_path / "source")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(CheckpointError, match="compressed"):
        prepare(Conversion(tmp_path / "source", tmp_path / "out", "hf"))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-0.safetensors"]
)
def test_a_pipe_is_named_and_never_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}.*pipe"):
        prepare(Conversion(folder, folder.parent / "out", "holdfast"))


TAGS: dict[str, bytes] = {
    "long": b"a" * 5000,
    "digits": b"9" * 6000,
    "name and line": b"a\nb",
    "no text": b"\xff\xfe\x00a",
    "a NUL": b"a\0b",
    "elsewhere": b"../..",
    "no number": b"x",
    "negative": b"-5",
    "a terminal's": b"\x1b]0;x\x07",
    "empty": b"",
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("deepspeed", "latest"),
        ("deepspeed-universal", "latest_universal"),
        ("megatron", "latest_checkpointed_iteration.txt"),
    ],
)
def test_any_name_of_the_newest_save_is_found_or_refused(
    tmp_path: Path, form: str, name: str, tag: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(TAGS[tag])
    for found in (form, "auto"):
        with pytest.raises(HoldfastError) as error:
            prepare(Conversion(source, tmp_path / "out", "holdfast", source_format=found))
        assert str(error.value).isprintable()


@pytest.mark.parametrize("form", ["deepspeed", "auto"])
def test_a_terabyte_of_name_is_not_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "latest").touch()
    os.truncate(tmp_path / "latest", 1 << 40)
    with pytest.raises(HoldfastError):
        prepare(Conversion(tmp_path, tmp_path / "out", "holdfast", source_format=form))


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 6000, 'a = "\x1b"', "a = 1"])
def test_rules_that_are_none_are_refused_in_a_line(folder: Path, text: str) -> None:
    rules = folder.parent / "rules.toml"
    rules.write_text(text)
    with pytest.raises(ConfigError, match="not a file of rules") as error:
        prepare(Conversion(folder, folder.parent / "out", "holdfast", rules=rules))
    assert str(error.value).isprintable()


def test_any_journal_is_read(tmp_path: Path) -> None:
    journal = ConversionJournal(tmp_path / "out.partial", 0)
    journal.begin({"a": 1})
    journal.record({3: (4, 5)}, [3], [("file", 0, 8, 7)])
    journal.close()
    [path] = (tmp_path / "out.partial").rglob("journal-*.jsonl")
    line = json.loads(path.read_text())
    for number in range(COUNT):
        path.write_bytes(mutated(line, number) + b"\n" + json.dumps(line).encode() + b"\n")
        assert journal.read().checksums[3] == (4, 5)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_no_conversion_made_is_not_removed(tmp_path: Path, kind: str) -> None:
    elsewhere, partial = tmp_path / "elsewhere", tmp_path / "out.partial"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    if kind == "link":
        partial.symlink_to(elsewhere)
    elif kind == "file":
        partial.write_text("kept")
    else:
        elsewhere.rename(partial)
    with pytest.raises(CheckpointError, match="in the way"):
        ConversionJournal(partial, 0).begin({"a": 1})
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"kept"}


def _put(path: Path, kind: str, elsewhere: Path) -> None:
    """Put something that no conversion makes in the place of a file."""
    match kind:
        case "link":
            path.symlink_to(elsewhere)
        case "second name":
            path.hardlink_to(elsewhere)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.touch()
            os.chown(path, os.getuid() + 1, -1)


KINDS = [
    "link",
    "second name",
    "pipe",
    pytest.param(
        "another user's", marks=pytest.mark.skipif(os.getuid() != 0, reason="only root gives away")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", ".convert/plan.new", ".convert/failed-00001"]
)
def test_a_conversion_that_goes_on_writes_through_nothing_that_it_did_not_make(
    tmp_path: Path, name: str, kind: str
) -> None:
    elsewhere, partial = tmp_path / "precious", tmp_path / "out.partial"
    elsewhere.write_text("kept")
    journal = ConversionJournal(partial, 0)
    assert not journal.begin({"a": 1})
    assert journal.begin({"a": 1})
    _put(partial / name, kind, elsewhere)
    for fingerprint in ({"a": 1}, {"a": 2}):
        with pytest.raises(CheckpointError, match=f"{name} is in the way"):
            journal.begin(fingerprint)
    assert elsewhere.read_text() == "kept"
    assert os.path.lexists(partial / name)


def test_journals_that_lie_elsewhere_are_not_gone_on_from(tmp_path: Path) -> None:
    journal = ConversionJournal(tmp_path / "out.partial", 0)
    journal.begin({"a": 1})
    (tmp_path / "out.partial" / ".convert").rename(tmp_path / "moved")
    (tmp_path / "out.partial" / ".convert").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="in the way"):
        journal.begin({"a": 1})
    assert (tmp_path / "moved" / "plan.json").exists()


def test_a_plan_of_any_bytes_begins_anew(tmp_path: Path) -> None:
    journal = ConversionJournal(tmp_path / "out.partial", 0)
    journal.begin({"a": 1})
    (tmp_path / "out.partial" / ".convert" / "plan.json").write_bytes(b"\xff\xfe")
    assert not journal.begun({"a": 1})
    assert not journal.begin({"a": 1})


@pytest.mark.parametrize("kind", [*KINDS, "content"])
def test_a_lock_that_no_conversion_made_is_left_alone(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / ".out.lock", tmp_path / "precious"
    elsewhere.write_text("kept")
    if kind == "content":
        path.write_text("kept")
    else:
        _put(path, kind, elsewhere)
    with pytest.raises(HoldfastError, match=r"\.out\.lock is in the way|out cannot be written"):
        Lock(tmp_path / "out")
    assert os.path.lexists(path)
    assert elsewhere.read_text() == "kept"


def test_the_lock_of_a_killed_conversion_is_taken_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()
    Lock(tmp_path / "out").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leads_to", ["source", "nowhere", "out"])
def test_a_target_that_is_a_link_is_refused_before_work_begins(folder: Path, leads_to: str) -> None:
    (folder.parent / "out").symlink_to(folder.parent / leads_to)
    with pytest.raises(ConfigError, match="out is a link"):
        check(Conversion(folder, folder.parent / "out", "holdfast"))
