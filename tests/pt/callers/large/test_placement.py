"""`device_map` of several places: a model computes what it does in one, and what it cannot do there is one sentence."""

import gc
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from gpt2_multi import GPT2Tokenizer, pipeline, pt
from gpt2_multi.errors import InputError
from gpt2_multi.pt.parameters.quantization import OLDEST

ROOT = Path(__file__).resolve().parents[4]
IDS = torch.arange(12).view(2, 6)
STEPS = {"max_new_tokens": 8, "do_sample": False}
MAPS = {
    "fitting": {"device_map": "auto", "max_memory": {"cpu": "5MB"}},
    "sequential": {"device_map": "sequential", "max_memory": {"cpu": "5MB"}},
    "disk": {"device_map": {"": "disk"}},
    "layers": {"device_map": {"": "cpu", "transformer.h.1": "disk", "transformer.wpe": "disk"}},
    "body": {"device_map": {"transformer": "disk", "lm_head": "cpu"}},
}


@pytest.fixture(scope="module")
def whole():
    return pt.GPT2LMHeadModel.from_pretrained("demo")


@pytest.mark.parametrize("name", MAPS)
def test_a_model_in_several_places_is_the_one_that_it_was(name, whole, tmp_path):
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    model = pt.GPT2LMHeadModel.from_pretrained("demo", offload_folder=tmp_path, **MAPS[name])
    assert any(x.is_meta for x in model.parameters()) and model.device == torch.device("cpu")
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, atol=1e-4, rtol=0)
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(IDS, **STEPS, **more), whole.generate(IDS, **STEPS, **more))
    text = model.generate("ROMEO:", tokenizer=tokenizer, **STEPS)
    assert "ROMEO:" + "".join(model.stream("ROMEO:", tokenizer=tokenizer, **STEPS)) == text
    assert model.score(text, tokenizer=tokenizer).perplexity == pytest.approx(
        whole.score(text, tokenizer=tokenizer).perplexity, rel=1e-5
    )
    model.save_pretrained(tmp_path / "saved")
    again = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_what_an_offloaded_model_cannot_do_is_a_sentence(tmp_path):
    model = pt.GPT2LMHeadModel.from_pretrained("demo", offload_folder=tmp_path, device_map={"": "disk"}).train()
    with pytest.raises(InputError, match=r"device_map: .* an offloaded one, whose weights are frozen; load it in one"):
        model(IDS, labels=IDS).loss.backward()
    for change in (lambda: model.resize_token_embeddings(2000), lambda: model.prune_heads({0: [0]})):
        with pytest.raises(InputError, match=r"an offloaded model cannot be (resized|pruned); load it without"):
            change()
    for change in (model.half, model.cpu):  # after which hooks may give a layer another's weights
        with pytest.raises(InputError, match=r"an offloaded model cannot be cast or moved; load it without"):
            change()


def test_a_pipeline_leaves_the_places_to_from_pretrained(tmp_path):
    expected = pipeline(framework="pt")("ROMEO:", max_new_tokens=4)
    loading = {"offload_folder": tmp_path, "torch_dtype": torch.float32}
    for given in (
        {"device_map": MAPS["layers"]["device_map"], "model_kwargs": loading},
        {"device_map": "auto", "model_kwargs": loading | {"max_memory": {"cpu": "5MB"}}},
        {"model_kwargs": loading | MAPS["fitting"]},
    ):
        made = pipeline(framework="pt", **given)
        assert (
            set(made.model.hf_device_map.values()) == {"cpu", "disk"} and made("ROMEO:", max_new_tokens=4) == expected
        )
    with pytest.raises(InputError, match="device: expected none beside a device_map of several places, found -1"):
        pipeline(framework="pt", device=-1, **given)
    with pytest.raises(InputError, match="model_kwargs: is 'auto', and device_map is 'cpu'; give one"):
        pipeline(framework="pt", device_map="cpu", **given)


def test_the_folder_of_a_model_is_its_own_and_goes_with_it(tmp_path):
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "new"}
    first, second = (pt.GPT2LMHeadModel.from_pretrained("demo", **options) for _ in range(2))
    assert len(list((tmp_path / "new").iterdir())) == 2
    del first, second
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


FAULTS = {
    "one": ({"device_map": {"transfromer": "cpu"}}, "device_map: GPT2LMHeadModel has no transfromer; its parts are"),
    "some": ({"device_map": {"lm_head": "cpu", "transformer.h": "cpu"}}, "gives no place to transformer.wte.weight"),
    "part": ({"device_map": {"": "cpu", "head": "disk"}}, "device_map: GPT2LMHeadModel has no head; its parts are"),
    "place": ({"device_map": {"": "cpu", "lm_head": "cuda:99"}}, 'device_map: expected "auto" or one of'),
    "rest": ({"device_map": {"lm_head": "cpu", "transformer.h": "disk"}}, "gives no place to transformer.wte.weight"),
    "folder": ({"device_map": {"": "disk"}}, "offload_folder: expected a folder on a disk"),
    "room": ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory: expected room by device"),
    "gpu": ({"device_map": "auto", "max_memory": {99: "1GB"}}, "max_memory: expected one of"),
    "file": ({"device_map": {"": "disk"}, "offload_folder": __file__}, "offload_folder: expected a folder to write to"),
    "list": ({"device_map": ["cpu"]}, 'device_map: expected "auto" or one of'),
    "alone": ({"max_memory": {"cpu": "1GB"}}, 'max_memory: expected device_map="auto"'),
    "dtype": (
        {"device_map": {"": "disk"}, "dtype": "bfloat16", "param_dtype": "float32", "offload_folder": "here"},
        "dtype: expected what the parameters of an offloaded model are stored in",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_map_that_does_not_fit_is_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, sentence = FAULTS[name]
    with pytest.raises(InputError) as caught:
        pt.GPT2LMHeadModel.from_pretrained("demo", **given)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("accelerate", {"device_map": {"": "cpu", "lm_head": "disk"}}),
        ("bitsandbytes", {"quantization_config": {"load_in_8bit": True}}),
        ("torchao", {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}),
    ],
)
def test_a_program_that_is_not_installed_is_a_sentence(name, given, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf'needs {name}: pip install "gpt2-multi\[large\]"'):
        pt.GPT2LMHeadModel.from_pretrained("demo", **given)


def test_a_program_that_is_too_old_is_a_sentence(monkeypatch):
    """Its oldest version is that of pyproject.toml, which the sentence has pip read."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__="0.48.0+cpu"))
    with pytest.raises(InputError, match=r"needs bitsandbytes 0\.48\.1 or newer, found 0\.48\.0\+cpu: pip install -U"):
        pt.GPT2LMHeadModel.from_pretrained("demo", quantization_config={"load_in_8bit": True})
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert extras["large"] == ["accelerate>=1.2", *(f"{name}>={version}" for name, version in OLDEST.items())]
