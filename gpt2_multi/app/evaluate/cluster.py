"""Blocks of a run measured on many machines, by Ray: a worker for each device, results in order.

A worker that dies is started again, and what it was at is done again by one; results come back by value and are written
by the process that began the run, so that nothing is lost and nothing is there twice.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from gpt2_multi.app.evaluate.records import Block
from gpt2_multi.app.evaluate.running import Compute, Measure, Result, Seen, explained, located
from gpt2_multi.app.evaluate.scorer import Scorer, Source
from gpt2_multi.errors import InputError

TRIES = 5  # of a block whose worker dies: the sixth time it is the block, and not the machine
ANSWERS = 20.0  # seconds within which a cluster does; Ray itself waits for minutes
AHEAD = 4  # blocks a worker that may be done before the first of them is


class Worker:
    """A model in a process of the cluster."""

    def __init__(self, source: Source, measure: Measure) -> None:
        self.scorer: Scorer = source.load()
        self.kind = measure

    def measure(self, values: Sequence[Any]) -> list[Result]:
        """The results of a block."""
        return self.kind.measure(values, self.scorer)


def on_ray(address: str, count: int | None, source: Source, measure: Measure, advance: Seen) -> Compute:
    """Blocks measured by workers of the cluster at an address, or of one that is begun here, "local".

    count: how many workers there are; by default one for each GPU, or one for each machine where there is none.
    """

    def compute(waiting: Iterable[Block]) -> Iterator[tuple[Block, list[Result]]]:
        blocks = iter(waiting)
        first = next(blocks, None)
        if first is None:
            return
        with connected(address) as ray:
            workers = started(ray, count, source, measure)
            for block, found in ordered(ray, workers, first, blocks):
                advance(sum(item.read for item in block.items))
                yield block, found

    return compute


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, which is left again unless it was there before."""
    try:
        import ray
    except ImportError:
        raise InputError('--ray needs Ray: pip install "gpt2-multi[ray]"') from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield ray
        return
    with redirect_stdout(sys.stderr):  # where Ray says that a worker died
        try:
            check_there(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f'--ray: no cluster at {address!r} ({error}); give its address, or "local"') from None
        try:
            yield ray
        finally:
            ray.shutdown()


def check_there(address: str) -> None:
    """OSError where nobody listens at a host and port; other addresses are names that Ray knows."""
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d{1,5})", address):
        socket.create_connection((found[1], int(found[2])), ANSWERS).close()


def started(ray: Any, count: int | None, source: Source, measure: Measure) -> list[Any]:
    """Workers, spread over the machines; those on CPUs share them."""
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    use_gpus = gpus > 0 and source.device != "cpu"
    count = count or (gpus if use_gpus else len(ray.nodes()))
    if use_gpus and count > gpus:
        raise InputError(f"--workers: expected {gpus} or fewer, which is how many GPUs there are, found {count}")
    room = {"num_gpus": 1} if use_gpus else {"num_cpus": max(cpus // count, 1)}
    options = {"max_restarts": -1, "max_task_retries": TRIES, "scheduling_strategy": "SPREAD", **room}
    return [ray.remote(Worker).options(**options).remote(source, measure) for _ in range(count)]


def ordered(
    ray: Any, workers: Sequence[Any], first: Block, rest: Iterator[Block]
) -> Iterator[tuple[Block, list[Result]]]:
    """Each block with its results, in order; each worker has one at hand while it is at another."""
    free, sent, running = deque([*workers, *workers]), deque[tuple[Block, Any]](), dict[Any, Any]()
    block: Block | None = first
    while block is not None or sent:
        while block is not None and free and len(sent) < AHEAD * len(workers):
            worker = free.popleft()
            answer = worker.measure.remote([item.value for item in block.items])
            sent.append((block, answer))
            running[answer] = worker
            block = next(rest, None)
        for answer in ray.wait([*running], num_returns=1)[0]:
            free.append(running.pop(answer))
        while sent and sent[0][1] not in running:
            done, answer = sent.popleft()
            yield done, result_of(ray, done, answer)


def result_of(ray: Any, block: Block, answer: Any) -> list[Result]:
    """The results of a block; InputError, as in one process, where it has none."""
    try:
        found: list[Result] = ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise explained(block, error.cause) from None
    except ray.exceptions.RayError as error:
        raise located(block, f"a worker died {TRIES + 1} times at it ({error}); look at its log") from None
    return found
