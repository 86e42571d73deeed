"""The heads in PyTorch beyond parity: padding and pooling, losses, kinds of summary and of problems."""

import copy
import inspect
import pickle
import pprint

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._pytree import tree_leaves

from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.cases import PROBLEMS

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3)
RNG = np.random.default_rng(5)
IDS = RNG.integers(2, 31, (3, 9))
MASK = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
CLASSES = {
    "lm": pt.GPT2LMHeadModel,
    "double_heads": pt.GPT2DoubleHeadsModel,
    "sequence_classification": pt.GPT2ForSequenceClassification,
    "token_classification": pt.GPT2ForTokenClassification,
    "question_answering": pt.GPT2ForQuestionAnswering,
}


@pytest.fixture
def both(tmp_path):
    """A function that gives the output of a head in float64, and the oracle's."""

    def run(head, inputs, config=SMALL):
        arrays = fixtures.write_model(tmp_path / "m", config, head)
        model = CLASSES[head].from_pretrained(tmp_path / "m", param_dtype="float64")
        with torch.no_grad():
            found = model(**{key: torch.as_tensor(value) for key, value in inputs.items()})
        return found, reference.outputs(config, arrays, head, inputs)

    return run


def assert_same(found, expected, keys):
    for key in keys:
        np.testing.assert_allclose(found[key].numpy(), expected[key], rtol=0, atol=1e-9, err_msg=key)


def test_padding_counts_neither_as_label_nor_as_predictor(both):
    labels = IDS.copy()
    found, expected = both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    assert_same(found, expected, ["loss"])
    labels[MASK == 0] = -100
    labels[2, 3] = -100  # the first real token: what predicts it is padding
    assert float(both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": labels})[0].loss) == float(found.loss)


def test_the_loss_of_a_batch_is_that_of_its_rows_alone(both):
    rows = [IDS[0], IDS[1, :5], IDS[2, 3:]]
    losses = [float(both("lm", {"input_ids": r[None], "labels": r[None]})[0].loss) for r in rows]
    counts = [len(r) - 1 for r in rows]
    together = both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": IDS})[0].loss
    assert float(together) == pytest.approx(np.average(losses, weights=counts), abs=1e-9)


def test_no_counted_label_is_a_loss_of_zero(both):
    assert float(both("lm", {"input_ids": IDS, "labels": np.full_like(IDS, -100)})[0].loss) == 0


def test_token_labels_under_padding_do_not_count(both):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS % 3}
    assert_same(*both("token_classification", inputs), ["loss"])


@pytest.mark.parametrize("pad", [None, 0])
def test_sequences_are_pooled_at_the_last_token_that_the_mask_keeps(both, pad):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": np.array([0, 2, 1])}
    found, expected = both("sequence_classification", inputs, SMALL.replace(pad_token_id=pad))
    assert_same(found, expected, ["logits", "loss"])
    alone, _ = both("sequence_classification", {"input_ids": IDS[1:2, :5]})
    np.testing.assert_allclose(found.logits[1:2], alone.logits, rtol=0, atol=1e-9)


def test_without_a_mask_the_pad_token_finds_the_end(both):
    ids = IDS.copy()
    ids[1, 5:] = 0
    config = SMALL.replace(pad_token_id=0)
    found, expected = both("sequence_classification", {"input_ids": ids}, config)
    assert_same(found, expected, ["logits"])
    with pytest.raises(InputError, match=r"cannot tell where each of 3 rows ends: give attention_mask, or set"):
        both("sequence_classification", {"input_ids": ids})


@pytest.mark.parametrize(("problem", "number", "labels"), PROBLEMS)
def test_kinds_of_problems(both, problem, number, labels):
    config = SMALL.replace(problem_type=problem, num_labels=number)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert_same(*both("sequence_classification", inputs, config), ["logits", "loss"])


@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_kinds_of_summary(both, kind, padded):
    config = SMALL.replace(summary_type=kind, summary_activation="tanh")
    inputs = {"input_ids": IDS.reshape(1, 3, 9), "mc_labels": np.array([2]), "labels": IDS.reshape(1, 3, 9)}
    if padded:
        inputs["attention_mask"] = MASK.reshape(1, 3, 9)
    assert_same(*both("double_heads", inputs, config), ["logits", "mc_logits", "loss", "mc_loss"])


def test_summaries_without_a_projection(tmp_path):
    for change in ({"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        config = SMALL.replace(**change)
        fixtures.write_model(tmp_path / "m", config, "double_heads")
        model = pt.GPT2DoubleHeadsModel.from_pretrained(tmp_path / "m")
        assert model(torch.as_tensor(IDS[None])).mc_logits.shape == (1, 3, 12)


def test_summary_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = pt.GPT2DoubleHeadsModel(SMALL.replace(summary_first_dropout=0.5, **off))
    ids = torch.as_tensor(IDS[None])
    assert not torch.equal(model(ids).mc_logits, model(ids).mc_logits)
    assert torch.equal(model.eval()(ids).mc_logits, model(ids).mc_logits)


def test_answers_beyond_the_text_do_not_count(both):
    inputs = {"input_ids": IDS, "start_positions": np.array([1, 99, 3]), "end_positions": np.array([9, 2, -1])}
    assert_same(*both("question_answering", inputs), ["start_logits", "end_logits", "loss"])


def test_double_heads_ask_for_choices():
    model = pt.GPT2DoubleHeadsModel(SMALL)
    with pytest.raises(InputError, match=r"expected 3 dimensions \(batch, choices, length\), found shape \(3, 9\)"):
        model(torch.as_tensor(IDS))
    with pytest.raises(InputError, match=r"mc_token_ids: expected shape \(1, 3\)"):
        model(torch.as_tensor(IDS[None]), mc_token_ids=torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"mc_token_ids: the index 9 is outside the text \(0 to 8\)"):
        model(torch.as_tensor(IDS[None]), mc_token_ids=torch.tensor([[1, 2, 9]]))


@pytest.mark.parametrize(
    ("head", "inputs", "sentence"),
    [
        ("token_classification", {"labels": IDS[:, :4]}, r"labels: expected shape \(3, 9\)"),
        ("token_classification", {"labels": IDS + 5}, r"labels: \d+ is not a class \(0 to 2, or -100\)"),
        ("lm", {"labels": IDS + 31}, r"labels: \d+ is not a class \(0 to 30, or -100\)"),
        (
            "sequence_classification",
            {"labels": np.array([0, 1, 3]), "attention_mask": MASK},
            "labels: 3 is not a class",
        ),
        (
            "sequence_classification",
            {"labels": np.array([0, 1]), "attention_mask": MASK},
            r"labels: expected shape \(3,\)",
        ),
    ],
)
def test_bad_labels_are_one_sentence(both, head, inputs, sentence):
    with pytest.raises(InputError, match=sentence):
        both(head, {"input_ids": IDS} | inputs)


@pytest.mark.parametrize("stacked", [False, True])
def test_names_and_shapes_of_2019(stacked):
    model = pt.GPT2LMHeadModel(SMALL, param_dtype="float64").eval()
    ids, past, context = torch.as_tensor(IDS[:1]), None, torch.as_tensor(IDS[:1, :4])
    for at in range(4, 9):
        logits, past = model(context, past=past)
        assert torch.allclose(logits[..., -1, :], model(ids[:, :at]).logits[:, -1], atol=1e-12)
        past = [torch.stack(pair[:2]) for pair in past] if stacked else past
        context = ids[0, at : at + 1]  # one row, (1,)
    loss, logits, _ = model(ids[0], lm_labels=ids[0])
    assert logits.shape == (9, 31) and torch.allclose(loss, model(ids, labels=ids).loss, atol=1e-12)
    assert list(model(ids)) == ["logits", "past_key_values"]
    with pytest.raises(TypeError, match=r"forward\(\): lm_labels is labels under its old name; give one of the two"):
        model(ids, lm_labels=ids, labels=ids)
    assert "lm_labels" not in inspect.signature(model.forward).parameters  # or Trainer would wait for them


def chunked(monkeypatch, **settings):
    """A model whose loss has chunks of 7 rows, ids, and labels of which some do not count."""
    monkeypatch.setattr("gpt2_multi.pt.training.CHUNK", {"cpu": 7 * 31 * 8, "others": 1})
    torch.manual_seed(0)
    config = SMALL.replace(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings)
    model = pt.GPT2LMHeadModel(config, param_dtype="float64", attn_implementation="eager")
    labels = torch.as_tensor(IDS).clone()
    labels[1, 2:6] = -100
    return model, torch.as_tensor(IDS), labels


def derivatives(model, *args, twice=False, **given):
    """The loss, its gradients, times 3, and those of their squares."""
    loss, weights = model(*args, **given).loss, [x for x in model.parameters() if x.requires_grad]
    first = torch.autograd.grad(3 * loss, weights, create_graph=twice)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), weights) if twice else ()
    return [loss, *first, *second]


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_chunks_is_that_of_all_logits(tied, monkeypatch):
    model, ids, labels = chunked(monkeypatch, tie_word_embeddings=tied)
    for given in (
        {"labels": labels, "twice": True},
        {"labels": labels, "attention_mask": torch.as_tensor(MASK), "num_items_in_batch": 11},
        {"labels": torch.full_like(ids, -100)},
    ):
        for found, expected in zip(
            derivatives(model, ids, **given), derivatives(model, ids, **given, skip_logits=False), strict=True
        ):
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    model.lm_head.requires_grad_(False)
    assert len(derivatives(model, ids, labels=labels)) == len(derivatives(model, ids, labels=labels, skip_logits=False))
    empty = model(ids[:0], labels=labels[:0])
    assert empty.loss == 0 and empty.logits.shape == (0, 9, 31)


def test_logits_beside_a_loss_are_those_of_the_call(monkeypatch):
    model, ids, labels = chunked(monkeypatch)
    whole = model(ids, labels=labels, skip_logits=False)
    found = model(ids, labels=labels)
    assert "logits" in found and type(dict.get(found, "logits")).__name__ == "Later"
    assert found[0] == found["loss"] and type(dict.get(found, "logits")).__name__ == "Later"  # still
    assert torch.equal(found.logits, whole.logits) and found.logits is found["logits"] and found.logits.requires_grad
    assert list(dict(model(ids, labels=labels))) == list(dict(whole))
    assert torch.equal(model(ids, labels=labels, return_dict=False)[1], whole.logits)
    assert model(ids, labels=labels, skip_logits=True).logits is None
    with pytest.raises(InputError, match="skip_logits: expected labels"):
        model(ids, skip_logits=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # which raises no version
    model(ids, labels=labels).loss.backward()
    for change in (
        optimizer.step,
        lambda: model.lm_head.weight.data[30, 0].mul_(2),
        lambda: model.lm_head.weight.data.neg_(),
        lambda: model.lm_head.weight.data[:, 1:].copy_(model.lm_head.weight.data[:, 1:].flip(1)),
    ):
        late = model(ids, labels=labels)
        change()
        with pytest.raises(InputError, match="logits: expected the weights of the call, found that they have changed"):
            _ = late.logits


def test_who_looks_at_an_output_after_a_step_sees_no_logits_and_who_asks_for_them_is_told(monkeypatch):
    model, ids, labels = chunked(monkeypatch)
    late = model(ids, labels=labels)
    assert "logits=<not computed, until it is read>" in repr(late) and "logits" not in vars(late)
    with torch.no_grad():
        late = model(ids, labels=labels)
        model.lm_head.weight.mul_(2)
    for seen in (late, copy.copy(late), copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        assert "logits=<not computed, the weights have changed since>" in pprint.pformat(seen)
        assert not hasattr(seen, "logits") and getattr(seen, "logits", 0) == seen.get("logits", 0) == 0
        assert list(seen) == list(dict(seen)) == [name for name, _ in seen.items()] == ["loss", "past_key_values"]
        assert seen[0] == seen[:1][0] == late.loss and seen[2] is seen.past_key_values  # which keep their places
        for ask in (lambda x: x.logits, lambda x: x["logits"], lambda x: x[1], lambda x: x.to_tuple(), tree_leaves):
            with pytest.raises(InputError, match="logits: expected the weights of the call, found that they have chan"):
                ask(seen)
    late = model(ids, labels=labels)
    model.half()
    assert not hasattr(late, "logits")


def test_a_loss_in_chunks_has_many_gradients_at_once_and_logits_that_were_looked_at(monkeypatch):
    model, ids, labels = chunked(monkeypatch)
    found, weights = model(ids, labels=labels), list(model.parameters())
    with torch.inference_mode():
        found.logits.argmax(-1)
    torch.autograd.grad(found.loss + found.logits.mean(), weights)  # what was looked at is of the call
    once, *many = (
        torch.autograd.grad(model(ids, labels=labels).loss, weights, scale, is_grads_batched=scale is not None)
        for scale in (None, torch.tensor([1.0, 3.0]).double())
    )
    for gradient, of_each in zip(once, *many, strict=True):
        assert torch.allclose(torch.stack([gradient, 3 * gradient]), of_each)


def test_a_head_that_somebody_has_changed_gives_the_logits_of_its_loss(monkeypatch):
    model, ids, labels = chunked(monkeypatch)
    hook = model.lm_head.register_forward_hook(lambda module, given, output: output * 0)
    assert torch.allclose(model(ids, labels=labels).loss, torch.tensor(31.0).double().log())
    hook.remove()
    seen = []
    hook = model.lm_head.register_full_backward_hook(lambda *given: seen.append(1))
    model(ids, labels=labels, skip_logits=True).loss.backward()
    hook.remove()
    assert seen

    class Capped(pt.GPT2LMHeadModel):
        def logits(self, hidden):
            return super().logits(hidden) * 0

    capped = Capped(model.config, param_dtype="float64")
    assert torch.allclose(capped(ids, labels=labels).loss, torch.tensor(31.0).double().log())
    with torch.autocast("cpu", torch.bfloat16):
        model.float()
        found, whole = model(ids, labels=labels), model(ids, labels=labels, skip_logits=False)
    assert torch.equal(found.logits, whole.logits) and torch.allclose(found.loss, whole.loss, rtol=1e-5)
    by_row = torch.func.vmap(lambda ids, labels: model(ids[None], labels=labels[None], use_cache=False).loss)
    assert by_row(ids, labels).shape == (3,)
