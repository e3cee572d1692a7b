"""Token ids to text, piece by piece, without ever showing half a character.

The pieces put together are exactly `tokenizer.decode(ids, skip_special_tokens=True)`. The library's
own `DecodeStream` does not give that: it holds an unfinished character for ever at the end of a
generation, and fails on byte-fallback ids that are not valid UTF-8.
"""

import codecs
import functools
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders

# What a decoder writes for bytes that are no character, perhaps only because more are to come.
_REPLACEMENT = "\ufffd"
# Ids kept for context when the window is cut: more than the 4 bytes of the longest character.
_CONTEXT = 8
# Ids in the window before it is cut; each new id costs the decoding of at most so many.
_WINDOW = 24


class Detokenizer:
    """What the streams of one tokenizer share. Immutable; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer):
        """Looks up which ids are special and which are single bytes."""
        self.tokenizer = tokenizer
        self.special_ids = frozenset(
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.byte_ids = _byte_ids(tokenizer)
        self._level_bytes_of: dict[int, bytes] = {}
        self.ascii_of: dict[int, str] = {}
        """Texts of ids seen so far that are ASCII and nothing else, of a byte-level vocabulary."""

    def stream(self) -> "DetokenizerStream | ByteLevelStream":
        """The text of one generation."""
        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return ByteLevelStream(self)
        return DetokenizerStream(self)

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding drops this id: a special token, or padding of the vocabulary."""
        return token_id in self.special_ids or self.tokenizer.id_to_token(token_id) is None

    def level_bytes(self, token_id: int) -> bytes:
        """What a byte-level decoder makes of an id, whatever stands beside it."""
        found = self._level_bytes_of.get(token_id)
        if found is None:
            found = b"" if self.is_silent(token_id) else self._level_bytes(token_id)
            self._level_bytes_of[token_id] = found
            if found.isascii():
                self.ascii_of[token_id] = found.decode()
        return found

    def _level_bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id) or ""
        alphabet = byte_alphabet()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode()


class ByteLevelStream:
    """The text of one generation of a byte-level vocabulary, where each id stands for the same bytes wherever
    it is: they are decoded as they come."""

    def __init__(self, shared: Detokenizer):
        self._bytes, self._ascii = shared.level_bytes, shared.ascii_of
        self._rest = b""  # Of a character whose end is to come.

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is settled now and was not before; often empty."""
        if len(token_ids) == 1 and not self._rest:
            known = self._ascii.get(token_ids[0])
            if known is not None:
                return known
        data = self._rest + b"".join(map(self._bytes, token_ids))
        text, used = codecs.utf_8_decode(data, "replace")
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        """What was held back; the generation has ended."""
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", "replace")


class DetokenizerStream:
    """The text of one generation so far. O(1) amortized work an id."""

    def __init__(self, shared: Detokenizer):
        self._shared = shared
        self._window: list[int] = []  # Ids whose decoding is looked at.
        self._sent = 0  # Characters of the window's decoding that were returned.
        self._bytes: list[int] = []  # An unfinished run of byte ids.

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is settled now and was not before; often empty."""
        text = ""
        for token_id in token_ids:
            if self._shared.is_silent(token_id):
                continue
            if token_id in self._shared.byte_ids:
                # One bad byte turns its whole run into replacement characters, the good ones
                # before it too: nothing of a run is settled before its end.
                self._bytes.append(token_id)
                continue
            self._window += self._bytes
            self._window.append(token_id)
            self._bytes.clear()
            text += self._settled(final=False)
        return text

    def flush(self) -> str:
        """What was held back; the generation has ended."""
        self._window += self._bytes
        self._bytes.clear()
        return self._settled(final=True)

    def _settled(self, final: bool) -> str:
        decoded = self._decode(self._window)
        end = len(decoded)
        # A byte-level decoder writes one replacement for an unfinished character at the end; all
        # before it stays as it is.
        if not final and decoded.endswith(_REPLACEMENT):
            end -= 1
        text = decoded[self._sent : end]
        self._sent = max(self._sent, end)
        if len(self._window) >= _WINDOW:
            self._cut(decoded)
        return text

    def _cut(self, decoded: str) -> None:
        """Drops ids whose text was sent, but for enough context to decode the next ones alike."""
        context = self._window[-_CONTEXT:]
        again = self._decode(context)
        unsent = len(decoded) - self._sent
        # Decoders that strip the first space must find it in the context.
        if again and decoded.endswith(again[len(again) - unsent :]):
            self._window = context
            self._sent = len(again) - unsent

    def _decode(self, token_ids: list[int]) -> str:
        return self._shared.tokenizer.decode(token_ids, skip_special_tokens=True)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes, as GPT-2 chose them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    named = {chr(byte): byte for byte in plain}
    return named | {chr(256 + at): byte for at, byte in enumerate(others)}


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of "<0x00>" to "<0xFF>", where the decoder turns those into bytes."""
    decoder = tokenizer.decoder
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    names = [f"<0x{byte:{form}}>" for byte in range(256) for form in ("02X", "02x")]
    ids = (tokenizer.token_to_id(name) for name in names)
    return frozenset(i for i in ids if i is not None)
