"""Rows that come and go in Flax: options of their own, tokens as alone, few compilations."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from gpt2_multi.flax.generation import rules
from gpt2_multi.generation.options import Options
from tests.support.effort import some
from tests.support.generation_cases import rows_case

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype


def test_each_row_has_its_own_options():
    @jax.jit
    def chosen(logits, ids, mask, length, made, options):
        kept = rules.process(logits, ids, mask, length, made, options)
        return kept.logits, rules.choose(kept, made, options)

    for seed in range(some(200, 40)):
        case = rows_case(seed)
        options = Options.stacked(case.rows, case.logits.shape[1])
        processed, tokens = chosen(case.logits, case.ids, case.mask, case.length, case.made, options)
        sampled = [row.config.do_sample for row in case.rows]
        np.testing.assert_allclose(processed[np.array(sampled)], case.processed[sampled], rtol=1e-9)
        assert tokens.tolist() == case.chosen.tolist()
