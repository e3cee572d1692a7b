"""Stop strings in a stream of text: found across pieces, and never sent, not even in part."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first stop string.

    What it decides does not depend on how the text was cut into pieces: of several stop strings
    the one that is complete first wins, and of those the longest. Each string is followed by the
    automaton of Knuth, Morris and Pratt (1977), so the work is O(1) amortized a character and
    string however repetitive both are.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops` are not empty strings."""
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)  # Characters of each that the text ends with.
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be sent now, and whether a stop string was found (then it is the last)."""
        before = len(self._held)
        text = self._held + text
        for at in range(before, len(text)):
            found = self._advance(text[at])
            if found:
                self._held = ""
                return text[: at + 1 - found], True
        keep = len(text) - max(self._matched, default=0)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back; the generation has ended without the rest of a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Takes one character; the length of the longest stop string it completes, or 0."""
        found = 0
        for which, (stop, borders) in enumerate(self._stops):
            matched = self._matched[which]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self._matched[which] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of the longest shorter prefix it also ends with."""
    borders = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[length] != stop[at]:
            length = borders[length - 1]
        length += stop[length] == stop[at]
        borders[at] = length
    return borders
