"""Blocks encoded on several cores, in order: in threads where a compiled engine runs beside Python, else in processes.

A compiled engine that has one table of words for all threads is no quicker with several, so one is enough for it.

The processes are started plainly and are spoken to through their pipes. So a script needs no guard about its main part,
nothing is forked under the threads of a framework, and they end when this process does, however it ends.
"""

import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain, islice
from queue import SimpleQueue
from subprocess import PIPE, Popen
from typing import Any

from gpt2_multi.errors import GPT2Error, TokenizerError

Encode = Callable[[Any], Any]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoded(blocks: Iterator[Any], encode: Encode, in_threads: bool, workers: int | None) -> Iterator[Any]:
    """What `encode` makes of each block, in their order; without a second block in this thread alone.

    Raises:
        TokenizerError: a process ended, or could not read what it was sent.
    """
    first = list(islice(blocks, 2))
    count = (1 if in_threads else cores()) if workers is None else workers
    if len(first) < 2 or count == 1:
        yield from map(encode, chain(first, blocks))
        return
    with ExitStack() as stack:
        encode = encode if in_threads else stack.enter_context(Processes(encode, count))
        yield from _in_order(chain(first, blocks), encode, count)


def _in_order(blocks: Iterable[Any], encode: Encode, count: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for block in blocks:
            waiting.append(pool.submit(encode, block))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Processes that encode; each call asks one that is idle. They run within a `with`."""

    def __init__(self, encode: Encode, count: int) -> None:
        told = pickle.dumps(encode)
        self._all = [_started() for _ in range(count)]
        self._idle: SimpleQueue[tuple[Popen[bytes], bytes]] = SimpleQueue()  # each with what it has to be told first
        for process in self._all:
            self._idle.put((process, told))

    def __enter__(self) -> Encode:
        return self._ask

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            with suppress(OSError), process:  # closes its pipes and waits for its end
                pass

    def _ask(self, block: Any) -> Any:
        process, told = self._idle.get()
        try:
            answer = _answer(process, told, block)
        finally:
            self._idle.put((process, b""))
        if isinstance(answer, Exception) and not isinstance(answer, GPT2Error):
            raise TokenizerError(
                f"workers: a process cannot encode with this tokenizer ({type(answer).__name__}: {answer}); workers=1 "
                "encodes in this one"
            ) from answer
        if isinstance(answer, Exception):
            raise answer
        return answer


def _started() -> Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    return Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, start_new_session=True)  # no Ctrl-C for it


def _answer(process: Popen[bytes], told: bytes, block: Any) -> Any:
    requests, answers = process.stdin, process.stdout
    assert requests is not None and answers is not None
    try:
        requests.write(told + pickle.dumps(block))
        requests.flush()
        return pickle.load(answers)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise TokenizerError(
            f"workers: a process that encodes ended (exit status {process.wait()}); call again, with fewer workers "
            "where memory is short"
        ) from error


def serve() -> None:
    """What such a process does: it reads what encodes, and answers each block until there is no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    encode = _tried(pickle.load, requests)
    with suppress(EOFError):
        while True:
            block = pickle.load(requests)
            pickle.dump(encode if isinstance(encode, Exception) else _tried(encode, block), answers)
            answers.flush()


def _tried(call: Encode, given: Any) -> Any:
    try:
        return call(given)
    except Exception as error:
        return error
