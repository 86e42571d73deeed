"""A fuzzer: random configurations, heads, inputs and padding, every backend against the oracle in float64.

The seed is printed and new in each run; GPT2_MULTI_SEED repeats one.
"""

import os
import random

import numpy as np
import pytest

from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import ACTIVATIONS, SUMMARY_TYPES
from gpt2_multi.model.weights import HEADS
from tests.core.parity.test_parity import BOUND64, difference
from tests.support import fixtures
from tests.support.effort import some

SEED = int(os.environ.get("GPT2_MULTI_SEED", random.SystemRandom().randrange(2**32)))
ROUNDS = some(40, 6)


def random_config(rng):
    n_head = int(rng.integers(1, 5))
    n_layer = int(rng.integers(1, 4))
    flags = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")
    pruned = {layer: rng.choice(n_head, rng.integers(0, n_head), replace=False).tolist() for layer in range(n_layer)}
    return GPT2Config(
        vocab_size=int(rng.integers(5, 60)),
        n_positions=int(rng.integers(8, 20)),
        n_embd=n_head * int(rng.integers(1, 7)),
        n_head=n_head,
        n_layer=n_layer,
        n_inner=rng.choice([None, 1, 7]),
        activation_function=str(rng.choice(list(ACTIVATIONS))),
        summary_activation=rng.choice([None, "tanh"]),
        summary_type=str(rng.choice(SUMMARY_TYPES)),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-2])),
        add_cross_attention=bool(rng.integers(2)),
        num_labels=int(rng.integers(2, 5)),
        pad_token_id=int(rng.integers(0, 5)),
        pruned_heads={layer: heads for layer, heads in pruned.items() if heads},
        **{flag: bool(rng.integers(2)) for flag in flags},
    )


def padding(rng, shape):
    """A mask with padding on the left, on the right, or anywhere; every row keeps a token."""
    mask = np.ones(shape, np.int64)
    for row in mask.reshape(-1, shape[-1]):
        cut = int(rng.integers(0, shape[-1]))
        hidden = [slice(0, cut), slice(shape[-1] - cut, None), rng.choice(shape[-1], cut, replace=False)][
            rng.integers(3)
        ]
        row[hidden] = 0
    return mask


def random_inputs(rng, config, head):
    batch, length = int(rng.integers(1, 4)), int(rng.integers(1, config.n_positions + 1))
    shape = (batch, 2, length) if head == "double_heads" else (batch, length)
    inputs = {"input_ids": rng.integers(0, config.vocab_size, shape)}
    if rng.integers(2):
        inputs["attention_mask"] = padding(rng, shape)
    if rng.integers(2):
        inputs["token_type_ids"] = rng.integers(0, config.vocab_size, shape)
    if not rng.integers(4):
        inputs["position_ids"] = rng.integers(0, config.n_positions, shape)
    if config.add_cross_attention and head in ("base", "lm"):
        inputs["encoder_hidden_states"] = rng.normal(size=(batch, 3, config.n_embd))
        inputs["encoder_attention_mask"] = padding(rng, (batch, 3))
    return inputs | random_labels(rng, config, head, shape)


def random_labels(rng, config, head, shape):
    tokens = np.where(rng.random(shape) < 0.2, -100, rng.integers(0, config.vocab_size, shape))
    return {
        "base": {},
        "lm": {"labels": tokens},
        "double_heads": {"labels": tokens, "mc_labels": rng.integers(0, 2, shape[0])},
        "sequence_classification": {"labels": rng.integers(0, config.num_labels, shape[0])},
        "token_classification": {"labels": rng.integers(0, config.num_labels, shape)},
        "question_answering": {f"{side}_positions": rng.integers(0, 20, shape[0]) for side in ("start", "end")},
    }[head]


def kept(config, inputs):
    mask = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape))
    return mask.reshape(-1, mask.shape[-1]) != 0


@pytest.mark.filterwarnings("ignore:.*begin again within a row")  # by chance
def test_random_models_equal_the_oracle(backend, tmp_path):
    print(f"GPT2_MULTI_SEED={SEED}")
    for number in range(ROUNDS):
        rng = np.random.default_rng([SEED, number])
        config, head = random_config(rng), str(rng.choice(list(HEADS)))
        arrays = fixtures.write_model(tmp_path / str(number), config, head, seed=number)
        inputs = random_inputs(rng, config, head)
        expected = reference.outputs(config, arrays, head, inputs)
        attention = str(rng.choice(["sdpa", "eager"]))
        found = backend(head, tmp_path / str(number), "float64", inputs, attn_implementation=attention)
        for key in found:
            value = np.asarray(expected[key])
            flat = (-1, *value.shape[-2:]) if inputs["input_ids"].ndim == 3 and value.ndim == 4 else value.shape
            where = (number, head, key, attention)
            assert difference(found[key].reshape(flat), value.reshape(flat), kept(config, inputs)) <= BOUND64, where
