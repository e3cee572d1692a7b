"""Text in and out of one model: its tokenizer, and the text of a generation as it grows."""

import asyncio
import concurrent.futures
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from serving.detokenizer import Detokenizer
from serving.stop import StopMatcher

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

    async def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text, the special tokens of the tokenizer's template added."""
        if len(text) < _LONG_TEXT:
            return tuple(self._tokenizer.encode(text).ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_threads, self._encode_long, text)

    def _encode_long(self, text: str) -> tuple[int, ...]:
        # Of the library's ways to encode, only the batched ones let other Python threads run.
        return tuple(self._tokenizer.encode_batch_fast([text])[0].ids)


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
    """The text of one generation: detokenized, then cut at the first stop string."""

    def __init__(self, codec: TextCodec | None, stops: Sequence[str], min_tokens: int = 0):
        """Without a codec there is no text, only ids. What the first `min_tokens` of them bring is not
        searched for stop strings."""
        self._free = min_tokens
        self._detokenizer = codec.detokenizer.stream() if codec else None
        self._matcher = StopMatcher(stops) if stops else None

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Takes new ids."""
        if self._detokenizer is None:
            return Piece(text="", num_tokens=len(token_ids), stopped=False)
        if self._matcher is None:
            text = self._detokenizer.push(token_ids)
            return Piece(text=text, num_tokens=len(token_ids), stopped=False)
        text = ""
        for count, token_id in enumerate(token_ids, 1):  # One by one: which id completes a stop?
            new = self._detokenizer.push((token_id,))
            if self._free:
                self._free -= 1
                text += new
                continue
            more, stopped = self._matcher.push(new)
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
