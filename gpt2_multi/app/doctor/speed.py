"""How fast this machine computes GPT-2: tokens a second of each backend, beside what its memory allows."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.app.doctor.floor import cache, weights
from gpt2_multi.app.train.engines import engine as engines
from gpt2_multi.app.train.plan import Plan
from gpt2_multi.app.train.report.progress import operations
from gpt2_multi.model.config import GPT2Config

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ROWS = (1, 8)  # texts that are made at once
PROMPT, NEW = 32, 64  # tokens of each
READ, TRAINED = 512, (2, 256)  # of a long prompt, and of a batch that is trained on
PATIENCE, MOST = 0.3, 5  # seconds after which nothing is repeated any more, and how often it is at most
NOTHING: Mapping[str, Any] = {}
FIGURES = 2 + len(ROWS)  # of each backend


@dataclass(frozen=True)
class Speed:
    """What a backend reaches in one thing: of writing what memory would allow, of the rest operations a second."""

    backend: str
    device: str
    what: str
    tokens_per_second: float | None = None
    limit: float | None = None  # tokens a second; None where it is not known
    operations_per_second: float | None = None
    problem: str | None = None

    @property
    def ratio(self) -> float | None:
        """How much of the limit is reached."""
        return None if not self.tokens_per_second or not self.limit else self.tokens_per_second / self.limit

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass
class Bench:
    """A model's folder on a device of a backend, and the bytes a second that memory gives."""

    folder: Path
    config: GPT2Config
    backend: str
    device: str
    dtype: str
    bandwidth: float

    def run(self) -> Iterator[Speed]:
        """All that is measured, each as soon as it is known; what cannot be computed is a problem of its row."""
        yield self._tried("training", self._training)
        gc.collect()  # the optimizer's state
        model: list[Any] = []

        def loaded() -> Any:
            if not model:
                model.append(backends.resolve(self.backend).load(self.folder, self.device, self.dtype))
            return model[0]

        yield self._tried("reading a prompt", lambda: self._reading(loaded()))
        for rows in ROWS:
            yield self._tried(f"writing, {rows} at once", partial(self._writing, rows, loaded))

    def _tried(self, what: str, measure: Callable[[], dict[str, Any]]) -> Speed:
        speed = Speed(self.backend, self.device, what)
        try:
            return replace(speed, **measure())
        except Exception as error:  # out of memory, a driver, a kernel: of whatever class, the rest is measured
            return replace(speed, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _training(self) -> dict[str, float]:
        rows, length = TRAINED[0], min(TRAINED[1], self.config.n_positions)
        plan = self._plan(rows, length)
        engine = engines.build(plan, self.folder, engines.join(self.backend, self.device))
        ids = self._ids(rows, length)[None]  # (A, B, T)
        seconds = fastest(lambda: float(engine.train({"input_ids": ids, "labels": ids}, 0, 1e-5).loss))
        return worked(rows * length / seconds, operations(self.config, plan))

    def _plan(self, rows: int, length: int) -> Plan:
        how: dict[str, Any] = dict(learning_rate=1e-5, warmup=1, weight_decay=0.1, max_norm=1.0, lora=0, seed=0)
        sizes: dict[str, Any] = dict(steps=1, batch_size=rows, accumulate=1, length=length)
        return Plan(self.backend, self.dtype, "random", **sizes, **how, dropout=0.0, device=self.device)

    def _reading(self, model: Any) -> dict[str, float]:
        length = min(READ, self.config.n_positions - 1)
        seconds = self._generated(model, 1, length, 1, backends.resolve(self.backend).one_text)
        whole = operations(self.config, self._plan(1, length)) / 3  # without the two of the gradients
        head = 2 * self.config.vocab_size * self.config.n_embd  # of the last token alone
        return worked(length / seconds, whole - head)

    def _writing(self, rows: int, loaded: Callable[[], Any]) -> dict[str, float]:
        new = min(NEW, self.config.n_positions // 2)
        prompt = min(PROMPT, self.config.n_positions - new)
        seconds = self._generated(loaded(), rows, prompt, new)
        read = weights(self.config, SIZES[self.dtype]) + rows * cache(self.config, prompt + new // 2, SIZES[self.dtype])
        limit = {"limit": rows * self.bandwidth / read} if self.device == "cpu" else {}  # whose memory was measured
        return {"tokens_per_second": rows * new / seconds, **limit}

    def _generated(self, model: Any, rows: int, prompt: int, new: int, options: Mapping[str, Any] = NOTHING) -> float:
        row = backends.resolve(self.backend)
        ids = row.to_tensor(model, self._ids(rows, prompt))
        how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **options}
        return fastest(lambda: row.to_numpy(model.generate(ids, **how)))

    def _ids(self, rows: int, length: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng(rows).integers(self.config.vocab_size, size=(rows, length))


def measured(benches: Sequence[Bench]) -> Iterator[Speed]:
    """All that is measured. Of several backends each has a process, so that one's memory is free for the next."""
    if len(benches) == 1:
        yield from benches[0].run()
        return
    for bench in benches:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            try:
                yield from pool.submit(_run, bench).result()
            except BrokenProcessPool:
                what = "its process was ended by the system, as it is where memory is short; measure a smaller model"
                yield Speed(bench.backend, bench.device, "all", problem=what)


def _run(bench: Bench) -> list[Speed]:
    return list(bench.run())


def worked(speed: float, each: float) -> dict[str, float]:
    """Tokens a second, of which each takes so many operations."""
    return {"tokens_per_second": speed, "operations_per_second": speed * each}


def fastest(call: Callable[[], object]) -> float:
    """The least seconds of a call, after a first one in which frameworks compile."""
    call()
    start, least = time.perf_counter(), math.inf
    for _ in range(MOST):
        before = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - before)
        if time.perf_counter() - start > PATIENCE:
            break
    return least
