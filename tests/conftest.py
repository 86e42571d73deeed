"""Which backends the tests run on: all that are installed, or exactly those that `--backends` names."""

import importlib.util
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for a second thread

from tests.adapters import BACKENDS


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
    """The function of tests/adapters.py that runs this backend."""
    module, run = BACKENDS[request.param]
    if not importlib.util.find_spec(module):
        pytest.fail(f"the backend {request.param} was asked for, but {module} is not installed")
    return run
