"""Blocks on a cluster: in order and once, whoever is done first, and a sentence for what goes wrong.

The cluster is a stand-in that ends tasks in the order that is worst. examples/clients/study/with_ray.py has a real one,
of which a worker is killed.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2_multi.app.evaluate import cluster
from gpt2_multi.app.evaluate.records import Block, Item
from gpt2_multi.errors import InputError
from tests.app.conftest import refusal


class TaskError(Exception):
    """An error in a worker, with its cause."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class DeathError(Exception):
    """The end of a worker."""


class Ray:
    """A cluster whose tasks end last in, first out."""

    exceptions = SimpleNamespace(RayTaskError=TaskError, RayError=DeathError)

    def __init__(self) -> None:
        self.numbers, self.tasks, self.most = count(), dict[int, Any](), 0

    def worker(self) -> Any:
        """A worker, that notes how much waits for it."""
        held: list[int] = []

        def remote(values: list[Any]) -> int:
            number = next(self.numbers)
            held.append(number)
            self.most = max(self.most, len(held))
            self.tasks[number] = (held, values)
            return number

        return SimpleNamespace(measure=SimpleNamespace(remote=remote))

    def wait(self, answers: list[int], num_returns: int) -> Any:
        held, _ = self.tasks[max(answers)]
        held.remove(max(answers))
        return [max(answers)], []

    def get(self, answer: int) -> Any:
        _, values = self.tasks[answer]
        for value in values:
            if isinstance(value, Exception):
                raise value
        return [{"value": value} for value in values]


def made(values: Iterator[Any] | range | list[Any], taken: list[int]) -> Iterator[Block]:
    for start, value in enumerate(values):
        taken.append(start)
        yield Block(start, [Item(f"document {start}", "", value, 1, 1)])


def run(values: Any, workers: int = 3) -> Iterator[Any]:
    ray, taken = Ray(), list[int]()
    blocks = made(values, taken)
    for place, (block, found) in enumerate(
        cluster.ordered(ray, [ray.worker() for _ in range(workers)], next(blocks), blocks)
    ):
        assert len(taken) <= place + cluster.AHEAD * workers + 1 and ray.most <= 2
        yield block.start, found


@pytest.mark.parametrize("number", [1, 2, 7, 40])
def test_results_are_in_order_and_once_and_few_blocks_wait(number):
    assert list(run(range(number))) == [(i, [{"value": i}]) for i in range(number)]
    assert list(run(range(number), 1)) == list(run(range(number), 5))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TaskError(InputError("endings: expected ...")), "endings: expected ..."),
        (TaskError(RuntimeError("CUDA out of memory")), "^document 2: the memory does not suffice; give a smaller"),
        (
            DeathError("killed"),
            r"^document 2: a worker died 6 times at it \(killed\); look at its log",
        ),
    ],
)
def test_what_fails_in_a_worker_is_a_sentence_after_what_came_before(error, sentence):
    found = run([0, 1, error, 3])
    assert [next(found)[0], next(found)[0]] == [0, 1]
    with pytest.raises(InputError, match=sentence):
        next(found)


@pytest.mark.parametrize(
    ("resources", "device", "wanted", "expected"),
    [
        ({"CPU": 8.0, "GPU": 4.0}, None, None, (4, {"num_gpus": 1})),
        ({"CPU": 8.0, "GPU": 4.0}, "cpu", None, (2, {"num_cpus": 4})),
        ({"CPU": 8.0}, None, 3, (3, {"num_cpus": 2})),
        ({"CPU": 1.0}, None, 3, (3, {"num_cpus": 1})),
    ],
)
def test_a_worker_has_a_device(resources, device, wanted, expected):
    asked: list[dict[str, Any]] = []
    actor = SimpleNamespace(remote=lambda *_: "worker")
    ray = SimpleNamespace(
        cluster_resources=lambda: resources,
        nodes=lambda: ["a", "b"],
        remote=lambda _: SimpleNamespace(options=lambda **given: asked.append(given) or actor),
    )
    workers = cluster.started(ray, wanted, SimpleNamespace(device=device), None)
    assert (len(workers), expected[1].items() <= asked[0].items()) == (expected[0], True)
    assert asked[0]["max_restarts"] == -1 and asked[0]["max_task_retries"] == cluster.TRIES


def test_there_are_no_more_workers_than_gpus():
    ray = SimpleNamespace(cluster_resources=lambda: {"GPU": 2.0, "CPU": 4.0})
    with pytest.raises(InputError, match="--workers: expected 2 or fewer, which is how many GPUs there are, found 3"):
        cluster.started(ray, 3, SimpleNamespace(device=None), None)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "auto"])
def test_where_nobody_listens_there_is_no_cluster_and_ray_does_not_wait(address, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    begun: list[Any] = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: begun.append(1), shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with (
        pytest.raises(InputError, match=r"--ray: no cluster at '.*' \(.*refused\); give its address, or \"local\""),
        cluster.connected(address.format(port=port)),
    ):
        pass
    with cluster.connected("local"):
        assert begun == [1]


def test_without_ray_it_is_one_sentence(tiny, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.txt").write_text("a")
    said = refusal("evaluate", tiny[0], tmp_path / "a.txt", "--ray", "local", "--backend", "pt")
    assert said == '--ray needs Ray: pip install "gpt2-multi[ray]"'
    said = refusal("evaluate", tiny[0], tmp_path / "a.txt", "--workers", "2", code=2)
    assert said == "--workers are those of a cluster; give --ray too"
