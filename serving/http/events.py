"""Server-sent events: JSON, and prepared ones of which only the text is new."""

from typing import Any

import msgspec

KIND = b"text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
# Stands for the text in the content of a prepared event; no name of a model can have it.
TEXT = "\0text\0"

encode = msgspec.json.Encoder().encode
_MARK = encode(TEXT)


def event(content: Any) -> bytes:
    """The event of some content; bytes are JSON already."""
    return b"data: %b\n\n" % (content if isinstance(content, bytes) else encode(content))


class Prepared:
    """An event that is encoded but for its text."""

    def __init__(self, content: Any):
        """`content` has TEXT where the text is to be."""
        self._before, self._after = event(content).split(_MARK)

    def of(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + encode(text) + self._after
