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
        self._hidden: list[tuple[int, int]] = []  # Parts of `_held` that are never sent.

    def push(self, text: str, hidden: bool = False) -> tuple[str, bool]:
        """What may be sent now, and whether a stop string was found (then it is the last). Text that
        is `hidden` is looked at and never sent: that of special tokens, which stop strings may name."""
        before = len(self._held)
        text = self._held + text
        if hidden:
            self._hidden.append((before, len(text)))
        for at in range(before, len(text)):
            found = self._advance(text[at])
            if found:
                sent = self._visible(text, at + 1 - found)
                self._held, self._hidden = "", []
                return sent, True
        keep = len(text) - max(self._matched, default=0)
        sent = self._visible(text, keep)
        self._held = text[keep:]
        self._hidden = [(max(0, a - keep), b - keep) for a, b in self._hidden if b > keep]
        return sent, False

    def flush(self) -> str:
        """What was held back; the generation has ended without the rest of a stop string."""
        sent = self._visible(self._held, len(self._held))
        self._held, self._hidden = "", []
        return sent

    def _visible(self, text: str, end: int) -> str:
        """What may be sent of the text up to here."""
        if not self._hidden:
            return text[:end]
        parts, at = [], 0
        for first, last in self._hidden:
            parts.append(text[at : min(first, end)])
            at = min(last, end)
        return "".join([*parts, text[at:end]])

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
