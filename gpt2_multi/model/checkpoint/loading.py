"""What `from_pretrained` of the three frameworks loads: a folder, a file or a state dict, as the caller wants it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt2_multi.errors import InputError
from gpt2_multi.files import arguments
from gpt2_multi.files.arrays import Array
from gpt2_multi.files.folders import PathLike
from gpt2_multi.files.hub import SETTINGS, WEIGHTS, resolve
from gpt2_multi.model.checkpoint.checkpoint import Checkpoint, Own
from gpt2_multi.model.checkpoint.names import named
from gpt2_multi.model.checkpoint.programs import Packed, Programs, Said, agreed, program_of, unpacked
from gpt2_multi.model.checkpoint.quantized import Quantized, check_method, in_int8, quantize, with_method
from gpt2_multi.model.checkpoint.source import Source, find
from gpt2_multi.model.config import SETTINGS as KEYS
from gpt2_multi.model.config import TOKENS, GPT2Config, as_config
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.spelling import MASK_BUFFERS, TRANSFORMERS, out_first
from gpt2_multi.model.weights import table


class Loaded(NamedTuple):
    """What a model is made of: its folder, its configuration, and its tensors by the table's names, in its layout.

    `chosen` are the settings that the caller wants otherwise than the files, his generation_config among them, `info`
    what was not as a model needs it, and `beside` the tensors of a caller's class that the table does not have. Of a
    quantized model, `quantized` has the tensors in int8 that `arrays` lacks. `said` is what another program is to make
    of the weights, or has made; of the latter `packed` has the parts, by the names of the rows, which `arrays` lacks.
    """

    folder: Path | None
    config: GPT2Config
    arrays: dict[str, Array]
    chosen: dict[str, Any]
    info: dict[str, list[Any]]
    beside: dict[str, Array]
    quantized: dict[str, Quantized]
    said: Said | None = None
    packed: Mapping[str, Mapping[str, Array]] = MappingProxyType({})


def load(
    name_or_path: PathLike,
    head: str,
    config: Any,
    given: Mapping[str, Any],
    *,
    quantization: str | None = None,
    programs: Programs | None = None,
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
) -> Loaded:
    """Find a model's folder, and read what is in it in whichever format, for a model with this head.

    `config` stands in the place of that of the files. `given` are arguments of `files.arguments` and settings of the
    configuration that are changed. `own` says what the model has besides the table. With `quantization`, and where the
    files are quantized, `quantized` has rows in int8. `programs` is of a framework for which other programs quantize,
    with what is said to them. Warns of what is initialised anew:
    a task head that the files lack as a whole, what they lack besides the table, and tensors of other shapes. Raises
    CheckpointError or ConfigError for whatever does not fit, InputError for an argument that cannot be honoured, and
    TypeError for one that does not exist.
    """
    place, names, given = _sorted(given)
    kinds, variant = arguments.wanted_kinds(given, FORMATS), place.get("variant")
    path = _file(name_or_path) or resolve(name_or_path, **place, kinds=[kind for kind in kinds if kind in WEIGHTS])
    source = find(path, kinds, variant, **names)
    folder = source.main.parent
    is_said = config is not None and not (folder / SETTINGS[0]).exists()
    stored, guessed = (GPT2Config(), "") if is_said else source.config(given)
    config = _wanted(stored, config, given, name_or_path, quantization)
    how: dict[str, Any] = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "own": own}
    source, config, by = _programs(source, config, head, programs, quantization)
    return _loaded(folder, Checkpoint(source, config, head, given, guessed, **how), stored, given, *by)


def _file(name_or_path: PathLike) -> Path | None:
    """A file of weights, or what the files of a TensorFlow checkpoint begin with, where one is given for a folder."""
    path = Path(name_or_path)
    try:
        return path if path.is_file() or Path(f"{path}.index").is_file() else None
    except (OSError, ValueError):  # longer than a path may be, or with a zero byte in it
        return None


def load_state(
    tensors: Mapping[str, Array],
    name_or_path: PathLike | None,
    head: str,
    config: Any,
    given: Mapping[str, Any],
    *,
    quantization: str | None = None,
    programs: Programs | None = None,
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
) -> Loaded:
    """The same of a state dictionary of PyTorch, ours or transformers', in the place of a folder's weights.

    With a `config` there need be no folder.
    """
    place, names, given = _sorted(given)
    if config is None and name_or_path is None:
        raise InputError("config: a state_dict does not say what model it is of; give config=, or the model's folder")
    folder = None if name_or_path is None else resolve(name_or_path, **place, allow_patterns=SETTINGS)
    stored = GPT2Config()
    if folder is not None and (config is None or (folder / SETTINGS[0]).exists()):
        stored = GPT2Config.from_json_file(folder / SETTINGS[0])
    config = _wanted(stored, config, given, name_or_path or "", quantization)
    shapes, where = {name: x.shape for name, x in tensors.items()}, Path("state_dict")
    format = "torch-safetensors" if out_first(shapes) else "safetensors"
    source = Source(where, format, where, named(tensors, FORMATS[format].spelling, str(where), **names))
    how: dict[str, Any] = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "own": own}
    source, config, by = _programs(source, config, head, programs, quantization)
    return _loaded(folder, Checkpoint(source, config, head, given, **how), stored, given, *by)


def _sorted(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Where the files are; which names in them count; and which files are read, and settings of the configuration."""
    place, given = arguments.sort(given)
    names = {name: given[name] for name in arguments.NAMES if given.get(name) is not None}
    given = {name: value for name, value in given.items() if name not in arguments.NAMES}
    for name in given:
        if name not in (*KEYS, *arguments.KIND, "generation_config"):
            raise arguments.unknown("from_pretrained", name, KEYS)
    return place, names, given


def _wanted(
    stored: GPT2Config, config: Any, given: Mapping[str, Any], name_or_path: PathLike, quantization: str | None
) -> GPT2Config:
    """The configuration of the model that is wanted."""
    check_method(quantization)
    changed = {name: value for name, value in given.items() if name != "generation_config"}
    found = (stored if config is None else as_config(config)).replace(**changed)
    found = found if quantization is None else with_method(found, quantization)
    found.name_or_path = os.fspath(name_or_path)
    return found


def _programs(
    source: Source, config: GPT2Config, head: str, programs: Programs | None, quantization: str | None
) -> tuple[Source, GPT2Config, tuple[Said | None, Packed]]:
    """What is read as if no other program had quantized it; and what one is to make of the weights, or has made."""
    if programs is None:
        return source, config, (None, {})
    if programs.wanted is not None and quantization is not None:
        raise InputError("quantization: is this library's own, and quantization_config another program's; give one")
    stored = program_of(config)
    config = config if stored is None else with_method(config, None)
    tensors, packed = unpacked(source, config, head)
    said = agreed(stored, programs.wanted, packed, str(source.path))
    names = source.names._replace(tensors=tensors, originals={name: name for name in tensors} | source.names.originals)
    return source._replace(names=names), config, (said, packed)


def _loaded(
    folder: Path | None, found: Checkpoint, stored: GPT2Config, given: Mapping[str, Any], said: Said | None,
    packed: Packed,
) -> Loaded:  # fmt: skip
    warn_of_fresh(found, stacklevel=5)
    chosen = _chosen(found.config, stored, given)
    whole = {name for name, row in found.weights.items() if in_int8(found.config, row)}
    by_other = {name: packed[place[0]] for name, place in found.places.items() if place[0] in packed}
    arrays = {name: found[name] for name in found if name not in whole and name not in by_other}
    quantized = {name: found.quantized(name) or quantize(found.weights[name], found[name]) for name in whole}
    return Loaded(folder, found.config, arrays, chosen, _info(found), found.beside, quantized, said, by_other)


def _chosen(config: GPT2Config, stored: GPT2Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a caller has changed: by their names, or special tokens in the configuration that he gave.

    Of the latter, what a configuration has where nobody says anything is no choice.
    """
    unsaid = GPT2Config()
    changed = {name: getattr(config, name) for name in TOKENS}
    changed = {
        name: token for name, token in changed.items() if token not in (getattr(stored, name), getattr(unsaid, name))
    }
    return {**changed, **given}


def _info(found: Checkpoint) -> dict[str, list[Any]]:
    """What `output_loading_info` gives, under the names of transformers."""
    left_out = {weight.name for weight in found.wrong.values()}
    missing = [row for row in table(found.config, found.head) if row.name not in found and row.name not in left_out]
    tied = {"lm_head.weight"} if found.config.tie_word_embeddings else set()
    known = {*tied, *found.wrong, *(name for name in found.unused if MASK_BUFFERS.fullmatch(name))}
    return {
        "missing_keys": [*(TRANSFORMERS.spell(row, found.head != "base") for row in missing), *found.lacking],
        "unexpected_keys": [found.original(name) for name in found.unused if name not in known] + found.names.dropped,
        "mismatched_keys": found.mismatched,
        "error_msgs": [],
    }


def warn_of_fresh(found: Checkpoint, stacklevel: int) -> None:
    """Say which tensors of a model the files lack, or have in another shape, and what nobody knows of it."""
    if found.guessed:
        warnings.warn(found.guessed, stacklevel=stacklevel)
    for name, shape, expected in found.mismatched:
        sentence = f"{found.path}: {name} has shape {shape}, not {expected}: initialised anew; train the model first"
        warnings.warn(sentence, stacklevel=stacklevel)
    known = {*found, *(weight.name for weight in found.wrong.values())}
    fresh = [weight.name for weight in table(found.config, found.head) if weight.name not in known]
    if fresh := fresh + found.lacking:
        names = " and ".join(fresh) if len(fresh) < 9 else f"{', '.join(fresh[:8])} and {len(fresh) - 8} more"
        sentence = f"{found.path} has no {names}: initialised anew; train the model before you use it"
        warnings.warn(sentence, stacklevel=stacklevel)


def two_dtypes(config: GPT2Config, dtype: Any, *stored: Any) -> tuple[Any, Any]:
    """What to compute and to store in, of what a call says: None where it says nothing, "auto" is what the file names.

    stored: what may say what to store in; the first that is given counts.
    """
    kept: Any = next((given for given in stored if given is not None), "auto" if _is_auto(dtype) else None)
    return None if _is_auto(dtype) else dtype, config.dtype if _is_auto(kept) else kept


def _is_auto(dtype: Any) -> bool:
    return isinstance(dtype, str) and dtype == "auto"
