"""From tokens to text as they come: whole characters only, and nothing behind a stop text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream


class Added(NamedTuple):
    """What a rollout's text has gained."""

    text: str
    stopped: bool
    """A stop text was met; the rollout need not go on."""


class TextStream:
    """The text of one rollout. What might be the beginning of a stop text is held back until it is known."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._stop_ids = frozenset(stop_ids)
        self._stops = stops
        self._held = ""
        self._stopped = False

    def add(self, tokens: Sequence[int], last: bool) -> Added:
        """The text that these tokens add; `last` says that no more will come."""
        if self._stopped:
            return Added("", True)
        self._held += "".join(self._step(token) for token in tokens)
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            # The one that is complete first, however many tokens come at once.
            return Added(self._held[: min(found)[1]], True)
        keep = 0 if last else self._undecided()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Added(text, False)

    def _step(self, token: int) -> str:
        if token in self._stop_ids:
            return ""
        return self._decoder.step(self._tokenizer, token) or ""

    def _undecided(self) -> int:
        """How many characters at the end may begin a stop text."""
        sizes = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)
