"""from_pretrained, called as people call it: an argument of transformers is honoured, idle or refused, in all three."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpt2_multi_conversion import convert

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.arguments import ARGUMENTS, KIND, MEANINGLESS, PLACE, REFUSED, sort
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.config import GPT2Config
from tests.support.fixtures import write_model

SMALL = GPT2Config(vocab_size=11, n_positions=16, n_embd=6, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2)
PREFIXES = {"pt": "", "tf": "TF", "flax": "Flax"}


class Package:
    """The classes of a backend, under the names that PyTorch's have."""

    def __init__(self, name: str) -> None:
        self.name, self.package = name, importlib.import_module(f"gpt2_multi.{name}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.package, f"{PREFIXES[self.name]}{name}")

    def ids(self, rows: list[list[int]]) -> Any:
        """Ids as this framework takes them."""
        if self.name == "pt":
            import torch

            return torch.tensor(rows)
        return np.array(rows)

    def stored(self, model: Any) -> set[str]:
        """The dtypes of the parameters."""
        if self.name == "pt":
            return {str(x.dtype).removeprefix("torch.") for x in model.parameters()}
        if self.name == "tf":
            return {str(x.dtype) for x in model.weights}
        import jax

        return {str(x.dtype) for x in jax.tree.leaves(model.params)}

    def embedding(self, model: Any) -> Any:
        """The rows of the token embedding, in NumPy."""
        if self.name == "flax":
            body = model.params.get("transformer", model.params)
            return np.asarray(body["wte"]["embedding"])
        weights = model.get_input_embeddings()
        return weights.weight.detach().numpy() if self.name == "pt" else weights.embeddings.numpy()


@pytest.fixture
def package(backend: Any) -> Package:
    return Package(backend.__name__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small language model, in float32."""
    write_model(tmp_path / "model", SMALL, "lm", dtype=np.float32)
    return tmp_path / "model"


def test_the_name_and_the_idle_arguments_are_given_by_keyword(package: Package, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "inner" / "model.safetensors").rename(tmp_path / "outer" / "inner" / "model.fp16.safetensors")
    model = package.GPT2LMHeadModel.from_pretrained(
        pretrained_model_name_or_path=tmp_path / "outer", subfolder="inner", variant="fp16", low_cpu_mem_usage=True,
        use_safetensors=True, trust_remote_code=True, _fast_init=False, force_download=False, proxies=None,
        use_auth_token=None, token=None, device_map="auto", quantization_config=None, load_in_8bit=False,
        attn_implementation="sdpa", resume_download=None, weights_only=True, revision="main",
    )  # fmt: skip
    assert np.array_equal(package.embedding(model), package.embedding(package.GPT2LMHeadModel.from_pretrained(folder)))
    with pytest.raises(CheckpointError, match=r"subfolder: expected a folder within .*, found '\.\./inner'"):
        package.GPT2LMHeadModel.from_pretrained(folder, subfolder="../inner")


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"attn_implementation", "device_map", "state_dict"}))
def test_what_cannot_be_honoured_says_what_to_do(name: str) -> None:
    idle, advice = REFUSED[name]
    assert sort({name: idle[0], "n_layer": 3}) == ({}, {"n_layer": 3})
    with pytest.raises(InputError, match=rf"^{name}: expected .*, found 'x'; \w") as caught:
        sort({name: "x"})
    assert str(caught.value).endswith(advice)


def test_the_page_for_those_who_come_from_transformers_has_every_refusal() -> None:
    page = (Path(__file__).parents[3] / "docs" / "migration.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, (_, advice) in REFUSED.items():
        assert any(f"`{name}" in row and advice in row for row in rows), name


def test_every_argument_has_one_place() -> None:
    known = [*PLACE, *KIND, *MEANINGLESS, *REFUSED]
    assert len(known) == len(set(known)) and set(known) <= ARGUMENTS


def test_a_misspelt_argument_is_an_error(package: Package, folder: Path) -> None:
    for name, meant in (("ignore_mismatch_sizes", "ignore_mismatched_sizes"), ("n_layers", "n_layer")):
        with pytest.raises(TypeError, match=f"from_pretrained has no argument '{name}'; did you mean '{meant}'"):
            package.GPT2LMHeadModel.from_pretrained(folder, **{name: True})


def test_a_quantized_or_a_split_model_is_refused(package: Package, folder: Path) -> None:
    for name, value in (("load_in_8bit", True), ("quantization_config", object()), ("tp_plan", "auto")):
        with pytest.raises(InputError, match=f"^{name}: expected (None|a BitsAndBytesConfig, .*), found "):
            package.GPT2LMHeadModel.from_pretrained(folder, **{name: value})


def test_attention_of_others_and_several_places_are_refused(package: Package, folder: Path) -> None:
    load = package.GPT2LMHeadModel.from_pretrained
    with pytest.raises(
        InputError, match=r"attn_implementation: expected .*, found 'flash_attention_2'; .*leave it out$"
    ):
        load(folder, attn_implementation="flash_attention_2")
    with pytest.raises(InputError, match="device_map: expected "):
        load(folder, device_map={"transformer": "disk", "lm_head": "nowhere"})
    if package.name == "pt":
        for place in ("cpu", {"": "cpu"}, "auto"):
            assert load(folder, device_map=place).device.type == package.package.loading.devices()[0].partition(":")[0]
        for place in ("gpu7", "cuda:99", 99, {"": "cuda:99"}):
            with pytest.raises(InputError, match=r'device_map: expected "auto" or one of .*"cpu", found '):
                load(folder, device_map=place)
        assert load(folder, device_map="meta").device.type == "meta"


def test_config_stands_in_the_place_of_the_files(package: Package, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    keys = {**SMALL.to_dict(), "attn_pdrop": 0.5}
    theirs = transformers.GPT2Config(**{name: value for name, value in keys.items() if name != "model_type"})
    GPT2Config(**keys).save_pretrained(tmp_path / "other")
    given = [GPT2Config(**keys), keys, theirs, tmp_path / "other", tmp_path / "other" / "config.json"]
    for config in given:
        model = package.GPT2LMHeadModel.from_pretrained(folder, config=config, resid_pdrop=0.25)
        assert type(model.config) is GPT2Config and model.config is not config
        assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.n_embd) == (0.5, 0.25, 6)
    assert given[0].resid_pdrop == 0.1
    model = package.GPT2LMHeadModel(theirs)
    assert type(model.config) is GPT2Config and model.config.attn_pdrop == 0.5
    with pytest.raises(ValueError, match="model_type must be 'gpt2'; found 'bert'"):
        package.GPT2LMHeadModel(transformers.BertConfig())
    with pytest.raises(InputError, match="config: expected a GPT2Config, found a dict"):
        package.GPT2LMHeadModel(keys)


def test_what_was_missing_unexpected_and_mismatched_is_told(package: Package, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"has no score\.weight: initialised anew"):
        _, info = package.GPT2ForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, pad_token_id=0
        )
    assert info == {"missing_keys": ["score.weight"], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    wider = {"vocab_size": 13, "tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes=True"):
        package.GPT2LMHeadModel.from_pretrained(folder, **wider)
    with pytest.warns(UserWarning, match=r"wte\.weight has shape \(11, 6\), not \(13, 6\): initialised anew"):
        model, info = package.GPT2LMHeadModel.from_pretrained(
            folder, ignore_mismatched_sizes=True, output_loading_info=True, **wider
        )
    assert info["mismatched_keys"] == [("transformer.wte.weight", (11, 6), (13, 6))] and not info["missing_keys"]
    assert package.embedding(model).shape == (13, 6) and 0 < package.embedding(model).std() < 0.05


def test_a_head_of_another_class_is_unexpected(package: Package, tmp_path: Path) -> None:
    write_model(tmp_path / "m", SMALL, "token_classification")
    _, info = package.GPT2Model.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["classifier.bias", "classifier.weight"]


def test_the_kind_of_file_is_chosen(package: Package, folder: Path, tmp_path: Path) -> None:
    """A folder with safetensors, and other weights in the other formats."""
    arrays = write_model(tmp_path / "other", SMALL, "lm", dtype=np.float32, seed=1)
    for format in ("tf-h5", "flax-msgpack", "pytorch"):
        convert(tmp_path / "other", tmp_path / format, to=format)
        for path in (tmp_path / format).glob("*_model.*"):
            shutil.copy(path, folder)
    cls = package.GPT2LMHeadModel
    mine = package.embedding(cls.from_pretrained(folder))
    assert not np.array_equal(mine, arrays["wte.weight"])
    for options in ({"from_tf": True}, {"from_flax": True}, {"from_pt": True}, {"use_safetensors": False}):
        assert np.array_equal(package.embedding(cls.from_pretrained(folder, **options)), arrays["wte.weight"]), options
    with pytest.raises(CheckpointError, match=r"expected the weights of a GPT-2, such as model\.safetensors; found no"):
        cls.from_pretrained(tmp_path / "tf-h5", use_safetensors=True)


def test_dtypes_are_called_by_every_name(package: Package, folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    cls = package.GPT2LMHeadModel
    for options in ({"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"param_dtype": "bfloat16"}):
        assert package.stored(cls.from_pretrained(folder, **options)) == {"bfloat16"}
    write_model(tmp_path / "half", SMALL.replace(dtype="float16"), "lm", dtype=np.float16)
    for options in ({"torch_dtype": "auto"}, {"dtype": "auto"}):
        model = cls.from_pretrained(tmp_path / "half", **options)
        assert package.stored(model) == {"float16"}
    assert package.stored(cls.from_pretrained(tmp_path / "half")) == {"float32"}
    stored = package.stored(cls.from_pretrained(folder, dtype="bfloat16"))
    assert stored == {"bfloat16" if package.name == "pt" else "float32"}  # as each is in transformers


def test_a_generation_config_stands_in_the_place_of_the_files(package: Package, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "max_new_tokens": 6}')
    load = package.GPT2LMHeadModel.from_pretrained
    for given in (GenerationConfig(max_new_tokens=4), transformers.GenerationConfig(max_new_tokens=4)):
        model = load(folder, generation_config=given)
        options = model.generation_config
        assert options is not given and (options.eos_token_id, options.max_new_tokens) == (None, 4)
        assert model.config.eos_token_id == 2 and model.generate(package.ids([[1]])).shape == (1, 5)
    assert load(folder, generation_config=None).generation_config.max_new_tokens == 6
    with pytest.raises(InputError, match="generation_config: expected a GenerationConfig, found"):
        load(folder, generation_config="greedy")


def test_an_override_reaches_generate(package: Package, folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "pad_token_id": 4, "max_new_tokens": 6}')
    load = package.GPT2LMHeadModel.from_pretrained
    assert load(folder).generation_config.eos_token_ids == (3,)
    model = load(folder, eos_token_id=7, bos_token_id=5)
    options = model.generation_config
    assert (options.eos_token_id, options.bos_token_id, options.pad_token_id) == (7, 5, 4)
    assert load(folder, config=SMALL.replace(eos_token_id=[8, 9])).generation_config.eos_token_ids == (8, 9)
    assert load(folder, config=SMALL).generation_config.eos_token_ids == (3,)
    assert load(folder, eos_token_id=None).generation_config.eos_token_ids == ()
    seen = load(folder, output_hidden_states=True)
    assert seen.config.output_hidden_states and not seen.generation_config.output_hidden_states
    with pytest.raises(AttributeError, match="did you mean 'max_new_tokens'"):
        seen.generation_config.max_new_token = 3
    free = np.asarray(load(folder, eos_token_id=None).generate(package.ids([[1]])))
    end = int(free[0, 1])
    cut = np.asarray(load(folder, eos_token_id=end).generate(package.ids([[1]])))
    assert (free.shape, cut.tolist()) == ((1, 7), [[1, end]])


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"variant": "fp16", "max_shard_size": "1KB"}])
def test_what_is_saved_is_what_is_loaded(
    package: Package, folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = package.GPT2LMHeadModel.from_pretrained(folder)
    model.save_pretrained(save_directory=folder, is_main_process=False)
    model.save_pretrained(save_directory=folder, save_function=None, push_to_hub=False, token=None, **options)
    weights = sorted(path.name for path in folder.iterdir() if not path.suffix == ".json")
    kind = {"pt": "pytorch_model.bin", "tf": "tf_model.h5", "flax": "flax_model.msgpack"}[package.name]
    if "variant" in options:
        assert weights[0] == "model.fp16-00001-of-00007.safetensors" and weights[-1] == "model.safetensors"
        assert (folder / "model.safetensors.index.fp16.json").exists()
        (folder / "model.safetensors").unlink()
    else:
        assert weights == [kind if options else "model.safetensors"]
    again = package.GPT2LMHeadModel.from_pretrained(folder, variant=options.get("variant"))
    assert np.array_equal(package.embedding(again), package.embedding(model))
    with pytest.raises(
        TypeError, match="save_pretrained has no argument 'max_shards_size'; did you mean 'max_shard_size'"
    ):
        model.save_pretrained(folder, max_shards_size="1KB")
    with pytest.raises(InputError, match=r"saved_model: expected None, found True; .*call export_saved_model"):
        model.save_pretrained(folder, saved_model=True)


def test_what_is_pushed_is_what_is_saved(package: Package, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that remembers: the folder that is uploaded has what `save_pretrained` writes, and nothing else."""
    import huggingface_hub

    calls: list[Any] = []

    class Hub:
        def __init__(self, token: Any) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
            files = sorted(path.name for path in Path(folder_path).iterdir())
            calls.append((repo_id, files, options["commit_message"]))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = package.GPT2LMHeadModel.from_pretrained(folder)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert model.push_to_hub("mine", private=True, use_auth_token="abc", commit_message="One") == "https://hub/commit"
    assert calls == ["abc", ("mine", {"private": True, "exist_ok": True}), ("me/mine", files, "One")]
    del calls[:]
    model.save_pretrained(folder, push_to_hub=True)
    assert [call[0] for call in calls[1:]] == ["model", "me/model"] and calls[2][1] == files
    del calls[:]
    model.config.push_to_hub("mine", revision=None)
    model.generation_config.save_pretrained(folder, push_to_hub=True, repo_id="mine")
    assert [call[1] for call in calls[2::3]] == [["config.json"], ["generation_config.json"]]
    with pytest.raises(InputError, match=r"tags: expected None, found .*; no model card is written"):
        model.push_to_hub("mine", tags=["a"])


def test_a_vocabulary_is_resized_to_a_multiple(package: Package, folder: Path) -> None:
    model = package.GPT2LMHeadModel.from_pretrained(folder)
    before = package.embedding(model)
    model.resize_token_embeddings(pad_to_multiple_of=8)
    after = package.embedding(model)
    assert model.config.vocab_size == 16 == len(after) and np.array_equal(after[:11], before)
    assert np.allclose(after[11:], before.mean(0), atol=1e-6)
    model.resize_token_embeddings(17, pad_to_multiple_of=32, mean_resizing=False)
    new = package.embedding(model)[16:]
    assert len(new) == 16 and len(np.unique(new)) > 90 and 0.015 < new.std() < 0.025
    with pytest.raises(InputError, match="pad_to_multiple_of: expected a whole number from 1, found 0"):
        model.resize_token_embeddings(8, pad_to_multiple_of=0)


def test_a_state_dictionary_stands_in_the_place_of_weights(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    package = Package("pt")
    cls, other = package.GPT2LMHeadModel, write_model(tmp_path / "other", SMALL, "lm", seed=1)["wte.weight"]
    own = cls.from_pretrained(tmp_path / "other").state_dict()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "other").state_dict()
    ids = package.ids([[1, 2, 3]])
    expected = cls.from_pretrained(tmp_path / "other")(ids).logits.detach().numpy()
    for state in (own, theirs):
        for name, options in (
            (folder, {}),
            (None, {"config": SMALL}),
            (str(folder), {"config": SMALL, "use_cache": False}),
        ):
            model = cls.from_pretrained(name, state_dict=state, **options)
            assert np.allclose(package.embedding(model), other) and np.allclose(
                model(ids).logits.detach(), expected, atol=1e-5
            )
    del own["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError, match=r"state_dict lacks the tensor transformer\.ln_f\.bias"):
        cls.from_pretrained(folder, state_dict=own)
    with pytest.raises(InputError, match="config: a state_dict does not say what model it is of"):
        cls.from_pretrained(None, state_dict=theirs)
    with pytest.raises(InputError, match="state_dict: expected None, found an OrderedDict; only PyTorch's models"):
        sort({"state_dict": theirs})
