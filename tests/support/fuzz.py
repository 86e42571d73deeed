"""Damages checkpoints of every format and opens them: `python -m tests.support.fuzz --seed N --count N`.

Whatever the damage, a checkpoint opens, and each of its tensors can be read, or it is a CheckpointError or ConfigError:
within two seconds, without more memory than twice its files, without running code or opening a file elsewhere.
`--only I` makes case I of a seed again, and `--keep FOLDER` leaves its files there.
"""

import argparse
import codecs
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpt2_multi_conversion import convert

from gpt2_multi.errors import CheckpointError, ConfigError
from gpt2_multi.model.checkpoint import find
from gpt2_multi.model.checkpoint import open as open_checkpoint
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
from tests.support import damage
from tests.support.fixtures import DATA, write_model

SECONDS, MEGABYTES, BATCH = 2.0, 8, 250  # seconds of the processor, or five times as many in all
Files = dict[str, bytes]
watching: list[bool] = []  # not empty while a checkpoint is read


class Source(NamedTuple):
    """A checkpoint that is whole: its files, and of each file the places that are not numbers of a tensor."""

    files: Files
    places: dict[str, list[int]]


class Hang(BaseException):
    """What a case that takes too long is ended with; no parser may catch it."""


class Refused(BaseException):
    """What running a program, or opening a file elsewhere, is ended with."""


def sources(folder: Path) -> dict[str, Source]:
    """Checkpoints of every format that our own writers make, and those of the shared fixtures, by name."""
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    write_model(folder / "model", config, "lm", dtype=np.float32)
    write_model(folder / "labels", config, "token_classification", dtype=np.float32)
    for name in FORMATS:
        convert(folder / "model", folder / "made" / name, to=name, force=True)
        if "token_classification" in FORMATS[name].heads:
            convert(folder / "labels", folder / "made" / f"{name} with a head", to=name)
    for name in ("safetensors", "pytorch"):
        convert(folder / "model", folder / "made" / f"{name} in shards", to=name, max_shard_size=3000)
    _write_odd(folder / "made", folder / "wide")
    made = {path.name: path for path in sorted((folder / "made").iterdir())}
    return {name: _source(path) for name, path in {**made, **_fixtures()}.items()}


def _write_odd(made: Path, wide: Path) -> None:
    """A file of Lightning beside a config.json; and folders without one, whose heads are 64 wide."""
    trainers = DATA / "trainers"
    (made / "lightning").mkdir()
    shutil.copy(trainers / "lightning" / "last.ckpt", made / "lightning")
    shutil.copy(trainers / "reference" / "config.json", made / "lightning")
    write_model(wide, GPT2Config(vocab_size=13, n_positions=8, n_embd=64, n_layer=1, n_head=1), "lm")
    for name in ("safetensors", "torch-pickle", "tf-h5", "flax-msgpack", "mingpt-2020"):
        convert(wide, made / f"{name} alone", to=name, dtype="float16", force=True)
        (made / f"{name} alone" / "config.json").unlink()


def _fixtures() -> dict[str, Path]:
    root = Path(os.environ.get("GPT2_MULTI_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "fixtures"
    folders = [*root.glob("lm_formats/*"), *root.glob("nanogpt/*"), root / "openai_tf1", root / "keras_hub"]
    folders += [DATA / "peers" / name for name in ("build_nanogpt", "mingpt")]
    return {f"{path.name} of others": path for path in sorted(folders) if path.is_dir()}


def _source(folder: Path) -> Source:
    names = [path for path in sorted(folder.iterdir()) if path.name not in ("reference.safetensors", "conversion.json")]
    files = {path.name: path.read_bytes() for path in names}
    return Source(files, {name: list(_places(data, folder)) for name, data in files.items()})


def _places(data: bytes, folder: Path) -> Iterator[int]:
    """The places of a file that are not within a tensor's numbers."""
    taken = bytearray(len(data))
    for array in find(folder).names.tensors.values():
        numbers = array.tobytes()
        start = data.find(numbers) if len(numbers) > 8 else -1
        if start >= 0:
            taken[start : start + len(numbers)] = b"\1" * len(numbers)
    return (place for place, byte in enumerate(taken) if not byte)


def damaged(made: dict[str, Source], seed: int, number: int) -> tuple[str, str, Files]:
    """Case `number` of a seed: which checkpoint, what was done to it, and its files."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(made))
    files, done = dict(made[name].files), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        harm = rng.choice(damage.fitting(files))
        done.append(harm.__name__)
        harm(rng, files, made[name].places)
    return name, " and ".join(done), files


def attempt(folder: Path, files: Files) -> str:
    """What becomes of a checkpoint: `opened`, the name of the error that may be, or `FAULT` and why."""
    write(folder, files)
    size = sum(map(len, files.values()))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)
    watching.append(True)
    try:
        outcome = read(folder)
    except Hang:
        outcome = "FAULT: it hangs"
    except BaseException as error:
        outcome = f"FAULT: {type(error).__name__}: {error}"[:300]
    finally:
        watching.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = tracemalloc.get_traced_memory()[1] - before
    if peak > 2 * size + MEGABYTES * 2**20:
        outcome = f"FAULT: {peak} bytes for files of {size} ({outcome})"
    return outcome


def write(folder: Path, files: Files) -> None:
    """Make the folder hold these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def read(folder: Path) -> str:
    """Open a checkpoint and read each of its tensors once."""
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint:
            array = checkpoint[name]
            if array.shape != checkpoint.weights[name].shape:
                return f"FAULT: {name} has the shape {array.shape}"
            array.reshape(-1)[:: max(1, array.size // 64)].tobytes()
        return "opened"
    except (CheckpointError, ConfigError) as error:
        return f"{type(error).__name__ if len(str(error)) < 2000 else 'FAULT'}: {error}"


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Raise Hang when the time of `attempt` is up, and trace memory for it."""

    def ring(*_: object) -> None:
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def guard(folder: Path) -> None:
    """Raise Refused where a program is run or a file outside the folder is opened."""
    inside = str(folder)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if not watching:
            return
        ran = event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "exec")
        outside = event == "open" and isinstance(given[0], str) and not given[0].startswith(inside)
        if ran or outside:
            raise Refused(f"{event} {given}")

    for name in ("raw_unicode_escape", "utf_8_sig", *(f"utf_{n}{end}" for n in (16, 32) for end in ("", "_le", "_be"))):
        codecs.lookup(name)  # whose module is opened at its first use
    sys.addaudithook(hook)


def run(made: dict[str, Source], seed: int, count: int, folder: Path) -> list[tuple[int, str, str, str]]:
    """All cases of a seed, in children: (number, checkpoint, damage, outcome)."""
    results: list[tuple[int, str, str, str]] = []
    while len(results) < count:
        start = len(results)
        results += _batch(made, seed, start, min(count, start + BATCH), folder)
    return results


def _batch(made: dict[str, Source], seed: int, start: int, stop: int, folder: Path) -> list[tuple[int, str, str, str]]:
    """Cases in one child; where it dies, the case that it died of is the last."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _child(made, seed, range(start, stop), folder / f"case {os.getpid()}", writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as lines:
        results = [tuple(json.loads(line)) for line in lines]
    _, status = os.waitpid(child, 0)
    if status:
        number = start + len(results)
        name, damage, _ = damaged(made, seed, number)
        results.append((number, name, damage, f"FAULT: the process ended with {status}"))
    return results


def _child(made: dict[str, Source], seed: int, numbers: range, folder: Path, pipe: int) -> None:
    write(folder, next(iter(made.values())).files)
    assert read(folder) == "opened"  # and what is imported late is there
    guard(folder)
    with timed(), os.fdopen(pipe, "w", encoding="utf-8") as out:
        for number in numbers:
            name, damage, files = damaged(made, seed, number)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            outcome = attempt(folder, files)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown * 1024 > 3 * sum(map(len, files.values())) + 4 * MEGABYTES * 2**20:
                outcome = f"FAULT: {grown} KB more of resident memory ({outcome})"
            print(json.dumps((number, name, damage, outcome)), file=out, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def table(results: list[tuple[int, str, str, str]]) -> str:
    """How often each format ended how."""
    counts = collections.Counter((name, outcome.split(":")[0]) for _, name, _, outcome in results)
    outcomes = sorted({outcome for _, outcome in counts})
    lines = [f"{'':44}" + "".join(f"{outcome:>17}" for outcome in outcomes)]
    for name in sorted({name for name, _ in counts}):
        lines.append(f"{name:44}" + "".join(f"{counts[name, outcome]:17}" for outcome in outcomes))
    return "\n".join(lines)


def main() -> int:
    """The command line; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = sources(Path(folder))
        if given.only is not None:
            name, damage, files = damaged(made, given.seed, given.only)
            print(name, damage)
            write(given.keep or Path(folder) / "case", files)
            print(read(given.keep or Path(folder) / "case"))
            return 0
        began = time.monotonic()
        results = run(made, given.seed, given.count, Path(folder))
    print(table(results))
    faults = [result for result in results if result[3].startswith("FAULT")]
    for number, name, damage, outcome in faults[:50]:
        print(f"--only {number}: {name}: {damage}: {outcome}")
    rate = len(results) / (time.monotonic() - began)
    print(f"seed {given.seed}: {len(results)} files, {len(faults)} faults, {rate:.0f} files a second")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
