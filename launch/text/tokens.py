"""A model folder's tokenizer: text to tokens, and tokens to text as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.model_config import read_config
from holdfast.parallel.errors import ConfigError, DataError
from holdfast.trainer.data import DataConfig, exported_tokenizer

if TYPE_CHECKING:
    import tokenizers

_BEFORE = 6
"""The tokens before new ones whose text says how new ones are written: with a space, or without."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """The tokenizer of a model."""

    library: tokenizers.Tokenizer
    adds_special_tokens: bool
    """Whether a text gets the special tokens of the tokenizer's template."""

    @property
    def vocab(self) -> int:
        """One more than the largest id that it gives."""
        return max(self.library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.library.encode(text, add_special_tokens=self.adds_special_tokens).ids

    def encode_plainly(self, text: str) -> tuple[list[int], int]:
        """The ids of a text without the template's, and the bytes of the first of them."""
        found = self.library.encode(text, add_special_tokens=False)
        stop = found.offsets[0][1] if found.offsets else 0
        return found.ids, len(text[:stop].encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self.library.decode(list(ids), skip_special_tokens=True)

    def byte_counts(self) -> list[int] | None:
        """The bytes of text that each id stands for; None if that depends on its neighbours."""
        from tokenizers import decoders

        if not isinstance(self.library.decoder, decoders.ByteLevel):
            return None
        added = self.library.get_added_tokens_decoder()
        names = (self.library.id_to_token(number) or "" for number in range(self.vocab))
        return [
            (0 if added[number].special else len(name.encode())) if number in added else len(name)
            for number, name in enumerate(names)
        ]


@dataclass(slots=True)
class TextStream:
    """The text of tokens that come one after another: whole characters, as soon as they are."""

    tokenizer: TextTokenizer
    ids: list[int]
    """Those of the prompt, and then all."""
    text: str = ""
    """The text since the prompt."""
    _first: int = field(init=False)
    _shown: int = field(init=False)

    def __post_init__(self) -> None:
        self._first, self._shown = max(0, len(self.ids) - _BEFORE), len(self.ids)

    def add(self, token: int) -> str:
        """The text that a token adds; "" while a character is not whole."""
        self.ids.append(token)
        text = self._fresh()
        return "" if text.endswith(_UNFINISHED) else self._taken(text)

    def rest(self) -> str:
        """What is left at the end: a character that was never whole."""
        return self._taken(self._fresh())

    def _fresh(self) -> str:
        before = self.tokenizer.decode(self.ids[self._first : self._shown])
        return self.tokenizer.decode(self.ids[self._first :])[len(before) :]

    def _taken(self, text: str) -> str:
        self._first, self._shown = max(self._first, self._shown - _BEFORE), len(self.ids)
        self.text += text
        return text


def open_tokenizer(
    files: Mapping[str, bytes], where: str, *, adds_special_tokens: bool
) -> TextTokenizer:
    """The tokenizer in a folder's `tokenizer.json`.

    Args:
        files: the folder's small files, by name.
        where: the folder, for messages.
    Raises:
        ConfigError: there is none, or it is damaged.
    """
    import tokenizers

    if "tokenizer.json" not in files:
        raise ConfigError(
            f"{where} has no tokenizer.json: its data was tokenized before, or is synthetic, or "
            "its tokenizer has another form; give --tokenizer bytes, or a tokenizer.json"
        )
    try:
        library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        settings = read_config(files.get("tokenizer_config.json", b"{}"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{where}: its tokenizer cannot be read: {error}") from error
    # A file may carry the limits of a fine-tuning run.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return TextTokenizer(library, adds_special_tokens)


def named_tokenizer(name: str) -> tuple[Mapping[str, bytes], int | None]:
    """The files of the tokenizer that --tokenizer names, and its id that ends a text.

    Raises:
        DataError: it cannot be read.
    """
    found = exported_tokenizer(DataConfig(kind="text", tokenizer=name), 0)
    return found.files, found.separator


def special_ids(described: Mapping[str, Any], *keys: str) -> list[int]:
    """The token ids that these keys of a config.json name, one or several each."""
    found: list[int] = []
    for key in keys:
        value = described.get(key)
        values = value if isinstance(value, list) else [value]
        found += [one for one in values if isinstance(one, int) and not isinstance(one, bool)]
    return found
