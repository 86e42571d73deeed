"""The table of weights: counts, names, shapes, strictness, initialisation."""

import math
from pathlib import Path

import numpy as np
import pytest

from gpt2_multi.errors import CheckpointError
from gpt2_multi.model import checkpoint
from gpt2_multi.model.checkpoint.names import named
from gpt2_multi.model.checkpoint.source import Source
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import TORCH, TRANSFORMERS, match
from gpt2_multi.model.weights import parameter_count, table
from tests.support import fixtures

SMALL = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)


def shapes(config, head="lm", rooted=True):
    return {TRANSFORMERS.spell(weight, rooted): weight.shape for weight in table(config, head)}


def test_gpt2_has_148_tensors_and_124439808_parameters():
    assert len(table(GPT2Config())) == 148
    assert parameter_count(GPT2Config()) == 124_439_808


@pytest.mark.parametrize("name", fixtures.MODELS)
def test_names_and_shapes_are_exactly_the_files(name):
    head = fixtures.head(name)
    found = {key: array.shape for key, array in checkpoint.open(fixtures.folder(name)).found.items()}
    assert shapes(fixtures.config(name), head, head != "base") == found


def test_both_spellings_of_the_root_are_read():
    for rooted in (True, False):
        assert len(match(shapes(SMALL, rooted=rooted), SMALL, "lm", TRANSFORMERS, "here")) == len(table(SMALL))


def test_torch_stores_kernels_the_other_way_round():
    weight = next(weight for weight in table(SMALL) if weight.name == "h.0.mlp.c_fc.weight")
    assert weight.shape == (6, 24) and TORCH.shape(weight) == (24, 6)
    array = np.arange(144.0).reshape(6, 24)
    assert np.array_equal(TORCH.layout(weight, TORCH.layout(weight, array)), array)


def test_old_masks_and_foreign_heads_are_dropped():
    extra = {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": (), "score.weight": (2, 6)}
    assert match(shapes(SMALL) | extra, SMALL, "lm", TRANSFORMERS, "here").keys() == shapes(SMALL).keys()


def test_a_missing_task_head_is_left_out_but_half_of_one_is_refused():
    found = shapes(SMALL)
    assert len(match(found, SMALL, "token_classification", TRANSFORMERS, "here")) == len(found)
    with pytest.raises(CheckpointError, match=r"here lacks the tensor classifier\.bias"):
        match(found | {"classifier.weight": (2, 6)}, SMALL, "token_classification", TRANSFORMERS, "here")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s.pop("transformer.h.1.ln_1.bias"),
            r"here lacks the tensor transformer\.h\.1\.ln_1\.bias \(h\.1\.ln_1",
        ),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": (6,)}), r"here has unexpected the tensor transformer\.h\.2"),
        (
            lambda s: s.update({"transformer.wte.weight": (12, 6)}),
            r"wte\.weight.* has shape \(12, 6\), expected \(11, 6\)",
        ),
        (lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": (24, 6)}), r"\(24, 6\), expected \(6, 24\)"),
        (lambda s: s.clear(), r"lacks 28 tensors"),
        (
            lambda s: [s.pop(name) for name in list(s)] and s.update({"x.y": (2,)}),
            r"named as one.*found x\.y",
        ),
    ],
)
def test_strictness(change, sentence):
    found = shapes(SMALL)
    change(found)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in found.items()}
    with pytest.raises(CheckpointError, match=sentence):
        source = Source(Path("here"), "safetensors", Path("here"), named(arrays, TRANSFORMERS, "here"))
        checkpoint.Checkpoint(source, SMALL, "lm")


def test_an_untied_head_is_not_optional():
    untied = SMALL.replace(tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        match(shapes(SMALL), untied, "lm", TRANSFORMERS, "here")


def test_initialisation_scales_what_ends_a_residual_branch():
    stds = {weight.name: weight.std for weight in table(SMALL.replace(add_cross_attention=True))}
    residual = 0.02 / math.sqrt(2 * SMALL.n_layer)
    for name, std in stds.items():
        kernel = name.endswith("weight") and ".ln_" not in name and not name.startswith("ln_f")
        assert std == pytest.approx((residual if "c_proj" in name else 0.02) if kernel else 0.0), name


def test_pruned_heads_shrink_their_own_layer_only():
    pruned = dict(shapes(SMALL.replace(pruned_heads={1: [0, 2]}, add_cross_attention=True)))
    assert pruned["transformer.h.0.attn.c_attn.weight"] == (6, 18)
    assert pruned["transformer.h.1.attn.c_attn.weight"] == (6, 6)
    assert pruned["transformer.h.1.attn.c_proj.weight"] == (2, 6)
    assert pruned["transformer.h.1.crossattention.c_attn.weight"] == (6, 12)
