"""A writer of `.bin`/`.idx` pairs from text, through megatron-core's IndexedDatasetBuilder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.parallel.errors import DataError
from holdfast.parallel.files import scratch_folder, torch_caches_in
from holdfast.trainer.data.corpora.document_reading import DocumentForm, form_for, read_documents
from holdfast.trainer.data.corpora.documents import DocumentFile, list_documents
from holdfast.trainer.data.corpora.megatron import indexed_dataset_module
from holdfast.trainer.data.corpora.text import encode_documents
from holdfast.trainer.data.corpora.tokenizer import load_tokenizer, separator_note

_PARTIAL = ".holdfast-prepare-"
"""The beginning of the name of the folder in which the files are made."""
_MOST_TOKENS = 2**31 - 1
"""The longest document that Megatron's index can have."""


@dataclass(frozen=True, slots=True)
class PreparedCorpus:
    """The result of `prepare`."""

    documents: int
    tokens: int
    vocab: int
    bin_path: Path
    idx_path: Path
    note: str = ""
    """A warning for a person, if there is one."""


def prepare(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer: str = "bytes",
    *,
    json_key: str | None = None,
    end_of_text: str = "",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedCorpus:
    """Tokenise files into `OUTPUT_PREFIX.bin` and `.idx`, readable by Megatron.

    Every document ends with the tokenizer's separator. Both files are written in a scratch
    folder and renamed when complete, the index last; after an error nothing is left.

    Args:
        inputs: files and folders, as in `data.path`; a file is a document. None: the Python
            standard library.
        output_prefix: path without suffix, which ends in a name; its folder is made.
        tokenizer: "bytes" or the path of a `tokenizer.json`.
        json_key: when given, all inputs are JSON (lines, or an array of objects), and the value
            under this key of each object is a document. "": JSON is plain text. None: files with
            a suffix of JSON are JSON, and the key is "text".
        end_of_text: the name of the token that ends a document; "": one of the known names.
        overwrite: replace existing files.
        progress: called with (bytes of input read, bytes of input in all).

    Returns:
        Counts, and `vocab`: the smallest `model.vocab` that holds every id of the tokenizer.

    Raises:
        DataError: input that cannot be used, output that exists or has no name, or megatron-core
            missing.
    """
    if os.path.basename(output_prefix) in ("", ".", ".."):
        raise DataError(
            f'output "{output_prefix}": a prefix ends in a name, such as corpus/text, to which '
            ".bin and .idx are added"
        )
    files = list_documents(inputs, key="input")
    encoder = load_tokenizer(tokenizer, key="tokenizer", end_of_text=end_of_text)
    bin_path, idx_path = Path(f"{output_prefix}.bin"), Path(f"{output_prefix}.idx")
    for path in (bin_path, idx_path):
        if os.path.lexists(path) and not overwrite:
            raise DataError(f"{path} exists already; name another output, or give --overwrite")
    try:
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        # megatron-core has torch make the folder of its cache when it is imported.
        with scratch_folder(bin_path.parent, _PARTIAL) as scratch, torch_caches_in(scratch):
            indexed = indexed_dataset_module()
            made_bin, made_idx = (scratch / path.name for path in (bin_path, idx_path))
            dtype = indexed.DType.optimal_dtype(encoder.vocab)
            builder = indexed.IndexedDatasetBuilder(str(made_bin), dtype=dtype)
            key = "text" if json_key is None else json_key
            form = form_for(encoder, key, all_json=bool(json_key), most_bytes=_MOST_TOKENS - 1)
            texts = _documents(files, form, progress)
            documents, tokens = _add_all(builder, encode_documents(texts, encoder))
            if tokens == 0:
                raise DataError(f"{', '.join(inputs)}: no text to train on; nothing was written")
            builder.finalize(str(made_idx))
            for path in (made_bin, made_idx):
                _sync(path)
            # A reader needs both files: without the index the pair does not exist.
            idx_path.unlink(missing_ok=True)
            made_bin.rename(bin_path)
            made_idx.rename(idx_path)
            _sync(bin_path.parent)
    except OSError as error:
        raise DataError(
            f"{output_prefix}: cannot be written ({error.strerror}); name a folder with room that "
            "you may write"
        ) from error
    note = separator_note(encoder, f'tokenizer "{tokenizer}"')
    return PreparedCorpus(documents, tokens, encoder.vocab, bin_path, idx_path, note)


def _add_all(builder: Any, encoded: Iterable[np.ndarray]) -> tuple[int, int]:
    """Add documents (token ids) to Megatron's builder.

    Returns their number, and that of their tokens.
    """
    documents = tokens = 0
    try:
        for ids in encoded:
            builder.add_document(ids, [len(ids)])
            documents += 1
            tokens += len(ids)
    finally:
        builder.data_file.close()
    return documents, tokens


def _documents(
    files: Sequence[DocumentFile],
    form: DocumentForm,
    progress: Callable[[int, int], None] | None,
) -> Iterator[bytes]:
    total_bytes = sum(file.size_bytes for file in files)
    read_bytes = 0

    def counted() -> Iterator[DocumentFile]:
        nonlocal read_bytes
        for file in files:
            yield file
            read_bytes += file.size_bytes
            if progress is not None:
                progress(read_bytes, total_bytes)

    yield from read_documents(counted(), key="input", form=form)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
