"""The plan of the house: how much stands on a level, who imports whom, and three packages that read side by side."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MOST = 9  # entries of a level
# Which no one has to look into; the last two say what a package of the project has in it.
MARKERS = {"__init__.py", "__main__.py", "py.typed", "conftest.py", "LICENSE", "MANIFEST.in", "setup.py"}
DATA = {"demo", "data", "unicode16.json"}
PACKAGES = ("pt", "tf", "flax")
SHARED = (
    "attention", "model", "heads", "loading", "training",
    "generation/generate", "generation/decoding", "generation/beams", "generation/lookup", "generation/rules",
    "generation/slots",
)  # fmt: skip
PLACES = {
    ("flax", "training"): "training/losses",  # JAX has no loop of its own, so that training is a room there
    ("pt", "attention"): "attention/attention",  # PyTorch has kernels for runs of tokens, so that attention is one
}
HEADS = (
    "GPT2LMHeadModel", "SequenceSummary", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
)  # fmt: skip
# What one or two of the packages have, and why: reason -> package -> file -> names.
EXCEPTIONS: dict[str, dict[str, dict[str, list[str]]]] = {
    "linen makes the constructors of its modules": {
        package: {
            "attention": [f"{name}.__init__" for name in ("BaseAttention", "Attention", "CrossAttention")],
            "model": ["MLP.__init__", "Block.__init__"],
            "heads": [f"{name}.__init__" for name in HEADS],
        }
        for package in ("pt", "tf")
    },
    "Flax keeps parameters and compiled functions beside the module, in a class that other packages need not": {
        "flax": {
            "loading": [
                f"GPT2PreTrainedModel.{name}"
                for name in (
                    "compiled",
                    "settings",
                    "__getstate__",
                    "init_weights",
                    "params",
                    "params",
                    "params_shape_tree",
                    "forward",
                    "fitting",
                    "_arrays",
                    "check",
                    "_check_cache",
                    "init_cache",
                    "_changed",
                )
            ]
            + ["length_of"],
            "heads": ["Headed", "Headed.body", "Headed.logits"],
            "model": ["GPT2Model.logits"],
            "generation/decoding": ["Weights"],
            "generation/lookup": [
                "Assistant",
                "Assistant.of",
                "Assistant.__eq__",
                "Assistant.__hash__",
                "Assisted.model",
            ],
        },
        **{
            package: {
                "model": ["GPT2Model.init_cache", "GPT2Model.attentions", "check_call", "as_cache", "_is_pair", "give"],
                "heads": [
                    "GPT2LMHeadModel.logits",
                    "GPT2LMHeadModel.init_cache",
                    "lm_logits",
                    "GPT2DoubleHeadsModel.init_cache",
                ],
                "loading": [
                    f"GPT2PreTrainedModel.{name}"
                    for name in (
                        "body",
                        "parameter",
                        "get_input_embeddings",
                        "set_input_embeddings",
                        "get_output_embeddings",
                        "set_output_embeddings",
                    )
                ]
                + ["_resized"],
                "attention": ["Attention.prune"],
            }
            for package in ("pt", "tf")
        },
    },
    "linen's layers may be one scanned layer, and what a caller wants to see leaves it as values": {
        "flax": {
            "model": ["Seen", "Blocks", "Blocks.forward", "rematerialised", "GPT2Model._layers"],
            "attention": ["KVCache.pairs", "KVCache.stacked", "as_cache", "_is_pair", "Layer"],
        },
        "pt": {"model": [*(f"GPT2Model.{name}" for name in ("_wanted", "_runner", "_answer")), "note"]},
        "tf": {"model": ["recomputed", "GPT2Model._places", "GPT2Model._wanted", "note", "longer"]},
    },
    "PyTorch's modules change in place: caches, dtypes, ties and memory": {
        "pt": {
            "attention": [
                "KVCache.__init__",
                "KVCache.fork",
                "KVCache.get_max_cache_shape",
                "KVCache.crop",
                "KVCache.batch_repeat_interleave",
                "KVCache.batch_select_indices",
                "KVCache.reorder_cache",
                "KVCache._each",
                "KVCache.returned",
                "_flatten",
                "_unflatten",
                *(
                    f"Borrowed{name}"
                    for name in ("", ".__init__", ".capacity", ".fork", ".extend", ".__iter__", ".copied", ".returned")
                ),
                "whole",
                "stored",
                "score_dtype",
                "is_autocast",
            ],
            "model": [
                "recast",
                "gathered",
                "recomputed",
                "old_calls",
                "check_places",
                "in_documents",
                "fact",
                "GPT2Model._kernel",
                "GPT2Model._look_once",
                "of_row",
                "GPT2Model.dtype",
                "GPT2Model.tables",
                "GPT2Model.checkpointing",
                "GPT2Model._cache",
            ],
            "heads": ["kept", "at"],
            "loading": [
                f"GPT2PreTrainedModel.{name}"
                for name in (
                    "base_model",
                    "get_decoder",
                    "dummy_inputs",
                    "get_memory_footprint",
                    "num_labels",
                    "add_model_tags",
                    "enable_input_require_grads",
                    "disable_input_require_grads",
                    "dtype",
                    "device",
                    "_inside",
                    "_apply",
                    "__init_subclass__",
                    "_compute_in",
                    "tie_weights",
                    "activation_checkpointing_enable",
                    "activation_checkpointing_disable",
                    "set_attn_implementation",
                )
            ],
            "training": ["parameter_groups", "train_step"],  # Keras and Optax have theirs
            "generation/decoding": [
                "Prompt.each",
                "State.is_late",
                "State.of",
                "takes",
                "adapted_room",
                "reader_of",
                "read_by_kernels",
                "keep_cache",
                "prepare_inputs_for_generation",
                "_update_model_kwargs_for_generation",
                "compute_transition_scores",
                "steers",
                "steered",
            ],
            "generation/lookup": ["AssistedState", "Assisted.start", "Assisted.read", "catch_up"],
        },
    },
    "PyTorch fills parameters, and writes them, in a room of their own: they may be cut, offloaded or quantized": {
        "tf": {"loading": ["GPT2PreTrainedModel._assign", "GPT2PreTrainedModel._source"]},
        "flax": {"loading": ["GPT2PreTrainedModel._assign"]},
    },
    "Keras makes, names, restores and compiles layers by calls of its own": {
        "tf": {
            "attention": ["KVCache.spread", "KVCache.length"],
            "model": ["Block.compute_output_shape"],
            "heads": ["SequenceSummary.compute_output_shape"],
            "loading": [
                f"GPT2PreTrainedModel.{name}"
                for name in (
                    "initialise",
                    "_give",
                    "forward",
                    "output_shape",
                    "owner",
                    "owners",
                    "get_config",
                    "forget_functions",
                )
            ]
            + ["check_layer"],
            "training": ["within", "weighted"],
            "generation/generate": ["output_of", "can_read", "within", "width_of"],
            "generation/decoding": ["Sampling.finish", "begins", "blank", "noted", "written"],
            "generation/beams": ["BeamSearch.finish", "power"],
        }
    },
    "compiled code has static shapes, branches that are functions, and no sort that is quick": {
        "tf": {
            "attention": ["write", "hiding", "for_scores"],
            "generation/decoding": [
                "each_allowed",
                "Prompt.bucketed",
                "Prompt.text",
                "Prompt.after",
                "text",
                "read",
                "begin",
                "put",
                "align",
            ],
            "generation/beams": ["moved_in_place"],
            "generation/rules": [
                *("some", "when", "likeliest", "ordered", "greatest", "at", "every", "few", "first_few", "four_rounds"),
            ],
        },
        "flax": {
            "attention": ["write", "hiding"],
            "generation/generate": ["output_of"],
            "generation/decoding": [
                "Prompt.after",
                "Prompt.bucketed",
                "text",
                "read",
                "begin",
                "put",
                "align",
            ],
            "generation/rules": [
                *("some", "when", "likeliest", "ordered", "greatest", "at", "every", "few", "first_few", "four_rounds"),
            ],
        },
        "pt": {
            "generation/rules": ["Kept.whole", "likeliest", "few_gumbel", "is_narrow", "shortlist", "as_numpy"],
            "generation/beams": ["greatest", "move"],
            "generation/decoding": ["State.made", "is_repeated"],
            "generation/generate": ["stride_of"],
        },
    },
    "a loss in chunks has a gradient of its own, which each framework writes in its way": {
        "pt": {
            "heads": ["answer", "is_chunked", "head_dtype"],
            "training": [
                *(f"HeadLoss{name}" for name in ("", ".forward", ".backward")),
                *("whole_loss", "chunk_rows", "later_logits", "is_same"),
            ],
        },
        "tf": {
            "heads": ["answer", "is_chunked", "is_plain", "head_of", "head_weight", "trained"],
            "training": ["total_loss", "once", "chunk_count"],
        },
        "flax": {
            "heads": ["Headed.answer", "Headed.is_chunked", "Headed.weight"],
            "training": ["total_loss", "_derived", "chunk_count"],
        },
    },
    "compiled rules know the ids that a row made by their places, and PyTorch's are given them alone": {
        package: {"generation/rules": ["is_made"]} for package in ("tf", "flax")
    },
    "rows that come and go are written in place in PyTorch, in arrays of fixed sizes in JAX, anew in TensorFlow": {
        "pt": {
            "generation/slots": [
                *(f"Reader{name}" for name in ("", ".of", ".read", ".next")),
                *("Group", "chosen_by", "worthwhile_threads", "shared"),
                *(
                    f"Slots.{name}"
                    for name in ("_begun", "_put", "_tensors", "_reserve", "_empty", "_shift", "_make_room")
                ),
                *(f"Slots.{name}" for name in ("_arrange", "_grouped", "_read", "_choose")),
            ],
        },
        "tf": {
            "generation/slots": [
                *("State", "Own", "Own.of", "Own.opened", "Functions", "Functions.of", "Slots.warm", "blank"),
                *("of_any_size", "prefill", "together", "arrange", "next_tokens", "scores", "in_numpy"),
            ],
        },
        "flax": {
            "generation/slots": [
                *("Made", "Texts", "State", "Functions", "Functions.of", "rooms", "device_of", "are_together"),
                *("prompt_of", "as_arrays", "blank", "prefill", "enter", "gather", "shift", "refit", "turned", "read"),
                *("next_tokens", "scores", "likeliest", "unpacked", "asked"),
                *(f"Slots.{name}" for name in ("warm", "_unused", "_unused_by", "_shape", "_placed", "_top", "_there")),
                *(f"Slots.{name}" for name in ("_have_rows", "_put", "_room", "_make_room", "_read", "_weights")),
                "Slots._arranged",
            ],
        },
    },
    'an embedding of PyTorch has first values of its own, which on the device "meta" cost an import': {
        "pt": {"layers": ["bare_embedding"]},
    },
    "PyTorch has no training loop of its own that could tell who trains a model in int8": {
        "pt": {"training": ["trained", "frozen", "Untrained", "Untrained.forward", "Untrained.backward"]},
    },
    "XLA writes in place what it need not reshape: in TensorFlow's loop a cache is flat": {
        "tf": {
            "attention": ["KVCache.flat", "KVCache.of_rows", "KVCache.is_flat", "flat", "of_rows", "with_cached"],
            "generation/decoding": ["decode_in_place", "with_caches"],
        },
    },
    "what no row of PyTorch asks for is not computed, so that one call's options stay Python's numbers": {
        "pt": {"generation/rules": ["agreed", "is_on", "greatest"]},
    },
    "frameworks lack different functions": {
        "tf": {
            "model": ["gelu", "tanh_gelu"],
            "generation/beams": ["BeamSearch.propose"],
            "generation/rules": ["tally"],
        },
        "flax": {"model": ["gelu"]},
        "pt": {"generation/beams": ["BeamSearch.propose"]},
    },
}


def entries(folder: Path) -> list[str]:
    """What stands in a folder, as far as it is in the repository."""
    hidden = re.compile(r"\.|__pycache__|.*\.egg-info|build$|dist$|runs$")
    return [path.name for path in folder.iterdir() if not hidden.match(path.name) and path.name not in MARKERS | DATA]


def levels() -> list[Path]:
    """Every folder of the code and of its tests, and the repository's own."""
    found = {path.parent for room in ("gpt2_multi", "conversion", "tests") for path in (ROOT / room).rglob("*.py")}
    return [ROOT, *sorted(found)]


@pytest.mark.parametrize("folder", levels(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_level_has_more_than_nine_entries(folder: Path) -> None:
    assert len(entries(folder)) <= MOST, sorted(entries(folder))


def modules() -> dict[str, Path]:
    """Every module by its name."""
    files = [path for room in ("gpt2_multi", "conversion") for path in (ROOT / room).rglob("*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, files, strict=True))


def imported(module: str, path: Path) -> Iterator[str]:
    """What a module imports, as it is written: for types only, or within a function, counts too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            yield from (name for alias in node.names for name in (f"{base}.{alias.name}", base))


def test_there_is_no_circle() -> None:
    """Takes away what imports nothing that is left, until nothing more can go: what remains imports in a circle."""
    left = {name: set(imported(name, path)) & modules().keys() - {name} for name, path in modules().items()}
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    for name, found in left.items():  # a name of a package stands for the module that it is, where there is one
        found -= {package for package in packages if any(other.startswith(f"{package}.") for other in found)}
        left[name] = found
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: found & left.keys() for name, found in left.items()}


def normal(name: str) -> str:
    """The name without what only says which framework it is for."""
    name = re.sub(r"^(TF|Flax|GPT2(?=Block$))", "", name)
    name = re.sub(r"Module$", "Model" if re.fullmatch(r"GPT2(LMHead|DoubleHeads)?Module", name) else "", name)
    return {"call": "forward", "__call__": "forward", "setup": "__init__"}.get(name, name)


def definitions(package: str, file: str) -> list[str]:
    """The functions, classes and methods of a file, in order."""
    path = ROOT / "gpt2_multi" / package / f"{PLACES.get((package, file), file)}.py"

    def within(body: list[ast.stmt], before: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield before + normal(node.name)
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{before}{normal(node.name)}.")

    return list(within(ast.parse(path.read_text("utf-8")).body, ""))


def exceptions(package: str, file: str) -> list[str]:
    """What a file of a package may have that its counterparts lack."""
    return [name for tables in EXCEPTIONS.values() for name in tables.get(package, {}).get(file, [])]


@pytest.mark.parametrize("file", SHARED)
def test_three_files_have_the_same_definitions_in_the_same_order(file: str) -> None:
    """But for the exceptions, each of which has to be one: what all have, and what none has, is no exception."""
    found = {package: definitions(package, file) for package in PACKAGES}
    for package, names in found.items():
        for name in exceptions(package, file):
            names.remove(name)
    assert found["pt"] == found["tf"] == found["flax"]
