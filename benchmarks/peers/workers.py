"""The peers, each a process of its own: their versions exclude each other, and no one's threads disturb another's.

An environment variable may name the Python of a peer, as the sessions of noxfile.py do; otherwise this one runs it.
This library runs in such processes too. A peer that cannot run is reported, and the others are measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.rows import OURS, PeerError
from benchmarks.peers.calls import threads

ROOT = Path(__file__).resolve().parents[2]
ALIKE = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Peer:
    """Who is measured: the name, the class in this room, the variable of its Python, and the modes that it is made of.

    `kind`: one more mode, of which the rows tell in what they measure. `apart`: of packages that no other peer can live
    beside, so that only the Python that its variable names can run it. `compiles`: for each shape, in its first call.
    """

    name: str
    place: str
    python: str = ""
    apart: bool = False
    compiles: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    modes: tuple[str, ...] = ()
    kind: str = ""

    def __call__(self, *modes: str) -> Peer:
        """The same in these modes."""
        return replace(self, modes=modes)

    def of(self, kind: str) -> Peer:
        """The same of this kind."""
        return replace(self, kind=kind)

    @property
    def variable(self) -> str:
        """The environment variable with its Python."""
        return f"GPT2_MULTI_PEER_{self.python}"

    def interpreter(self) -> str:
        """The Python that runs it."""
        found = os.environ.get(self.variable) if self.python else ""
        if found or self.apart:
            if not Path(found or "").is_file():
                raise PeerError(f"{self.variable} names no Python; the sessions of noxfile.py set it")
            return str(found)
        return sys.executable

    def is_named(self, names: Sequence[str]) -> bool:
        """Whether this is its name or its name begins so, and where there are no names; apart, only if it can run."""
        name = self.name.removeprefix(f"{OURS}, ")
        begins = not names or any(name.startswith(given) for given in names)
        return name in names or (begins and (not self.apart or self.variable in os.environ))

    def title(self, package: str = "") -> str:
        """What its rows bear: the name, the version of its package, and its modes."""
        version = "" if self.name.startswith(OURS) else "".join(package.partition(" ")[1:])
        return ", ".join([self.name + version, *self.modes])


PYTORCH = Peer(f"{OURS}, PyTorch", "pt:Ours", compiles=False)
TENSORFLOW = Peer(f"{OURS}, TensorFlow", "tf:Ours")
JAX = Peer(f"{OURS}, JAX", "flax:Ours")
BACKENDS = (PYTORCH, TENSORFLOW, JAX)
CTRANSLATE2 = Peer("CTranslate2", "engines:CTranslate2", "CTRANSLATE2", compiles=False)
TRANSFORMERS = Peer("transformers", "pt:Transformers", "TRANSFORMERS", compiles=False)
TRANSFORMERS_TF = Peer("transformers (TensorFlow)", "tf:Transformers", "TF_TRANSFORMERS", True)
TRANSFORMERS_FLAX = Peer("transformers (Flax)", "flax:Transformers", "FLAX_TRANSFORMERS", True)
NANOGPT = Peer("nanoGPT", "nanogpt:NanoGPT", compiles=False)
KERASHUB = Peer("KerasHub", "engines:KerasHub", "TF_KERASHUB", environment={"KERAS_BACKEND": "tensorflow"})
KERASHUB_JAX = replace(KERASHUB, name="KerasHub (JAX)", python="FLAX_KERASHUB", environment={"KERAS_BACKEND": "jax"})


def check(who: Sequence[str]) -> None:
    """PeerError for a name that no peer's begins with."""
    known = [peer.name.removeprefix(f"{OURS}, ") for peer in globals().values() if isinstance(peer, Peer)]
    for name in who:
        if not any(there.startswith(name) for there in known):
            raise PeerError(f"--who: nobody's name begins with '{name}'; there are {', '.join(known)}")


def chosen(groups: Sequence[Sequence[Peer]], who: Sequence[str]) -> list[Sequence[Peer]]:
    """The groups in which there is someone of these names."""
    return [group for group in groups if any(peer.is_named(who) for peer in group)]


class Worker:
    """A running peer. It answers one call at a time."""

    def __init__(self, peer: Peer, folder: Path, log: Path) -> None:
        self.log, self.compiles = log, peer.compiles
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [peer.interpreter(), "-m", "benchmarks.peers", peer.place, str(folder), *peer.modes, peer.kind],
                cwd=ROOT,
                env=os.environ | ALIKE | {"OMP_NUM_THREADS": str(threads())} | peer.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, *call: Any) -> Any:
        """The result of a call of the peer, like `ask("generate", ids, 64, {})`."""
        self.send(*call)
        return self.answer()

    def send(self, *call: Any) -> None:
        """Begin a call; `answer` waits for its end."""
        with suppress(BrokenPipeError):  # of a peer that is gone; what it said last is in its log
            print(json.dumps(call), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """What the peer answers next; the first is its version."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            last = self.log.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise PeerError(f"{last[-1]} (exit code {self.process.wait()})")  # -9 is for too little memory, as a rule
        found = json.loads(line)
        if "error" in found:
            raise PeerError(found["error"])
        return found["result"]


@contextmanager
def running(peers: Sequence[Peer], folder: Path, who: Sequence[str] = ()) -> Iterator[dict[str, Worker]]:
    """The peers that have loaded the model of a folder, of those that `who` names, each under the name of its rows.

    They start together, and so load on all cores.
    """
    check(who)
    workers: dict[str, Worker] = {}
    start = time.perf_counter()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory()))
        named = [peer for peer in peers if peer.is_named(who)]
        started = [begun(peer, folder, logs / str(number), stack) for number, peer in enumerate(named)]
        for peer, worker in zip(named, started, strict=True):
            try:
                if worker is not None:
                    workers[peer.title(worker.answer())] = worker
            except PeerError as error:
                print(f"not measured: {peer.title()}: {error}")
        print(f"{len(workers)} peers are loaded in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        yield workers


def begun(peer: Peer, folder: Path, log: Path, stack: ExitStack) -> Worker | None:
    """The process of a peer, if there is a Python for it."""
    try:
        return stack.enter_context(Worker(peer, folder, log))
    except PeerError as error:
        print(f"not measured: {peer.title()}: {error}")
    return None
