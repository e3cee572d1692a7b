"""Text in and out of one model: its tokenizer, and the text of a generation as it grows."""

import asyncio
import concurrent.futures
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from serving.detokenizer import Detokenizer, byte_alphabet
from serving.stop import StopMatcher

# Texts are encoded up to here first, in characters for each token that is allowed, then twice as far
# and so on: one that is too long costs what its limit costs, and not its length.
_FIRST_LOOK = 2
# Tokens by which the encoding of a text's beginning may be longer than the text's: what is cut may join.
_LOOK_MARGIN = 16
# Longer texts are encoded in a thread: the event loop has other streams to serve.
_LONG_TEXT = 2000
_threads = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="tokenize")


class TextCodec:
    """A model's tokenizer as the server uses it."""

    def __init__(self, tokenizer: Tokenizer):
        """Takes the tokenizer over: truncation and padding it may have been saved with go."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self.detokenizer = Detokenizer(tokenizer)
        self._byte_level = _is_byte_level(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {i: token.content for i, token in added.items() if token.special}
        """The text of each special token, by id; decoding drops them."""
        self.added_tokens = {token.content: token.special for token in added.values()}
        """Whether each added token is special, by its text."""

    @classmethod
    def load(cls, folder: str) -> "TextCodec":
        """Reads `folder`/tokenizer.json.

        Raises:
          ValueError: there is none, or it is none.
        """
        path = pathlib.Path(folder) / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(path)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Bare Exception, or PanicException, which is not even that.
            raise ValueError(
                f"tokenizer_path: {path} is no tokenizer ({error}); convert the model again"
            ) from error

    def most_characters(self, num_tokens: int) -> int:
        """Texts longer than this have more than `num_tokens` tokens, by a wide margin: of so many
        the longest there is, four times over for what a normalizer may compose or drop."""
        return num_tokens * self._longest * 4

    async def encode(self, text: str, most: int, *, special: bool = True) -> tuple[int, ...] | None:
        """The ids of a text, the special tokens of the tokenizer's template added if `special`; None
        where they are more than `most`, which is found out from its beginning."""
        if len(text) < _LONG_TEXT:
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        else:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(_threads, self._encode_long, text, most, special)
            if found is None:
                return None
            ids = found
        return ids if len(ids) <= most else None

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids, with that of special tokens if `special`."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not special)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary writes it; "" for padding of the vocabulary."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, wherever it does."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        if token_id in self.detokenizer.byte_ids:
            return bytes([int(token[3:-1], 16)])
        alphabet = byte_alphabet()
        if self._byte_level and all(c in alphabet for c in token):
            return bytes(alphabet[c] for c in token)
        # A decoder may strip the space that begins a text: look at what a token adds behind another.
        lead = self._tokenizer.decode([token_id], skip_special_tokens=False)
        both = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return both[len(lead) :].encode() if both.startswith(lead) else lead.encode()

    async def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], most: int
    ) -> tuple[int, ...] | None:
        """The ids of a rendered chat: of pieces of text, each with whether no added token is to be
        found in it. None where they are more than `most`.

        Raises:
          ValueError: a control token that is to stay text is one for this tokenizer in any case.
        """
        if sum(len(text) for text, _ in pieces) < _LONG_TEXT:
            ids = self._encode_pieces(pieces, most)
        else:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(_threads, self._encode_pieces, pieces, most)
        return ids if ids is not None and len(ids) <= most else None

    def _encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], most: int
    ) -> tuple[int, ...] | None:
        ids: tuple[int, ...] = ()
        for at, (text, plain) in enumerate(pieces):
            if plain:
                ids += self._encode_plain(text, first=not at)
                continue
            # Behind a newline, so that no space is put before a piece from the middle of a text.
            lead = self._encode("\n", False) if at else ()
            found = self._encode_long("\n" * bool(at) + text, most + len(lead), False)
            if found is None:
                return None
            if found[: len(lead)] != lead:
                found = self._encode(text, False)
                lead = ()
            ids += found[len(lead) :]
            if len(ids) > most:
                return None
        return ids

    def _encode_plain(self, text: str, first: bool) -> tuple[int, ...]:
        """The ids of text in which no added token is found."""
        tokenizer = self._plain_tokenizer
        lead = [] if first else tokenizer.encode("\n", add_special_tokens=False).ids
        ids = tokenizer.encode("\n" * (not first) + text, add_special_tokens=False).ids
        if ids[: len(lead)] == lead:
            ids = ids[len(lead) :]
        else:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        if self._tokenizer.token_to_id(text) in ids:
            raise ValueError(f"{text!r} is a control token wherever it stands; leave it out")
        return tuple(ids)

    @functools.cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without its added tokens."""
        content = json.loads(self._tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))

    def _encode_long(self, text: str, most: int, special: bool) -> tuple[int, ...] | None:
        look = max(_LONG_TEXT, _FIRST_LOOK * most)
        while look < len(text):
            if len(self._encode(text[:look], False)) > most + _LOOK_MARGIN:
                return None
            look *= 2
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        # Of the library's ways to encode, only the batched ones let other Python threads run.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its decoder reads each character of a token as one byte."""
    decoder = tokenizer.decoder
    return decoder is not None and decoder.decode(["Ã©"]) == "é"


class Piece(NamedTuple):
    """What some ids brought.

    Attributes:
      text: what may be sent now.
      num_tokens: how many of the ids belong to the answer; fewer than given after a stop string.
      stopped: a stop string was found.
    """

    text: str
    num_tokens: int
    stopped: bool


class TextStream:
    """The text of one generation: detokenized, then cut at the first stop string.

    Attributes:
      may_stop: there are stop strings.
      push_text: takes new ids, where there are none; the text that may be sent now.
    """

    def __init__(self, codec: TextCodec | None, stops: Sequence[str], min_tokens: int = 0):
        """Without a codec there is no text, only ids. What the first `min_tokens` of them bring is not
        searched for stop strings."""
        self._free = min_tokens
        self._detokenizer = codec.detokenizer.stream() if codec else None
        self._matcher = StopMatcher(stops) if stops else None
        self.may_stop = self._matcher is not None
        self.push_text: Callable[[Sequence[int]], str]
        self.push_text = self._detokenizer.push if self._detokenizer else lambda token_ids: ""
        # Special tokens that a stop string names are looked at, though never sent.
        special = codec.special_tokens if codec else {}
        self._special = {i: t for i, t in special.items() if t and any(t in s for s in stops)}

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Takes new ids."""
        if self._detokenizer is None or self._matcher is None:
            return Piece(self.push_text(token_ids), len(token_ids), False)
        text = ""
        for count, token_id in enumerate(token_ids, 1):  # One by one: which id completes a stop?
            more, stopped = self._push(token_id)
            text += more
            if stopped:
                return Piece(text=text, num_tokens=count, stopped=True)
        return Piece(text=text, num_tokens=len(token_ids), stopped=False)

    def flush(self) -> Piece:
        """What was held back; there are no more ids."""
        text = self._detokenizer.flush() if self._detokenizer else ""
        if self._matcher is None:
            return Piece(text=text, num_tokens=0, stopped=False)
        text, stopped = self._matcher.push(text)
        if not stopped:
            text += self._matcher.flush()
        return Piece(text=text, num_tokens=0, stopped=stopped)

    def _push(self, token_id: int) -> tuple[str, bool]:
        """What one id brings, and whether it completes a stop string."""
        assert self._detokenizer is not None and self._matcher is not None
        new = self._detokenizer.push((token_id,))
        if self._free:
            self._free -= 1
            return new, False
        text, stopped = self._matcher.push(new)
        if stopped or token_id not in self._special:
            return text, stopped
        # What was an unfinished character stands before the special token, and stays one if this is the end.
        more, stopped = self._matcher.push(self._special[token_id], hidden=True)
        return text + (self._detokenizer.flush() if stopped else "") + more, stopped
