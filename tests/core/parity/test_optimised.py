"""A few tests again, with all of XLA's and TensorFlow's optimisations; `nox -s thorough` runs all tests so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TESTS = {
    "flax": [
        "core/parity/test_parity.py::test_float64_equals_the_oracle[flax-double_heads]",
        "flax/generation/test_generation.py::test_greedy_tokens_equal_the_recorded[float32-greedy_eos-options1]",
    ],
    "tf": [
        "tf/generation/test_generation.py::test_greedy_tokens_equal_the_recorded[float32 xla-greedy_eos-options1]",
        "tf/generation/test_generation.py::test_greedy_tokens_equal_the_recorded[float64 graph-greedy_eos-options1]",
        "tf/generation/test_generation.py::test_xla_compiles_samples_from_a_multiple_of_eight_words",
    ],
}


@pytest.mark.parametrize("framework", TESTS)
def test_numbers_and_tokens_are_the_same_with_optimisations(framework):
    pytest.importorskip({"tf": "tensorflow", "flax": "flax"}[framework])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--backends={framework}", "--no-skips"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in TESTS[framework])],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": "", "GPT2_MULTI_THOROUGH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
