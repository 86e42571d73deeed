"""Six planted bugs must each exceed the bound of the parity test: that earns the bound its trust.

On randomised weights, in float64: at fresh initialisation two of them would change nothing at all.
"""

import numpy as np
import pytest

from gpt2_multi.model.checkpoint import write_weights
from gpt2_multi.model.weights import table
from tests.core.parity.test_parity import BOUND64
from tests.support import fixtures

LM = "lm"


def swap(w, left, right):
    """Exchange two names wherever they occur."""
    return {name: w[name.replace(left, "?").replace(right, left).replace("?", right)] for name in w}


def swap_q_and_k(w):
    """Exchange the query's and the key's columns of every c_attn."""

    def swapped(array):
        q, k, v = np.split(array, 3, axis=-1)
        return np.concatenate([k, q, v], -1)

    return {name: swapped(array) if "attn.c_attn" in name else array for name, array in w.items()}


WEIGHT_BUGS = {
    "ln_1 and ln_2 swapped": lambda w: swap(w, "ln_1", "ln_2"),
    "biases dropped": lambda w: {
        n: np.zeros_like(a) if n.endswith("bias") and ".ln_" not in n else a for n, a in w.items()
    },
    "q and k swapped": swap_q_and_k,
    "c_proj transposed": lambda w: {n: a.T.copy() if n.endswith("attn.c_proj.weight") else a for n, a in w.items()},
}
CONFIG_BUGS = {
    "exact GELU for tanh": {"activation_function": "gelu"},
    "epsilon 1e-6": {"layer_norm_epsilon": 1e-6},
}


def write(where, config, arrays):
    where.mkdir(exist_ok=True)
    config.save_pretrained(where)
    write_weights(where, [(w, np.dtype(np.float64), lambda w=w: arrays[w.name]) for w in table(config, LM)], LM)
    return where


def difference(backend, tmp_path, config, arrays):
    ids = {"input_ids": fixtures.reference(LM)["in.input_ids"]}
    right = backend(LM, fixtures.folder(LM), "float64", ids)["logits"]
    wrong = backend(LM, write(tmp_path / "bug", config, arrays), "float64", ids)["logits"]
    return np.abs(right - wrong).max()


@pytest.mark.parametrize("bug", [*WEIGHT_BUGS, *CONFIG_BUGS])
def test_a_planted_bug_exceeds_the_bound(bug, backend, tmp_path):
    arrays = WEIGHT_BUGS.get(bug, dict)(fixtures.weights(LM))
    config = fixtures.config(LM).replace(**CONFIG_BUGS.get(bug, {}))
    found = difference(backend, tmp_path, config, arrays)
    print(f"{bug}: {found:.1e}")
    assert found > 1000 * BOUND64


def test_without_a_bug_nothing_differs(backend, tmp_path):
    assert difference(backend, tmp_path, fixtures.config(LM), fixtures.weights(LM)) < BOUND64 / 1000
