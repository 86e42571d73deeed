"""PyTorch models to and from files: transformers and back, resizing, pruning, fresh heads, damage."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from gpt2_multi import pt
from gpt2_multi.errors import CheckpointError, ConfigError, InputError
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import read_config, read_weights
from gpt2_multi.model.config import GPT2Config
from tests.support import adapters, fixtures
from tests.support.cases import BROKEN
from tests.support.shared_data import shared

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, num_labels=3, pad_token_id=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
NOISE = {"float64": 1e-12, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}  # other layouts round otherwise
CLASSES = [*adapters.classes(pt).values()]


def outputs(model, ids=IDS):
    ids = ids[None] if "DoubleHeads" in type(model).__name__ else ids
    with torch.no_grad():
        out = model(ids)
    keys = ("last_hidden_state", "logits", "mc_logits", "start_logits", "end_logits")
    return [out[key] for key in keys if key in out]


def same(left, right, bound=0.0):
    pairs = list(zip(outputs(left), outputs(right), strict=True))
    return bool(pairs) and all((a - b).abs().max() <= bound for a, b in pairs)


def random_model(cls, config=SMALL, **options):
    """A model of this class with every parameter randomised."""
    model = cls(config.replace(), **options).eval()  # a copy: some tests change it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_is_saved_is_loaded_bit_for_bit(cls, dtype, tmp_path):
    model = random_model(cls, param_dtype=dtype)
    model.save_pretrained(tmp_path / "m")
    again = cls.from_pretrained(tmp_path / "m", param_dtype="auto")
    assert (
        same(model, again, NOISE[dtype])
        and again.config.architectures == [cls.__name__]
        and again.config.dtype == dtype
    )
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    again.save_pretrained(tmp_path / "m")  # over the file that its parameters are mapped from
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before and same(model, again, NOISE[dtype])


CHANGES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "cross-attention": {"add_cross_attention": True},
    "inner": {"n_inner": 20, "activation_function": "relu"},
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("change", CHANGES)
def test_transformers_reads_what_we_write_and_back(cls, change, tmp_path):
    import transformers

    theirs = getattr(transformers, cls.__name__)
    model = random_model(cls, SMALL.replace(**CHANGES[change]))
    model.save_pretrained(tmp_path / "ours", max_shard_size=5000 if change == "plain" else "5GB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own code
        other, report = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert same(model, other.eval(), 1e-4)
        other.save_pretrained(tmp_path / "theirs")
    again = cls.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["float16_safetensors", "bfloat16_safetensors", "sharded_safetensors"])
def test_half_precision_and_sharded_folders_load(name):
    folder = fixtures.shared("fixtures", "lm_formats", name)
    model = pt.GPT2LMHeadModel.from_pretrained(folder, param_dtype="auto")
    kind = name.split("_")[0]
    assert model.dtype == getattr(torch, kind, torch.float32)
    recorded = fixtures.reference("lm")
    found = model(torch.from_numpy(recorded["in.input_ids"].copy())).logits.detach().float().numpy()
    bound = {"float16": 1e-2, "bfloat16": 5e-2}.get(kind, 1e-5)
    assert np.abs(found - recorded["plain.logits"]).max() <= bound * np.abs(recorded["plain.logits"]).max()


def test_files_are_mapped_where_that_is_asked_for(tmp_path):
    random_model(pt.GPT2LMHeadModel).save_pretrained(tmp_path / "m")
    model = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", mmap=True)
    kernel = model.transformer.h[0].mlp.c_fc.weight
    assert kernel.T.is_contiguous() and not kernel.is_contiguous()
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with torch.no_grad():
        kernel.zero_()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_bare_checkpoint_loads_into_a_head_and_the_head_starts_anew(tmp_path):
    random_model(pt.GPT2Model).save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no score\.weight: initialised anew; train the model"):
        model = pt.GPT2ForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=5)
    assert model.score.weight.shape == (5, 12) and 0.005 < float(model.score.weight.detach().std()) < 0.05
    assert same(
        pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m").transformer, pt.GPT2Model.from_pretrained(tmp_path / "m")
    )


def test_a_language_model_loads_into_the_bare_model(tmp_path):
    model = random_model(pt.GPT2LMHeadModel, SMALL.replace(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "m")
    assert same(pt.GPT2Model.from_pretrained(tmp_path / "m"), model.transformer)


def test_generation_settings_and_the_tokenizer_stay_with_the_model(tmp_path):
    model = random_model(pt.GPT2LMHeadModel)
    model.generation_config = model.generation_config.with_options({"top_k": 7, "do_sample": True})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vocab.json").write_text("{}")
    model.save_pretrained(tmp_path / "m")
    again = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    assert again.generation_config == model.generation_config and (tmp_path / "m" / "vocab.json").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_new_embeddings_are_the_mean_of_the_old_ones(tied, tmp_path):
    model = random_model(pt.GPT2LMHeadModel, SMALL.replace(tie_word_embeddings=tied))
    before = model(IDS).logits.detach()
    mean = model.transformer.wte.weight.detach().mean(0)
    embedding = model.resize_token_embeddings(34)
    assert embedding is model.get_input_embeddings() and embedding.num_embeddings == model.config.vocab_size == 34
    assert torch.allclose(embedding.weight[31:], mean.expand(3, -1))
    assert (model.lm_head.weight is embedding.weight) == tied
    after = model(torch.cat([IDS, IDS], 1) * 0 + 33).logits
    assert after.shape[-1] == 34 and torch.allclose(model(IDS).logits[..., :31], before, atol=1e-5)
    assert torch.allclose(model(IDS).logits[..., 33], before.mean(-1), atol=1e-5)
    model.save_pretrained(tmp_path / "m")
    assert same(model, pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m"), 1e-5)
    model.resize_token_embeddings(31)
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_pruned_heads_are_as_if_masked_and_survive_a_file(tmp_path):
    model = random_model(pt.GPT2LMHeadModel, param_dtype="float64")
    mask = torch.ones(3, 3)
    mask[0, 1] = mask[2, 0] = mask[2, 2] = 0
    masked = model(IDS, head_mask=mask).logits.detach()
    model.prune_heads({0: [1], 2: [0]})
    model.prune_heads({2: [2, 0]})
    assert model.config.pruned_heads == {0: [1], 2: [0, 2]}
    assert (model(IDS).logits - masked).abs().max() < 1e-9
    assert model.generate(IDS, max_new_tokens=3, eos_token_id=None).shape == (2, 11)
    model.save_pretrained(tmp_path / "m")
    again = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", param_dtype="float64")
    assert same(model, again)
    arrays = read_weights(tmp_path / "m", again.config, "lm")
    expected = reference.outputs(again.config, arrays, "lm", {"input_ids": IDS.numpy()})["logits"]
    assert np.abs(again(IDS).logits.detach().numpy() - expected).max() < 1e-9
    assert (again(IDS, head_mask=torch.ones(3, 3)).logits - masked).abs().max() < 1e-9
    with pytest.raises(ConfigError, match="must leave each layer a head"):
        model.prune_heads({0: [0, 2]})
    assert model.config.pruned_heads == {0: [1], 2: [0, 2]}


def test_embeddings_can_be_got_and_set():
    model = random_model(pt.GPT2LMHeadModel)
    model.set_input_embeddings(torch.nn.Embedding(40, 12))
    assert model.config.vocab_size == 40 and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = torch.nn.Linear(12, 40, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head and pt.GPT2Model(SMALL).get_output_embeddings() is None


def test_linear_layers_take_lora_and_quantization(tmp_path):
    import peft

    model = random_model(pt.GPT2LMHeadModel)
    kinds = {type(module) for name, module in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))}
    assert kinds == {torch.nn.Linear}
    before = model(IDS).logits.detach()
    lora = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=2, init_lora_weights=False)
    )
    adapted = lora(input_ids=IDS).logits.detach()
    merged = lora.merge_and_unload()
    assert (adapted - before).abs().max() > 1e-3 and (merged(IDS).logits - adapted).abs().max() < 1e-4


def test_models_can_be_made_on_a_device_and_in_a_dtype():
    with torch.device("meta"):
        model = pt.GPT2LMHeadModel(GPT2Config.from_archive("gpt2-xl"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_557_611_200
    model = pt.GPT2LMHeadModel(SMALL, param_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.half().dtype == torch.float16


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name, tmp_path):
    folder = tmp_path / "m"
    random_model(pt.GPT2LMHeadModel).save_pretrained(folder)
    damage, error, sentence = BROKEN[name]
    damage(folder)
    with pytest.raises(error, match=sentence):
        pt.GPT2LMHeadModel.from_pretrained(folder)


def test_wrong_arguments_are_one_sentence(tmp_path):
    random_model(pt.GPT2LMHeadModel).save_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="'n_layers'; did you mean 'n_layer'"):
        pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", n_layers=2)
    with pytest.raises(InputError, match="param_dtype: expected float64, float32, float16 or bfloat16, found 'int4'"):
        pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", param_dtype="int4")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        pt.GPT2LMHeadModel.from_pretrained(tmp_path / "nothing")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found an adapter of PEFT; .*PeftModel.from_pretrained\(model, folder"):
        pt.GPT2LMHeadModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="max_shard_size"):
        random_model(pt.GPT2LMHeadModel).save_pretrained(tmp_path / "m", max_shard_size="big")


@pytest.mark.parametrize("path", ["model.ckpt", "."])
def test_openai_s_checkpoints_load_by_the_old_function(path):
    folder = shared("fixtures", "openai_tf1")
    config = read_config(folder)
    model = pt.GPT2LMHeadModel(config)
    given = (config, folder / path) if path == "." else (folder / path,)
    assert pt.load_tf_weights_in_gpt2(model, *given) is model
    same = pt.GPT2LMHeadModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="not a checkpoint of this configuration"):
        pt.load_tf_weights_in_gpt2(pt.GPT2LMHeadModel(config.replace(n_layer=4)), folder)


def test_to_load_and_to_generate_imports_no_compiler():
    code = (
        "import sys, torch; from gpt2_multi.pt import GPT2LMHeadModel as M; m = M.from_pretrained('demo'); "
        "m.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2); M(m.config); "
        "M.from_pretrained('demo', quantization='int8'); print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
