"""Every check of this project, each in an environment of its own: `python3 -m nox -l` lists them."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]

CORE = [f"tests/{room}" for room in ("core", "tokenizer", "generation", "app", "conversion")]  # whatever the framework
TOOLS = ["hypothesis", "pytest", "pytest-xdist", "setuptools>=77"]  # the last builds the package
PEERS = [
    "accelerate",
    "gigatoken",
    "matplotlib",  # which draws the benchmarks
    "peft",
    "regex",
    "tiktoken",
    "tokenizers",
    "transformers",
]  # what results are held against
CLIENTS = [  # whose programs run on our classes
    "accelerate",
    "ai-edge-litert",
    "captum",
    "lightning",
    "lm_eval",
    "nnsight",
    "onnxruntime",
    "onnxscript",
    "openai",
    "outlines",
    "peft",
    "ray[data]",
    "transformers",
    "trl",
    "xgrammar",
]
AXE = "axe-core@4.14.1"  # whose rules say whether everybody can use the page of `serve`
BENCH_PEERS = {  # of the benchmarks: each in an environment of its own, which stays until its packages change
    "ctranslate2": ["ctranslate2==4.8.5", "transformers==4.57.6", "torch==2.13.0"],  # the others for its converter
    "tf_kerashub": ["keras-hub==0.32.0", "safetensors", "tensorflow==2.21.0"],  # as in constraints.txt
    "flax_kerashub": ["keras-hub==0.32.0", "safetensors", "jax==0.10.2"],
}
OLD_PEERS = {  # the last transformers with TensorFlow, and with Flax, which needs an older JAX
    "tf_transformers": ["transformers==4.57.6", "tf-keras==2.21.0", "tensorflow==2.21.0"],
    "flax_transformers": ["transformers==4.57.6", "jax==0.4.38", "jaxlib==0.4.38", "flax==0.10.4", "optax==0.2.5"],
}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}


def install(session: nox.Session, *packages: str) -> None:
    """Install with pip, at the versions of .ci/constraints.txt, and compile on all cores what pip would on one.

    What tests hardly import is left out: Python compiles it where it is imported after all.
    """
    session.install("--quiet", "--no-compile", "--constraint", ".ci/constraints.txt", *packages)
    unused = r"/tests/|/torch/(_inductor|testing/_internal)/|/sympy/physics/|/transformers/models/|/site-packages/pip/"
    compiler = ["python", "-m", "compileall", "-qq", "-j", "0", "-x", unused, session.virtualenv.location]
    session.run(*compiler, success_codes=[0, 1])  # some packages have files that are no Python


def pytest(session: nox.Session, *options: str) -> None:
    """Run the tests on all cores; none may be skipped where the shared data is there."""
    shared = os.environ.get("GPT2_MULTI_SHARED") or Path("..", "shared")
    strict = ["--no-skips"] if Path(shared).is_dir() and session.name in ("tests", "thorough") else []
    # A worker that is done takes over what another would do last, so that most modules' fixtures are made once.
    parallel = ["-n", "auto", "--dist", "worksteal"]
    session.run("python", "-m", "pytest", *parallel, *strict, *options, *session.posargs, env=QUIET)


@nox.session
def demo(session: nox.Session) -> None:
    """Generate text offline with the built-in model, and show that the backends agree with NumPy."""
    install(session, ".[pt]")
    session.chdir(session.create_tmp())  # the installed package is what runs, not the source beside it
    session.run("gpt2-multi", "generate", "ROMEO:", "--seed", "1", *session.posargs, env=QUIET)
    session.run("gpt2-multi", "doctor", env=QUIET)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test, with every framework installed in one environment."""
    install(session, ".[all,docs,examples]", *TOOLS, *PEERS)
    # One part after the other: what TensorFlow and JAX compile stays in memory as long as the process.
    generation = "tests/tf/generation"
    app, *others = sorted(CORE, key="tests/app".__ne__)
    parts = [[*others, "tests/pt"], [app], [generation], ["tests/tf", f"--ignore={generation}"], ["tests/flax"]]
    for part in [[]] if session.posargs else parts:
        pytest(session, "--backends=pt,tf,flax", *part)


@nox.session
def thorough(session: nox.Session) -> None:
    """Run what `tests` runs, with all optimisations of XLA and TensorFlow, and the fuzzers at full length."""
    session.env["GPT2_MULTI_THOROUGH"] = "1"
    tests(session)


@nox.session
def core(session: nox.Session) -> None:
    """Run the tests of the core, without any framework."""
    install(session, ".", *TOOLS)
    pytest(session, "--backends=", *CORE)


@nox.session
def pt(session: nox.Session) -> None:
    """Run the tests of the core and of PyTorch."""
    install(session, ".[pt]", *TOOLS, *PEERS)
    pytest(session, "--backends=pt", *CORE, "tests/pt")


@nox.session
def tf(session: nox.Session) -> None:
    """Run the tests of the core and of TensorFlow, without any other framework."""
    install(session, ".[tf,examples]", *TOOLS)
    pytest(session, "--backends=tf", *CORE, "tests/tf")


@nox.session
def large(session: nox.Session) -> None:
    """Run what needs bitsandbytes and torchao: 46 MB to fetch, 150 MB on the disk, seconds to import."""
    install(session, ".[pt,large]", *TOOLS, *PEERS)
    pytest(session, "--backends=pt", "tests/pt/callers/large")


@nox.session
def pt_oldest(session: nox.Session) -> None:
    """Run PyTorch's tests on the oldest versions that pyproject.toml allows; the other sessions have the newest."""
    oldest(session, "pt", "accelerate==1.2.0", "peft==0.14.0", "transformers==4.46.3")  # all of one year


@nox.session
def tf_oldest(session: nox.Session) -> None:
    """Run TensorFlow's tests likewise."""
    oldest(session, "tf")


@nox.session
def flax_oldest(session: nox.Session) -> None:
    """Run Flax's tests likewise."""
    oldest(session, "flax")


def oldest(session: nox.Session, backend: str, *peers: str) -> None:
    """Run a framework's tests, and those of the hub's client, on the oldest versions of whatever is required."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    required = [*project["dependencies"], *project["optional-dependencies"][backend]]
    pinned = [requirement.replace(">=", "==") for requirement in required]
    session.install("--quiet", f".[{backend}]", *pinned, *peers, *TOOLS)
    session.env["XLA_FLAGS"] = ""  # old versions have not all of those that tests/conftest.py sets
    pytest(session, f"--backends={backend}", "tests/core/test_hub.py", f"tests/{backend}")


@nox.session
def flax(session: nox.Session) -> None:
    """Run the tests of the core and of Flax, without any other framework."""
    install(session, ".[flax,examples]", *TOOLS)
    pytest(session, "--backends=flax", *CORE, "tests/flax")


@nox.session
def clients(session: nox.Session) -> None:
    """Run the scripts of examples/clients, each in a process and a folder of its own: `nox -s clients -- peft`."""
    install(session, ".[pt,tf,flax,serve]", *CLIENTS)
    # xgrammar wants it for GPUs; its LLVM and TensorFlow's end a process that loads both.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "triton")
    scripts = sorted(Path("examples", "clients").resolve().glob("*/with_*.py"))
    chosen = [path for path in scripts if not session.posargs or path.stem.removeprefix("with_") in session.posargs]
    if failed := [path.name for path in chosen if not passes(session, path)]:
        session.error(f"these failed: {', '.join(failed)}")


def passes(session: nox.Session, script: Path) -> bool:
    """Whether a script runs to its end, where the installed package is what it finds."""
    session.chdir(tempfile.mkdtemp(dir=session.create_tmp()))
    try:
        return bool(session.run("python", str(script), env=QUIET))
    except nox.command.CommandFailed:
        return False


@nox.session
def page(session: nox.Session) -> None:
    """Try the page of `serve` in Chromium; `nox -s page -- pictures` draws those of the documentation instead."""
    install(session, ".[pt,serve]", *TOOLS, "playwright")
    chromium = os.environ.get("GPT2_MULTI_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        session.error("install Chromium, or say in GPT2_MULTI_CHROMIUM where it is")
    if session.posargs == ["pictures"]:
        session.run("python", "-m", "tests.app.serve.browser.pictures", chromium, "docs/images", env=QUIET)
        return
    place = session.create_tmp()
    session.run("npm", "install", "--silent", "--prefix", place, AXE, external=True)
    axe = str(Path(place, "node_modules", "axe-core", "axe.min.js"))
    env = QUIET | {"GPT2_MULTI_CHROMIUM": chromium, "GPT2_MULTI_AXE": axe}
    session.run("python", "-m", "pytest", "--no-skips", "tests/app/serve/browser", *session.posargs, env=env)


@nox.session
def conversion_peers(session: nox.Session) -> None:
    """Let transformers 4.57's TensorFlow and KerasHub read what the conversion wrote, besides all that `tests` runs."""
    install(session, ".[pt,tf,flax]", *TOOLS, *PEERS)
    pythons = peers(session, "tf_kerashub", "tf_transformers")
    session.run("python", "-m", "pytest", "tests/conversion/test_peers.py", *session.posargs, env=QUIET | pythons)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, and who imports whom."""
    install(session, ".", "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, ".[pt,serve]", "mypy")
    session.run("mypy")


@nox.session
def checks(session: nox.Session) -> None:
    """Run `lint`, `types` and `demo`, in one environment."""
    for check in (lint, types, demo):
        check(session)


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Measure this library beside its peers: `nox -s bench -- NAME...`; see benchmarks/README.md."""
    install(session, ".[all]", *PEERS)
    session.run("python", "-m", "benchmarks", *session.posargs, env=QUIET | peers(session, *BENCH_PEERS))


@nox.session(reuse_venv=True)
def bench_old(session: nox.Session) -> None:
    """Likewise, beside the last transformers with TensorFlow and Flax too."""
    install(session, ".[all]", *PEERS)
    session.run("python", "-m", "benchmarks", *session.posargs, env=QUIET | peers(session, *BENCH_PEERS, *OLD_PEERS))


def peers(session: nox.Session, *names: str) -> dict[str, str]:
    """A variable for the Python of each peer."""
    packages = BENCH_PEERS | OLD_PEERS
    return {f"GPT2_MULTI_PEER_{name.upper()}": peer(session, name, packages[name]) for name in names}


def peer(session: nox.Session, name: str, packages: list[str]) -> str:
    """The Python of an environment with one peer, made unless it is there with just these packages.

    Where the peer cannot be installed, the benchmark says so, and the next run tries again.
    """
    place = session.cache_dir.resolve() / "peers" / name
    python, stamp = str(place / ("Scripts" if os.name == "nt" else "bin") / "python"), place / "packages.txt"
    wanted = "\n".join([sys.version, *packages])
    if not (stamp.is_file() and stamp.read_text("utf-8") == wanted):
        session.run(sys.executable, "-m", "venv", "--clear", str(place), external=True)
        try:
            session.run(python, "-m", "pip", "install", "--quiet", *packages, external=True)
            stamp.write_text(wanted, "utf-8")
        except nox.command.CommandFailed:
            session.warn(f"{name} is not there, and will not be measured")
    return python


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build."""
    install(session, ".[pt,tf,flax,docs]")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build", *session.posargs)
