"""Which backends the tests run on: all that are installed, or exactly those that `--backends` names."""

import gc
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.effort import THOROUGH

settings.register_profile("untimed", deadline=None)  # how long an example takes is asked nowhere
settings.load_profile("untimed")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for a second thread
# What is traced and compiled makes many objects that stay; the fixtures below say when all of them are looked at.
gc.set_threshold(50_000, 20, 10_000)
QUICK = [  # to compile: LLVM's optimisations take longer than all that these models compute
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]
os.environ.setdefault("XLA_FLAGS", "" if THOROUGH else " ".join(QUICK))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers, and processes that tests start, compile nothing twice
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from tests.support.adapters import BACKENDS

ROOM = 1 << 30  # bytes that tests may leave behind before it is worth the time to look at all that is there
STATM = Path("/proc/self/statm")
memory_after: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test is skipped")
    parser.addoption("--backends", help=f"comma-separated, of {', '.join(BACKENDS)}; one that is missing fails")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        requested = metafunc.config.getoption("--backends")
        names = (
            requested.split(",") if requested else [n for n, (m, _) in BACKENDS.items() if importlib.util.find_spec(m)]
        )
        metafunc.parametrize("backend", names, indirect=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """The function of tests/support/adapters.py that runs this backend."""
    module, run = BACKENDS[request.param]
    if not importlib.util.find_spec(module):
        pytest.fail(f"the backend {request.param} was asked for, but {module} is not installed")
    return run


@pytest.fixture(autouse=True)
def no_seed_is_left():
    """What a test samples does not depend on whether another called `set_seed`."""
    from gpt2_multi.generation import request

    yield
    request._next = None


@pytest.fixture(scope="session", autouse=True)
def graphs_are_quick():
    """TensorFlow's optimisations of a graph take longer than the graph, too."""
    if not THOROUGH and "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    """What earlier modules have left is looked at once; Keras collects garbage for every variable that is deleted."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def memory_is_bounded():
    """A compiled function and the model that it holds hold each other: they go where garbage is collected alone."""
    yield
    if resident() > memory_after.get("collection", 0) + ROOM:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        memory_after["collection"] = resident()


def resident() -> int:
    """How many bytes of memory this process has; 0 where the system is not one that says so here."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """The files of a small checkpoint in a format."""
    import numpy as np
    from gpt2_multi_conversion import convert

    from gpt2_multi.model.config import GPT2Config
    from tests.support.fixtures import write_model

    root = tmp_path_factory.mktemp("whole")
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    write_model(root / "model", config, "lm", dtype=np.float32)

    def files(format: str) -> dict[str, bytes]:
        if not (root / format).exists():
            convert(root / "model", root / format, to=format, force=True)
        return {path.name: path.read_bytes() for path in (root / format).iterdir()}

    return files


@pytest.fixture
def outcome(tmp_path: Path):
    """Opens files as the fuzzer does, and says what comes of it."""
    from tests.support.fuzz import attempt, timed

    with timed():
        yield lambda files: attempt(tmp_path / "case", files)
