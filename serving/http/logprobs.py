"""Log-probabilities in the two forms that OpenAI's answers have, with tokens as text."""

from collections.abc import Sequence
from typing import Any

from serving.text import TextCodec

Top = Sequence[tuple[int, float]]


class TokenTexts:
    """The texts of tokens, for one model."""

    def __init__(self, codec: TextCodec | None):
        self._codec = codec

    def text(self, token_id: int) -> str:
        """A token as text; one that is a part of a character as "bytes:" and its bytes, as OpenAI
        writes it."""
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token_id: int) -> bytes:
        """A token's bytes; without a tokenizer its number."""
        return self._codec.token_bytes(token_id) if self._codec else str(token_id).encode()


class CompletionLogprobs:
    """`logprobs` of a text completion, grown piece by piece: text_offset counts over the whole."""

    def __init__(self, texts: TokenTexts, offset: int = 0):
        self._texts, self._offset = texts, offset

    def of(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Top | None],
    ) -> dict[str, Any]:
        """The object for some tokens.

        Args:
          token_ids: the tokens.
          logprobs: of each; None for the first of a prompt.
          tops: the best tokens at each place; the token itself is added.
        """
        tokens = [self._texts.text(i) for i in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                None if top is None else self._top(top, token, logprob)
                for top, token, logprob in zip(tops, tokens, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, top: Top, token: str, logprob: float | None) -> dict[str, float | None]:
        best: dict[str, float | None] = {}
        for token_id, value in top:
            best.setdefault(self._texts.text(token_id), value)
        best.setdefault(token, logprob)
        return best


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]
) -> dict[str, Any]:
    """`logprobs` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = texts.raw(token_id)
        return {"token": texts.text(token_id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**entry(i, logprob), "top_logprobs": [entry(t, value) for t, value in top]}
            for i, logprob, top in zip(
                token_ids, logprobs, tops or [()] * len(token_ids), strict=True
            )
        ],
        "refusal": None,
    }
