"""The checker of inputs: on facts alone, without a framework, and no more looks at values than it needs."""

import numpy as np
import pytest

from gpt2_multi import GPT2Config
from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs

CONFIG = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2)


class Given(dict):
    """Facts by name that note which values were asked for; an array, or a shape whose values are not known."""

    def __init__(self, **given):
        self.looked = []
        super().__init__({name: self._facts(name, x) for name, x in given.items()})

    def _facts(self, name, x):
        array = np.empty([size or 1 for size in x], np.int64) if isinstance(x, tuple) else np.asarray(x)
        kind = {"i": "integers", "f": "floats", "U": "strings"}.get(array.dtype.kind, "others")

        def values():
            self.looked.append(name)
            return None if isinstance(x, tuple) else array

        return inputs.Facts(x if isinstance(x, tuple) else array.shape, array.dtype.name, kind, values)


def check(given, past=0, keys=None, values=True):
    _batch, length = inputs.check_source(CONFIG, given).shape[:2]
    keys = past + length if None not in (past, length) else keys
    inputs.check_call(CONFIG, given, (50, 8), past, keys, values)


def test_values_are_looked_at_only_where_they_decide():
    ids = np.zeros((2, 3), np.int64)
    check(given := Given(input_ids=ids, attention_mask=np.ones((2, 8), int)), past=5)
    assert given.looked == ["input_ids"]  # 8 tokens fit, whatever the mask hides
    check(given := Given(input_ids=ids, attention_mask=np.tile([0] + [1] * 8, (2, 1))), past=6)
    assert given.looked == ["input_ids", "attention_mask"]
    with pytest.raises(InputError, match="9 tokens are more than n_positions 8"):
        check(Given(input_ids=ids, attention_mask=np.ones((2, 9), int)), past=6)


def test_without_values_every_shape_is_looked_at_alone():
    check(given := Given(input_ids=np.full((2, 3), 99)), values=False)
    assert not given.looked
    with pytest.raises(InputError, match="attention_mask: expected shape"):
        check(Given(input_ids=np.zeros((2, 3), int), attention_mask=np.ones((2, 4), int)), values=False)
    with pytest.raises(InputError, match="the id 99 is outside the vocabulary"):
        check(Given(input_ids=np.full((2, 3), 99)))


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": (None, None), "attention_mask": (None, None), "head_mask": (2, None, 2, None, None)},
        {"input_ids": (2, None), "attention_mask": (2, 2, None, None), "position_ids": (1, None)},
        {"input_ids": (2, 9)},
    ],
    ids=str,
)
def test_sizes_and_values_that_are_not_known_fit(given):
    check(Given(**given), past=None)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"input_ids": (None, 3), "token_type_ids": (None, 4)}, r"token_type_ids: expected shape \(any, 3\)"),
        ({"input_ids": (2, None), "attention_mask": (3, None)}, "attention_mask: expected shape"),
        ({"input_ids": (2, 3), "head_mask": (3,)}, "head_mask: expected shape"),
        ({"input_ids": (2, 3), "attention_mask": [["a"]]}, "attention_mask: expected numbers, found strings"),
        ({"inputs_embeds": (2, 3, 8)}, "inputs_embeds: expected floats, found int64"),
    ],
    ids=str,
)
def test_what_is_known_is_checked(given, sentence):
    with pytest.raises(InputError, match=sentence):
        check(Given(**given))


def place(rows, mask=None, are_apart=False):
    given = {"input_ids": inputs.Facts.of(np.zeros_like(rows)), "position_ids": inputs.Facts.of(np.array(rows))}
    if mask is not None:
        given["attention_mask"] = inputs.Facts.of(np.array(mask))
    inputs.check_call(GPT2Config(), given, (50257, 1024), 0, len(rows[0]), are_apart=are_apart)


def test_positions_that_begin_again_are_warned_of():
    """But not where documents are apart, and not those of padding."""
    for rows, mask in (([[0, 1, 0, 1]], None), ([[3, 3, 4]], None), ([[1, 0, 1, 0]], [[0, 1, 1, 1]])):
        with pytest.warns(
            UserWarning, match="position_ids: begin again within a row, whose tokens see all before them"
        ):
            place(rows, mask)
    place([[0, 1, 0, 1]], are_apart=True)
    place([[1, 1, 0, 1]], [[0, 0, 1, 1]])
    place([[0, 1, 0, 0]], [[1, 1, 0, 0]])
    place([[7, 3, 9, 4]])
    with pytest.warns(UserWarning, match="position_ids"):
        place([[0, 1, 0, 1]], [[1, 1, 1, 1]], are_apart=True)
