"""Renders chat templates, and reads answers by response templates, in processes that are ended when one takes
too long."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from serving.child_processes import ChildError, ChildProcesses

# CPU time of one conversation, which takes a millisecond or a few.
RENDER_SECONDS = 0.6
_MAX_PROCESSES = 16
_NOTHING = {
    "source": "",
    "added": {},
    "control": [],
    "special_tokens": {},
    "conversation": {"messages": []},
}


class RenderError(ValueError):
    """There is no text.

    Attributes:
      refused: the messages are to blame; else the template is.
    """

    def __init__(self, message: str, refused: bool):
        super().__init__(message)
        self.refused = refused


class Renderer(ChildProcesses):
    """The processes of one server."""

    def __init__(self, seconds: float = RENDER_SECONDS):
        """`seconds` is the CPU time that one conversation may take."""
        super().__init__("serving.chat.render_child", _NOTHING, seconds, _MAX_PROCESSES)

    async def render(self, request: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """Pieces of text, each with whether it is to be encoded as plain text; see `render_child.answer`.

        Raises:
          RenderError: the template refuses the messages, is none, or took too long or too much.
        """
        reply = await self._asked(request)
        return [(text, bool(plain)) for text, plain in reply["pieces"]]

    async def parse(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The message of an answer; see `render_child.answer`.

        Raises:
          RenderError: the answer does not fit the template, or that is none, or took too long or too much.
        """
        return (await self._asked(request))["message"]

    async def _asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            reply = await self.ask(request)
        except ChildError as error:
            raise RenderError(str(error), refused=False) from error
        if "error" in reply:
            if reply["kind"] == "template":
                logging.warning("a chat template failed: %s", reply["error"])
            raise RenderError(reply["error"], refused=reply["kind"] == "refused")
        return reply
