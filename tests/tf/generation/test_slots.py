"""Rows that come and go in TensorFlow: options of their own, tokens as alone, few traces."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.generation.options import Options
from gpt2_multi.tf.generation import rules
from tests.support.effort import some
from tests.support.generation_cases import rows_case


def test_each_row_has_its_own_options():
    @tf.function(autograph=False)
    def chosen(logits, ids, mask, length, made, options):
        kept = rules.process(logits, ids, mask, length, made, options)
        return kept.logits, rules.choose(kept, made, options)

    for seed in range(some(200, 40)):
        case = rows_case(seed)
        options = rules.as_tensors(Options.stacked(case.rows, case.logits.shape[1]))
        given = map(tf.constant, (case.logits, case.ids, case.mask, case.length, case.made))
        processed, tokens = chosen(*given, options)
        sampled = [row.config.do_sample for row in case.rows]
        np.testing.assert_allclose(processed.numpy()[sampled], case.processed[sampled], rtol=1e-9)
        assert tokens.numpy().tolist() == case.chosen.tolist()
