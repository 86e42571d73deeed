"""Which backends the tests run on: all that are installed, or exactly those that `--backends` names."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for a second thread
# LLVM's optimisations take longer than all that these models compute; core/parity/test_optimised.py lets it have them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from tests.support.adapters import BACKENDS


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


@pytest.fixture(autouse=True)
def collections_are_quick(request: pytest.FixtureRequest):
    """Keras collects garbage for every variable that is deleted, which takes long where other tests have left much."""
    if "tf" not in request.path.parts:
        yield
        return
    gc.freeze()
    yield
    gc.unfreeze()


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
