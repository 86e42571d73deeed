"""What from_pretrained and save_pretrained of transformers take besides ours: honoured, of no meaning here, or refused.

One table for models of every framework, configurations and tokenizers: a refusal says what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gpt2_multi.errors import InputError, described, nearest, shortened

PLACE = (  # where the files are: what `hub.resolve` takes
    "revision", "token", "use_auth_token", "cache_dir", "local_files_only", "force_download", "subfolder", "variant",
)  # fmt: skip
PUSH = (  # what `hub.push` takes
    "repo_id", "commit_message", "commit_description", "private", "token", "use_auth_token", "revision", "create_pr",
)  # fmt: skip
NAMES = ("prefix", "drop", "key_mapping")  # which tensors of a file are the model's
KIND = ("use_safetensors", "from_tf", "from_flax", "from_pt")  # which of the files are read
# Nothing that a caller could see depends on these: files are mapped, a broken download is gone on with, no code of
# theirs is run, nothing is initialised that the files have, and no message is printed.
MEANINGLESS = frozenset({
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "code_revision", "legacy_format",
    "low_cpu_mem_usage", "offload_buffers", "offload_folder", "offload_state_dict", "resume_download",
    "save_function", "save_peft_format", "trust_remote_code", "verbose", "version", "weights_only",
})  # fmt: skip
TOKENIZER_ONLY = frozenset({"config", "from_slow", "legacy", "tokenizer_type", "use_fast"})  # the ids are the same


class Refused(NamedTuple):
    """An argument with which something would change that cannot: the values that change nothing, and what to do."""

    idle: tuple[Any, ...]
    advice: str


_QUANTIZED = Refused(
    (None, False),
    "other programs quantize PyTorch's models alone, by quantization_config=BitsAndBytesConfig(load_in_4bit=True) or "
    'others; leave it out, and give that, param_dtype="bfloat16" for half the memory, or quantization="int8"',
)
_PARALLEL = Refused((None, False), "a model is cut by mesh and rules, in PyTorch and JAX; leave it out, and give these")
_EXPORTED = Refused(
    (None, False), "save_pretrained writes no SavedModel; call export_saved_model(folder, tokenizer=...)"
)
REFUSED: Mapping[str, Refused] = {
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _QUANTIZED),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _PARALLEL),
    **dict.fromkeys(("saved_model", "signatures"), _EXPORTED),
    "attn_implementation": Refused((None, "eager", "sdpa"), "there is one way to compute attention here; leave it out"),
    "device_map": Refused(
        (None, "auto"),
        'a model is made where its framework computes; load it within tf.device("cpu") or '
        'jax.default_device(jax.devices("cpu")[0])',
    ),
    "max_memory": Refused((None,), "PyTorch's models alone are split over devices; leave it out"),
    "state_dict": Refused((None,), "only PyTorch's models have state dicts; give the folder that holds the weights"),
    "adapter_kwargs": Refused((None, {}), "adapters are PEFT's: PeftModel.from_pretrained(model, folder)"),
    "adapter_name": Refused((None, "default"), "adapters are PEFT's: PeftModel.from_pretrained(model, folder)"),
    "filename_prefix": Refused((None, ""), "the files of a model have their names; give it a folder of its own"),
    "gguf_file": Refused((None,), "GGUF files are not read; give a folder that holds safetensors"),
    "mirror": Refused((None,), "set HF_ENDPOINT to the mirror's address"),
    "proxies": Refused((None, {}), "huggingface_hub reads HTTPS_PROXY; set it to the proxy's address"),
    "organization": Refused((None,), "the name of an organization stands in repo_id: owner/name"),
    "tags": Refused((None,), "no model card is written; give them in the README.md of the model"),
    "use_kernels": Refused((None, False), "there are no kernels of others here; leave it out"),
}
ARGUMENTS = frozenset({*PLACE, *NAMES, *KIND, *MEANINGLESS, *REFUSED, "config", "dtype", "param_dtype"}) | {
    "torch_dtype", "generation_config", "ignore_mismatched_sizes", "output_loading_info", "quantization",
    "pretrained_model_name_or_path",
}  # fmt: skip


def sort(given: Mapping[str, Any], meaningless: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the files are, as `hub.resolve` takes it; and what is left for the caller, which he may know.

    Arguments of no meaning are dropped, and `meaningless` ones of this call. Raises InputError for an argument that
    cannot be honoured.
    """
    place = _taken(given, PLACE)
    rest = {name: value for name, value in given.items() if name not in (*PLACE, *MEANINGLESS, *meaningless)}
    return place, {name: value for name, value in rest.items() if not refuse(name, value)}


def sort_saving(call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `hub.push` takes; TypeError for what no call of this kind takes, InputError for what cannot be honoured."""
    for name, value in given.items():
        if name not in (*PUSH, *MEANINGLESS, "use_temp_dir") and not refuse(name, value):
            raise TypeError(f"{call} has no argument {name!r}{nearest(name, [*PUSH, 'max_shard_size', 'push_to_hub'])}")
    return _taken(given, PUSH)


def _taken(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of these names that are there, the token under its new name."""
    found = {name: value for name, value in given.items() if name in names and value is not None}
    token = found.pop("use_auth_token", None)
    if token is not None and found.setdefault("token", token) != token:
        raise InputError("use_auth_token: is the old name of token, which is given too; give one of them")
    return found


def refuse(name: str, value: Any) -> bool:
    """Whether an argument is one that may only have a value that changes nothing; InputError for another value."""
    if name not in REFUSED:
        return False
    idle, advice = REFUSED[name]
    if not any(value is one or (type(value) is type(one) and value == one) for one in idle):
        found = shortened(repr(value)) if isinstance(value, (str, bool, int, float)) else described(value)
        raise InputError(f"{name}: expected {idle[0]!r}, found {found}; {advice}")
    return True


def unknown(call: str, name: str, known: Iterable[str]) -> TypeError:
    """The error of an argument that is none, with the name that looks like it."""
    return TypeError(f"{call} has no argument {name!r}{nearest(name, [*known, *ARGUMENTS])}")


def wanted_kinds(given: dict[str, Any], kinds: Iterable[str]) -> tuple[str, ...]:
    """Which formats to look for, of `kinds` in their order: takes the arguments out of `given` that decide it.

    `from_tf`, `from_flax` and `from_pt` put theirs first; `use_safetensors` wants them alone, or shuts them out.
    """
    found = list(kinds)
    for name, first in (("from_pt", "pytorch"), ("from_flax", "flax"), ("from_tf", "tf-h5")):
        if given.pop(name, None):
            found = [kind for kind in found if kind.startswith(first)] + found
    safe = given.pop("use_safetensors", None)
    return tuple(kind for kind in dict.fromkeys(found) if safe is None or ("safetensors" in kind) == bool(safe))
