"""Datasets of rows for `fit`, as `prepare_tf_dataset` makes them of what `datasets` gives."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import GPT2Tokenizer
from gpt2_multi import tf as tfm
from gpt2_multi.errors import InputError
from tests.tf.fit.test_fit import compiled, new

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2


class Rows:
    """What is asked of a `datasets.Dataset`."""

    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, at):
        return {name: values[at] for name, values in self.columns.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.from_pretrained("demo")


SIZES = [5, 3, 7, 1, 4]
IDS = [list(range(1, 1 + size)) for size in SIZES]
RAGGED = Rows({"text": ["a"] * 5, "input_ids": IDS, "labels": IDS})


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_and_train(tokenizer, side):
    tokenizer.padding_side = side
    data = compiled().prepare_tf_dataset(RAGGED, batch_size=2, shuffle=False, tokenizer=tokenizer)
    batches = list(data.as_numpy_iterator())
    assert [x["input_ids"].shape for x, _ in batches] == [(2, 5), (2, 7), (1, 4)] and len(data) == 3
    for x, y in batches:
        assert set(x) == {"input_ids", "attention_mask"}
        np.testing.assert_array_equal(y, np.where(x["attention_mask"] == 1, x["input_ids"], -100))
    model = new()
    model.resize_token_embeddings(len(tokenizer))
    model.compile("adam", metrics=["perplexity"], run_eagerly=True)
    history = model.fit(data, epochs=3, validation_data=data, shuffle=False, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] and history["val_perplexity"][-1] > 1
    assert model.predict(data.take(1), verbose=0).logits.shape == (2, 5, len(tokenizer))


def test_every_epoch_has_another_order_and_no_smaller_batch():
    rows = Rows({"input_ids": np.arange(1, 23).reshape(11, 2), "label": np.arange(11) % 3})
    model = new(tfm.TFGPT2ForSequenceClassification)
    data = model.prepare_tf_dataset(rows, 4)
    assert len(data) == 2 and sum(len(y) for _, y in data.as_numpy_iterator()) == 8
    order = [[x["input_ids"][:, 0].tolist() for x, _ in data.as_numpy_iterator()] for _ in range(3)]
    assert len({str(each) for each in order}) > 1
    x, y = next(iter(model.prepare_tf_dataset(rows, 11)))
    np.testing.assert_array_equal(y, (x["input_ids"][:, 0] - 1) // 2 % 3)
    model.compile("sgd", metrics=["accuracy"], run_eagerly=True)
    assert set(model.fit(data, shuffle=False, verbose=0).history) == {"loss", "accuracy"}


def test_a_function_of_one_s_own_makes_the_batches():
    def joined(rows, extra):
        ids = np.concatenate([row["input_ids"] for row in rows])[:6] + extra
        return {"input_ids": ids[None], "labels": ids[None], "other": ids}

    model = new()
    data = model.prepare_tf_dataset(
        RAGGED, 2, False, collate_fn=joined, collate_fn_args={"extra": 3}, drop_remainder=True
    )
    assert [(list(x), y.tolist()) for x, y in data.as_numpy_iterator()] == [
        (["input_ids"], [[4, 5, 6, 7, 8, 4]]),
        (["input_ids"], [[4, 5, 6, 7, 8, 9]]),
    ]
    answers = [{"input_ids": [1, 2, 3], "start_positions": 0, "end_positions": 2}] * 3
    x, y = next(iter(new(tfm.TFGPT2ForQuestionAnswering).prepare_tf_dataset(answers, 3)))
    assert set(y) == {"start_positions", "end_positions"} and x["input_ids"].shape == (3, 3)
    assert set(next(iter(model.prepare_tf_dataset([{"input_ids": [1, 2]}], 1)))) == {"input_ids"}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (iter([]), "dataset: expected rows with a length, such as a datasets.Dataset or a list of dicts, found"),
        ({"input_ids": [[1, 2]]}, "dataset: expected rows with a length, .* found a dict"),
        (RAGGED, "dataset: expected rows of input_ids of one length, found several; give tokenizer="),
        ([{"text": "a"}], "dataset: expected columns such as input_ids, found text; rename them"),
    ],
)
def test_what_makes_no_batch_is_one_sentence(rows, sentence):
    with pytest.raises(InputError, match=sentence):
        new().prepare_tf_dataset(rows, 2, shuffle=False)
