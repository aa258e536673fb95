"""The Qwen2 byte-level BPE tokenizer, and the official rule that extracts an answer from generated tokens.

A token of the vocabulary is a sequence of bytes, written with one character per byte (GPT-2's byte alphabet). An added
token, such as ``<|im_start|>``, is written as it is. Any text can be encoded; decoding returns its normalized form:
NFC, for the embedded model also lower case.
"""

import codecs
import operator
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.tokenizer_files import REMEDY, read_backend

START, END = "<|im_start|>", "<|im_end|>"

# GPT-2's byte alphabet: a printable byte is written as its own character, the n-th other byte as character 256 + n.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


class Tokenizer:
    """The tokenizer. ``len()`` is its largest id + 1; a model's vocabulary may be padded to more.

    Attributes:
        bos, eos: ids of <|im_start|> and <|im_end|>, which enclose every text.
        start_of_image, end_of_image: ids of <|vision_start|> and <|vision_end|>, which enclose every image.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: Path | str):
        """Wrap a byte-level BPE and disable its truncation and padding.

        Args:
            backend: must recognize special tokens in a text.
            source: the file of the backend, for error messages.

        Raises:
            CheckpointError: not a byte-level BPE, or a token is missing: one of the 256 bytes or the four above.
        """
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(f"{source} must be a byte-level BPE tokenizer, as used by Qwen2. {REMEDY}.")
        missing = [character for character in _BYTE_OF if backend.token_to_id(character) is None]
        if missing:
            raise CheckpointError(f"{source}: tokens for {len(missing)} of the 256 bytes are missing. {REMEDY}.")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._length = 1 + max(backend.get_vocab().values())
        names = (START, END, "<|vision_start|>", "<|vision_end|>")
        self.bos, self.eos, self.start_of_image, self.end_of_image = (
            _special_id(backend, name, source) for name in names
        )

    @classmethod
    def from_folder(cls, path: Path | str) -> "Tokenizer":
        """Read ``tokenizer.json``, else ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.

        Raises:
            FileNotFoundError: neither exists.
            CheckpointError: a file is damaged or does not match the others; the message names it.
        """
        return cls(*read_backend(Path(path)))

    def __len__(self) -> int:
        return self._length

    def encode(self, text: str) -> list[int]:
        """Encode a text, without adding tokens. The strings of special tokens become their ids.

        Raises:
            ValueError: not a str, or it contains surrogates, which are not characters.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}.")
        try:
            # NFC first, as in the official code: tokenizers would look for special tokens before it normalizes.
            return self._backend.encode(unicodedata.normalize("NFC", text), add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"text must not contain surrogates, got {text[:60]!r}. Remove them.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id has no token.
        """
        spellings = []
        for token in ids:
            spelling = self.spell(token)
            if spelling is None:
                raise ValueError(f"token id must be below {len(self)} and in the vocabulary, got {token}.")
            spellings.append(spelling)
        return b"".join(spellings).decode("utf-8", "replace")

    def answer(self, ids: Iterable[int]) -> str:
        """Extract the answer from generated ids, which include the start token, by the official rule.

        The answer is the text between the first <|im_start|> and the first <|im_end|> or next <|im_start|>, generated
        as special tokens or spelled out. Ids of ``len(self)`` and above, which a padded vocabulary can produce, add no
        text.

        Raises:
            ValueError: no <|im_start|>, or an id is not an integer >= 0.
        """
        text = b"".join(self.spell(token) or b"" for token in ids).decode("utf-8", "replace")
        _, start, answer = text.partition(START)
        if not start:
            raise ValueError(f"generated ids must contain {START}, got {text[:60]!r}. Include the start token.")
        return answer.partition(END)[0].partition(START)[0]

    def stream(self) -> "TextStream":
        """Create a streaming decoder for one answer."""
        return TextStream(self)

    def spell(self, token: int) -> bytes | None:
        """The bytes of one token, which may end inside a character; None if the id has no token.

        Raises:
            ValueError: not an integer >= 0.
        """
        try:
            name = self._backend.id_to_token(operator.index(token))
        except (TypeError, OverflowError):
            raise ValueError(f"token id must be an integer from 0 to 2**32 - 1, got {token!r}.") from None
        if name is None:
            return None
        try:
            return bytes([_BYTE_OF[character] for character in name])
        except KeyError:  # an added token with a character outside the byte alphabet, such as a space
            return name.encode()


class TextStream:
    """Streaming decoder of one answer, token by token.

    The concatenated pieces equal :meth:`Tokenizer.answer` of the start token and the tokens fed. A piece never ends
    inside a character, or inside text that may become a spelled-out <|im_start|> or <|im_end|>; such text waits for the
    next token. ``tokenizers.DecodeStream`` cannot replace this: it has no flush, so an answer that ends inside a
    character would lose its last U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._spell = tokenizer.spell
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._ended = False

    def feed(self, token: int) -> str:
        """Decode the next token after <|im_start|> and return the text that it completes, often none.

        Raises:
            ValueError: not an integer >= 0.
        """
        return self._release(self._utf8.decode(self._spell(token) or b""))

    def finish(self) -> str:
        """Return the remaining text. Feed no token after this."""
        return self._release(self._utf8.decode(b"", final=True)) + self._pending

    def _release(self, text: str) -> str:
        if self._ended:
            return ""
        text = self._pending + text
        ends = [index for index in map(text.find, (START, END)) if index >= 0]
        self._ended = bool(ends)
        cut = min(ends, default=len(text))
        last = text.rfind("<", 0, cut)  # "<" is the first character of both markers and occurs nowhere else in them
        if not ends and last >= 0 and any(marker.startswith(text[last:]) for marker in (START, END)):
            cut = last
        self._pending = "" if ends else text[cut:]
        return text[:cut]


def _special_id(backend: tokenizers.Tokenizer, name: str, source: Path | str) -> int:
    token = backend.token_to_id(name)
    if token is None:
        raise CheckpointError(f"{source}: the special token {name} is missing. {REMEDY}.")
    return token
