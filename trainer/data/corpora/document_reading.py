"""The reading of documents: text and JSON, in no more memory than the machine has."""

from __future__ import annotations

import codecs
import io
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from holdfast.parallel.errors import DataError
from holdfast.parallel.reading import MOST_BYTES, open_regular
from holdfast.trainer.config import machine_memory_bytes
from holdfast.trainer.data.corpora.documents import list_documents
from holdfast.trainer.data.corpora.json_lines import (
    ARRAY_SUFFIX,
    SUFFIXES,
    begins_array,
    is_json_lines,
    json_documents,
    json_records,
    looks_like_json_lines,
    record_documents,
)

if TYPE_CHECKING:
    from holdfast.trainer.data.corpora.documents import DocumentFile
    from holdfast.trainer.data.corpora.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 20
"""The beginning of a file that tells most files that are no text."""
_MOST_LINE_BYTES = 1 << 28
_ARRAY_MEMORY_RATIO = 16
"""Bytes of memory for each byte of an array of JSON."""
_GIVE_SUFFIX = "give it the suffix {}, and its texts are read by data.json_key (--json-key)"


@dataclass(frozen=True, slots=True)
class DocumentForm:
    """The way in which files are cut into documents.

    Attributes:
        json_key: the key of the text in JSON; "": JSON is plain text like any other file.
        all_json: whether every file is JSON, whatever its suffix.
        most_bytes: the largest document that there is memory for while it is tokenised.
        most_array_bytes: the largest file of one JSON array that there is memory for.
    """

    json_key: str = "text"
    all_json: bool = False
    most_bytes: int = MOST_BYTES
    most_array_bytes: int = MOST_BYTES

    def is_json(self, file: DocumentFile) -> bool:
        """Whether a file may be of several documents, by its suffix; others are one each."""
        suffixes = (ARRAY_SUFFIX, *SUFFIXES)
        return bool(self.json_key) and (self.all_json or file.path.suffix.lower() in suffixes)


def form_for(
    tokenizer: Tokenizer, json_key: str, *, all_json: bool = False, most_bytes: int | None = None
) -> DocumentForm:
    """The form of documents that a tokenizer takes within this machine's memory. Local.

    Args:
        most_bytes: the largest document, if there is a limit beside memory.
    """
    memory = machine_memory_bytes()
    largest = memory // tokenizer.memory_ratio
    return DocumentForm(
        json_key,
        all_json,
        largest if most_bytes is None else min(largest, most_bytes),
        memory // _ARRAY_MEMORY_RATIO,
    )


def read_documents(
    files: Iterable[DocumentFile],
    *,
    key: str = "data.path",
    form: DocumentForm = DocumentForm(),
) -> Iterator[bytes]:
    """The documents of all files, not empty, checked to be UTF-8.

    A file is one document; a file of JSON has one per line, or per object of its array. Files of a
    folder that are not text (not UTF-8, or with a zero byte) are left out. JSON without a text in
    a folder that has other files too is a document as it is. Warnings at the end count both.

    Raises:
        DataError: a named file is not UTF-8, a file cannot be read, or is larger than the memory
            allows, JSON that is data has no text, or a file of another suffix is JSON.
    """
    reader = _Reader(key, form)
    for file in files:
        try:
            with open_regular(file.path) as opened:
                yield from reader.documents(file, opened)
        except OSError as error:
            raise DataError(
                f'{key} "{file.path}": cannot be read ({error.strerror}); make it readable or '
                "name another"
            ) from error
    if reader.left_out:
        logger.warning(
            "%d files are not UTF-8 text and were left out of the corpus, the first is %s",
            len(reader.left_out),
            reader.left_out[0],
        )
    if reader.without_text:
        logger.warning(
            '%d files are JSON arrays without any "%s" and were taken as plain text, the first '
            "is %s; data.json_key (--json-key) names another key",
            len(reader.without_text),
            form.json_key,
            reader.without_text[0],
        )


def documents_in(path: str, *, key: str) -> Iterator[bytes]:
    """The documents of a file or folder, not empty, checked to be UTF-8; see `read_documents`.

    Args:
        key: the name of the path in messages.
    """
    most = machine_memory_bytes() // _ARRAY_MEMORY_RATIO
    form = DocumentForm(most_bytes=most, most_array_bytes=most)
    return read_documents(list_documents([path], key=key), key=key, form=form)


@dataclass(slots=True)
class _Reader:
    """A reader of one file after the other.

    Attributes:
        left_out: the files that are not text.
        without_text: the JSON arrays that were taken as plain text.
    """

    key: str
    form: DocumentForm
    left_out: list[Path] = field(default_factory=list)
    without_text: list[Path] = field(default_factory=list)

    def documents(self, file: DocumentFile, opened: BinaryIO) -> Iterator[bytes]:
        """The documents of a file, which was opened and not read yet."""
        size = os.fstat(opened.fileno()).st_size  # one that grows is read as it was found
        head = opened.read(min(size, _HEAD_BYTES))
        is_json = self.form.is_json(file)
        if is_json and not begins_array(head) and (self.form.all_json or is_json_lines(file.path)):
            opened.seek(0)
            yield from self._lines(file, opened)
            return
        if not _is_text(file, head, self.key, ends=len(head) == size):
            self.left_out.append(file.path)
            return
        most = self.form.most_array_bytes if is_json else self.form.most_bytes
        if size > most:
            raise self._too_large(file, "it", size, most)
        content = head + opened.read(size - len(head))
        if not _is_text(file, content, self.key):
            self.left_out.append(file.path)
        elif self.form.json_key:
            yield from self._text_or_json(file, content)
        else:
            yield from self._whole(file, content)

    def _text_or_json(self, file: DocumentFile, content: bytes) -> Iterator[bytes]:
        where, is_json = str(file.path), self.form.is_json(file)
        if looks_like_json_lines(content):
            if not is_json:
                raise DataError(
                    f'{self.key} "{where}": every line of it is a JSON object, so it is JSON '
                    f"Lines; {_GIVE_SUFFIX.format(SUFFIXES[0])}"
                )
            yield from self._lines(file, io.BytesIO(content))
            return
        records = json_records(content)
        of_objects = bool(records) and all(isinstance(record, dict) for record in records or ())
        has_text = of_objects and any(self.form.json_key in record for record in records or ())
        if not is_json and begins_array(content) and (has_text or (of_objects and file.named)):
            raise DataError(
                f'{self.key} "{where}": it is a JSON array of objects; '
                f"{_GIVE_SUFFIX.format(ARRAY_SUFFIX)}"
            )
        if not is_json or not (has_text or self._is_data(file)):
            if of_objects and begins_array(content):
                self.without_text.append(file.path)
            yield from self._whole(file, content)
        elif records is not None:
            for document in record_documents(records, where, self.form.json_key):
                yield from self._whole(file, document)
        elif content:
            raise DataError(
                f'{self.key} "{where}": is neither a JSON array of objects nor JSON Lines; correct '
                'it, or give data.json_key (--json-key) as "" to take it as plain text'
            )

    def _is_data(self, file: DocumentFile) -> bool:
        """Whether a file of JSON was given for its texts, and is not one among files of code."""
        return file.named or file.only_json or self.form.all_json or is_json_lines(file.path)

    def _whole(self, file: DocumentFile, document: bytes) -> Iterator[bytes]:
        """A document, if it is not empty."""
        if len(document) > self.form.most_bytes:
            raise self._too_large(file, "a document of it", len(document), self.form.most_bytes)
        if document:
            yield document

    def _lines(self, file: DocumentFile, opened: BinaryIO) -> Iterator[bytes]:
        """The documents of JSON Lines."""
        most = min(self.form.most_bytes, _MOST_LINE_BYTES)

        def lines() -> Iterator[bytes]:
            number = 0
            while line := opened.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise self._too_large(file, f"line {number}", len(line), most)
                yield line

        yield from json_documents(lines(), str(file.path), self.form.json_key)

    def _too_large(self, file: DocumentFile, what: str, size: int, most: int) -> DataError:
        return DataError(
            f'{self.key} "{file.path}": {what} has {size:,} bytes or more, and there is memory '
            f"here for {most:,} in one document; cut it into documents, such as lines of a "
            f"{SUFFIXES[0]} file, or leave it out"
        )


def _is_text(file: DocumentFile, content: bytes, key: str, *, ends: bool = True) -> bool:
    """Whether a file is text; one that the user named has to be UTF-8.

    Args:
        content: the file, or its beginning.
        ends: whether it is the whole file.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, ends)
    except UnicodeDecodeError as error:
        if file.named:
            raise DataError(
                f'{key} "{file.path}": not UTF-8 at byte {error.start} '
                f"(0x{content[error.start]:02x}); convert the file (iconv -t UTF-8) or leave it out"
            ) from error
        return False
    return file.named or b"\0" not in content
