"""What a server counts, in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
PREFIX = "gpt2_multi_"


class Histogram:
    """How often a time lay below each bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count a time."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {sum(self.counts)}"


class Metrics:
    """The counts of a server since its start; all are changed by the thread of its event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.prompt_tokens = self.new_tokens = 0
        self.seconds, self.first_token = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of them, and `gauges`: by name, what is so at this moment."""
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests that were answered, by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _single("prompt_tokens_total", "counter", "Tokens of prompts that were read.", self.prompt_tokens)
        yield from _single("new_tokens_total", "counter", "Tokens that were made.", self.new_tokens)
        for name, value in gauges.items():
            yield from _single(name, "gauge", f"Completions that are {name} now.", value)
        yield from _head("request_seconds", "histogram", "How long requests for completions took.")
        yield from self.seconds.lines(f"{PREFIX}request_seconds")
        yield from _head("first_token_seconds", "histogram", "How long it took until the first token was there.")
        yield from self.first_token.lines(f"{PREFIX}first_token_seconds")


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}{name} {words}"
    yield f"# TYPE {PREFIX}{name} {kind}"


def _single(name: str, kind: str, words: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, words)
    yield f"{PREFIX}{name} {value}"
