"""transformers' Trainer and accelerate train, save, resume and load our models as they do their own."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer, TrainingArguments

from gpt2_multi import CheckpointError, GPT2Config, GPT2Tokenizer, InputError
from gpt2_multi.pt import GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory", "ignore:.*`clean_up")
TEXTS = [
    "ROMEO: what light is it?",
    "JULIET: O",
    "the king of France is here and gone",
    "hello, my friend",
    "ay",
    "no more",
]
CONFIG = GPT2Config(
    vocab_size=1024, n_positions=32, n_embd=12, n_layer=2, n_head=3, num_labels=3, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make(cls=GPT2LMHeadModel, seed=0):
    torch.manual_seed(seed)
    return cls(CONFIG.replace())


def trainer(model, folder, tokenizer, collator=None, **arguments):
    """A Trainer of the texts, whose labels are their ids, or a class each."""
    classes = {} if isinstance(model, GPT2LMHeadModel) else {"label": 1}
    rows = [dict(tokenizer(text)) | {name: i % 3 for name in classes} for i, text in enumerate(TEXTS)]
    options = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, save_steps=2, eval_steps=2,
        eval_strategy="steps", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**options | arguments), train_dataset=rows, eval_dataset=rows[:3],
        processing_class=tokenizer, data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_a_language_model_is_trained_saved_resumed_and_the_best_loaded(tokenizer, tmp_path):
    first, model = make(), make()
    best = trainer(model, tmp_path, tokenizer, load_best_model_at_end=True)
    best.train()
    assert best.state.best_metric == min(log["eval_loss"] for log in best.state.log_history if "eval_loss" in log)
    assert not same(model, first) and same(model, make_from(best.state.best_model_checkpoint))

    resumed = make(seed=1)
    trainer(resumed, tmp_path, tokenizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed, make_from(tmp_path / "checkpoint-4"))
    predicted = best.predict(best.eval_dataset).predictions
    assert isinstance(predicted, np.ndarray) and predicted.shape[::2] == (3, 1024)

    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(CheckpointError, match=r"has no config\.json, and its n_embd 12 is no multiple of 64"):
        GPT2LMHeadModel.from_pretrained(checkpoint)
    assert same(resumed, GPT2LMHeadModel.from_pretrained(checkpoint, n_head=3))
    model.config.save_pretrained(checkpoint)
    assert same(resumed, GPT2LMHeadModel.from_pretrained(checkpoint))
    assert GPT2Tokenizer.from_pretrained(checkpoint)("ROMEO").input_ids == tokenizer("ROMEO").input_ids


def make_from(checkpoint):
    return GPT2LMHeadModel.from_pretrained(checkpoint, config=CONFIG)


def test_a_classifier_is_trained_and_evaluated_by_a_metric(tokenizer, tmp_path):
    model = make(GPT2ForSequenceClassification)
    run = trainer(model, tmp_path, tokenizer, DataCollatorWithPadding(tokenizer), max_steps=6, bf16=True)
    run.compute_metrics = lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}
    run.train()
    assert {"eval_loss", "eval_accuracy"} <= run.evaluate().keys()
    again = GPT2ForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6", config=model.config)
    assert same(model, again)


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2ForTokenClassification, GPT2ForSequenceClassification])
def test_the_losses_of_parts_add_up_to_the_mean_of_the_whole(cls):
    model, ids = make(cls).double().eval(), torch.arange(1, 19).view(3, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100) % (1024 if cls is GPT2LMHeadModel else 3)
    labels = labels[:, 0] if cls is GPT2ForSequenceClassification else labels.masked_fill(mask == 0, -100)
    whole = model(ids, attention_mask=mask, labels=labels).loss
    items = int((labels[..., 1:] if cls is GPT2LMHeadModel else labels).ne(-100).sum())
    parts = [
        model(ids[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss
        for i in range(3)
    ]
    assert abs(float(sum(part.detach() for part in parts)) - float(whole.detach())) < 1e-12


def test_accumulated_batches_are_one_batch_and_recomputed_activations_change_nothing(tokenizer, tmp_path):
    """Texts of unequal length: the mean of two means would be another number."""
    options = dict(max_steps=2, save_strategy="no", eval_strategy="no", optim="sgd", lr_scheduler_type="constant")
    trained = []
    for more in (
        dict(per_device_train_batch_size=4),
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        dict(per_device_train_batch_size=4, gradient_checkpointing=True),
        dict(
            per_device_train_batch_size=4, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"every_n_layers": 2, "offload": True, "use_reentrant": True},
        ),
    ):  # fmt: skip
        model = make().double()
        trainer(model, tmp_path, tokenizer, **options | more).train()
        trained.append(model)
    first = make().double()
    for model in trained:
        for (name, a), b, c in zip(model.named_parameters(), trained[0].parameters(), first.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7, rtol=0) and not torch.equal(a, c), name


def test_every_n_th_block_is_recomputed():
    model, calls = make().train(), []
    for i, block in enumerate(model.transformer.h):
        block.register_forward_pre_hook(lambda module, given, i=i: calls.append(i))
    for every, expected in ((1, [0, 1, 1, 0]), (2, [0, 1, 0])):
        calls.clear()
        model.activation_checkpointing_enable(every_n_layers=every)
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]), use_cache=False).loss.backward()
        assert calls == expected
    model.activation_checkpointing_disable()
    assert not model.transformer.gradient_checkpointing
    with pytest.raises(InputError, match="every_n_layers"):
        model.gradient_checkpointing_enable(every_n_layers=0)


def test_accelerate_saves_loads_and_dispatches(tokenizer, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = make()
    prepared, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_model(prepared, tmp_path / "model")
    accelerator.save_state(tmp_path / "state")
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    accelerator.load_state(tmp_path / "state")
    assert (
        same(model, before)
        and same(model, make_from(tmp_path / "model"))
        and same(model, make_from(tmp_path / "state"))
    )
    with accelerate.init_empty_weights():
        empty = GPT2LMHeadModel(CONFIG)
    empty.tie_weights()  # as accelerate's guide has it: each parameter was made anew
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model"), device_map={"": "cpu"}, no_split_module_classes=empty._no_split_modules
    )
    assert same(loaded, model) and loaded.lm_head.weight is loaded.transformer.wte.weight


def test_an_output_is_a_dict_that_follows_its_attributes():
    output = make()(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]), use_cache=False)
    assert isinstance(output, dict) and output.get("logits") is output.logits and output.get("attentions") is None
    assert list({**output}) == list(dict(output)) == ["loss", "logits"]
    output.logits = output["logits"].float() + 1
    assert dict(output)["logits"] is output[1] is output.logits
    again = type(output)({key: value for key, value in output.items()})  # as accelerate makes it anew
    assert again.logits is output.logits and again.loss is output.loss and copy.copy(output).keys() == output.keys()
    output["loss"] = None
    assert "loss" not in output and len(output) == 1
    with pytest.raises(TypeError, match="its fields stay"):
        output.pop("logits")
    with pytest.raises(KeyError, match="has no field 'score'"):
        output["score"] = 1


def test_files_of_state_dictionaries_are_known_by_their_kernels(tmp_path):
    """Of nn.Linear's layout or of transformers', with a lone head, and where no kernel tells."""
    from safetensors.torch import save_file

    for changes in ({}, {"add_cross_attention": True}, {"n_inner": 12}):
        config = CONFIG.replace(**changes)
        model = GPT2LMHeadModel(config)
        for i, state in enumerate((model.state_dict(), as_conv1d(model))):
            folder = tmp_path / f"{len(changes)}{i}{config.n_inner}"
            config.save_pretrained(folder)
            torch.save(state, folder / "pytorch_model.bin")
            assert same(model, GPT2LMHeadModel.from_pretrained(folder))
            lone = {"lm_head.weight" if name == "transformer.wte.weight" else name: x for name, x in state.items()}
            save_file({name: x.contiguous() for name, x in lone.items()}, folder / "model.safetensors")
            assert same(model, GPT2LMHeadModel.from_pretrained(folder))


def as_conv1d(model):
    return {name: x.T if x.dim() == 2 and ".h." in name else x for name, x in model.state_dict().items()}
