"""A checkpoint in any format: `open` finds out which, and gives its tensors as the table has them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files import arguments, containers
from gpt2_multi.files.arrays import Array, Made, Shape, mapping, release, same
from gpt2_multi.files.containers.safetensors import fitting
from gpt2_multi.files.folders import PathLike, replaced
from gpt2_multi.files.hub import SETTINGS, WEIGHTS, matches, push, resolve, varied
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model.config import SETTINGS as KEYS
from gpt2_multi.model.config import TOKENS, GPT2Config, as_config
from gpt2_multi.model.formats.format import ARCHITECTURES, Format
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.spelling import (
    MASK_BUFFERS,
    TORCH,
    TRANSFORMERS,
    Spelling,
    match,
    misshapen,
    out_first,
    parts_of,
    refuse_unexpected,
    row_of,
    turned,
)
from gpt2_multi.model.weights import HEADS, Weight, head_rows, table

# What a caller's class has besides the table: shapes by name, with kernels as the table has them; and further names.
Own = Callable[[GPT2Config], tuple[Mapping[str, Shape], Mapping[str, str]]]


class Checkpoint(Mapping[str, Array]):
    """The tensors of a checkpoint: canonical name -> array in the table's layout, mapped from its file as a rule.

    `own` says what a model of a caller's class has besides the table; `beside` has what of it is there. `format` is a
    key of `formats.table`, `head` one of `weights.HEADS`, `found` every tensor as the file has it, and `places` the
    names there of each row of the table. A tensor of another shape than the configuration says is an error; with
    `ignore_mismatched_sizes` it is left out, and `wrong` has the row that it is by its name in the file.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        found: dict[str, Array],
        config: GPT2Config,
        head: str,
        ignore_mismatched_sizes: bool = False,
        own: Own | None = None,
    ) -> None:
        self.path, self.format, self.found, self.config, self.head = path, format, found, config, head
        shapes = {name: array.shape for name, array in found.items()}
        matched = match(shapes, config, head, self.spelling, str(path), own is not None)
        self.wrong = {name: weight for name, weight in matched.items() if shapes[name] != self.spelling.shape(weight)}
        if self.wrong and not ignore_mismatched_sizes:
            raise misshapen(shapes, self.wrong, self.spelling, str(path))
        none: tuple[dict[str, Shape], dict[str, str]] = {}, {}
        self.own, others = none if own is None else own(config)  # makes a model: of a configuration that fits only
        refuse_unexpected(found, {*matched, *self.own, *others}, config, self.spelling, str(path))
        self.own_places = {name: other for other, name in others.items() if other in found}
        self.own_places.update((name, name) for name in self.own if name in found)
        self.beside = {name: self._turned(name) for name in self.own if name in self.own_places}
        self._check_own(ignore_mismatched_sizes)
        left_out = {weight.name for weight in self.wrong.values()}
        self.weights: dict[str, Weight] = {}
        self.places: dict[str, list[str]] = {}
        for name, weight in matched.items():
            if weight.name not in left_out:
                self.weights[weight.name] = weight
                self.places.setdefault(weight.name, []).append(name)
        self._check_dtypes()
        self._check_tie()

    __eq__ = object.__eq__  # a Mapping would compare its arrays
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, head={self.head!r}, {len(self)} tensors)"

    @property
    def spelling(self) -> Spelling:
        """How the format spells and stores the table."""
        return FORMATS[self.format].spelling

    @property
    def dropped(self) -> list[str]:
        """What the file holds beside the model: masks of old versions, and a head that is tied."""
        used = {*self.own_places.values(), *(name for names in self.places.values() for name in names)}
        return [name for name in self.found if name not in used]

    @property
    def mismatched(self) -> list[tuple[str, Shape, Shape]]:
        """The name of each tensor that was left out for its shape, that shape, and the one that was expected."""
        rows = [(name, self.found[name].shape, self.spelling.shape(weight)) for name, weight in self.wrong.items()]
        return rows + [(name, self._turned(name).shape, self.own[name]) for name in self.own if self._is_wrong(name)]

    @property
    def lacking(self) -> list[str]:
        """What a model has besides the table, and the file has not."""
        return [name for name in self.own if name not in self.own_places]

    @property
    def bytes(self) -> int:
        """How much its tensors take up in their files."""
        return sum(self.found[name].nbytes for names in self.places.values() for name in names)

    def release(self) -> None:
        """Give the memory of what was read back to the system; only where nobody has written to an array."""
        for array in {id(mapping(array)): array for array in self.found.values()}.values():
            release(array)

    def __getitem__(self, name: str) -> Array:
        return row_of(self.spelling, self.weights[name], [self.found[place] for place in self.places[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def _turned(self, name: str) -> Array:
        """A tensor besides the table, with the kernels of another GPT-2 inside as the table has them."""
        array = self.found[self.own_places[name]]
        return cast(Array, turned(name, array)) if self.spelling is TORCH else array

    def _is_wrong(self, name: str) -> bool:
        return name in self.own_places and self._turned(name).shape != self.own[name]

    def _check_own(self, ignore_mismatched_sizes: bool) -> None:
        """What is there besides the table has to have the shape that the model says, or is left out."""
        for name in [name for name in self.own if self._is_wrong(name)]:
            found = self.beside.pop(name)
            if not ignore_mismatched_sizes:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {found.shape}, expected {self.own[name]} by the model's class; "
                    "make the layer as long, or give ignore_mismatched_sizes=True, which initialises it"
                )

    def _check_dtypes(self) -> None:
        """The parts of one tensor have to be of one type."""
        for name, places in self.places.items():
            if len({self.found[place].dtype for place in places}) > 1:
                raise CheckpointError(f"{self.path}: the parts of {name}, {', '.join(places)}, are of different types")

    def _check_tie(self) -> None:
        """A head that is stored although it is tied has to be the embedding."""
        spelling, config = self.spelling, self.config
        heads = ("lm", "double_heads", "base")
        if not config.tie_word_embeddings or self.head not in heads or "wte.weight" not in self.places:
            return
        (head,) = head_rows(config.replace(tie_word_embeddings=False), "lm")
        stored = self.found.get(spelling.spell(head))
        if stored is None or spelling.shape(head) != stored.shape:
            return
        tied, embedding = spelling.layout(head, stored), self["wte.weight"]
        if tied.dtype != embedding.dtype or not same(tied, embedding, spelling.spell(head)):
            raise CheckpointError(
                f"{self.path}: {spelling.spell(head)} differs from {self.places['wte.weight'][0]}, although "
                "tie_word_embeddings is true; set tie_word_embeddings to false in config.json to keep both"
            )


def open(
    path: PathLike,
    config: GPT2Config | None = None,
    head: str | None = None,
    *,
    kinds: Iterable[str] = (),
    variant: str | None = None,
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
) -> Checkpoint:
    """Open a folder, or the main file of a checkpoint, in any of the formats of `formats.table`, or of `kinds`.

    config and head, by default, are what the files say. Nothing but names and shapes is read before it is used, apart
    from checksums where a format has them. Raises CheckpointError or ConfigError for whatever is missing, damaged, or
    does not fit.
    """
    format, main = recognised(Path(path), kinds, variant)
    kind = FORMATS[format]
    found = kind.read(main)
    config = config or config_of(kind, main)
    head = head or head_of(kind, found, config)
    return Checkpoint(Path(path), format, found, config, head, ignore_mismatched_sizes, own)


class Loaded(NamedTuple):
    """What a model is made of: its folder, its configuration, and its tensors by the table's names, in its layout.

    `chosen` are the settings that the caller wants otherwise than the files, his generation_config among them, `info`
    what was not as a model needs it, and `beside` the tensors of a caller's class that the table does not have.
    """

    folder: Path | None
    config: GPT2Config
    arrays: dict[str, Array]
    chosen: dict[str, Any]
    info: dict[str, list[Any]]
    beside: dict[str, Array]


def load(
    name_or_path: PathLike,
    head: str,
    config: Any,
    given: Mapping[str, Any],
    *,
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
) -> Loaded:
    """Find a model's folder, and read what is in it in whichever format, for a model with this head.

    `config` stands in the place of that of the files. `given` are arguments of `files.arguments` and settings of the
    configuration that are changed. `own` says what the model has besides the table. Warns of what is initialised anew:
    a task head that the files lack as a whole, what they lack besides the table, and tensors of other shapes. Raises
    CheckpointError or ConfigError for whatever does not fit, InputError for an argument that cannot be honoured, and
    TypeError for one that does not exist.
    """
    place, given = _sorted(given)
    kinds, variant = arguments.wanted_kinds(given, FORMATS), place.get("variant")
    folder = resolve(name_or_path, **place, kinds=[kind for kind in kinds if kind in WEIGHTS])
    stored = _stored_config(folder, kinds, variant, config is not None)
    config = _wanted(stored, config, given, name_or_path)
    how: dict[str, Any] = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "own": own}
    found = open(folder, config, head, kinds=kinds, variant=variant, **how)
    return _loaded(folder, found, stored, given)


def load_state(
    tensors: Mapping[str, Array],
    name_or_path: PathLike | None,
    head: str,
    config: Any,
    given: Mapping[str, Any],
    *,
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
) -> Loaded:
    """The same of a state dictionary of PyTorch, ours or transformers', in the place of a folder's weights.

    With a `config` there need be no folder.
    """
    place, given = _sorted(given)
    if config is None and name_or_path is None:
        raise InputError("config: a state_dict does not say what model it is of; give config=, or the model's folder")
    folder = None if name_or_path is None else resolve(name_or_path, **place, allow_patterns=SETTINGS)
    stored = GPT2Config()
    if folder is not None and (config is None or (folder / SETTINGS[0]).exists()):
        stored = GPT2Config.from_json_file(folder / SETTINGS[0])
    config = _wanted(stored, config, given, name_or_path or "")
    format = "torch-safetensors" if out_first({name: x.shape for name, x in tensors.items()}) else "safetensors"
    found = Checkpoint(Path("state_dict"), format, dict(tensors), config, head, ignore_mismatched_sizes, own)
    return _loaded(folder, found, stored, given)


def _sorted(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the files are; and which of them are read, and settings of the configuration."""
    place, given = arguments.sort(given)
    for name in given:
        if name not in (*KEYS, *arguments.KIND, "generation_config"):
            raise arguments.unknown("from_pretrained", name, KEYS)
    return place, given


def _wanted(stored: GPT2Config, config: Any, given: Mapping[str, Any], name_or_path: PathLike) -> GPT2Config:
    """The configuration of the model that is wanted."""
    changed = {name: value for name, value in given.items() if name != "generation_config"}
    found = (stored if config is None else as_config(config)).replace(**changed)
    found.name_or_path = os.fspath(name_or_path)
    return found


def _loaded(folder: Path | None, found: Checkpoint, stored: GPT2Config, given: Mapping[str, Any]) -> Loaded:
    warn_of_fresh(found, stacklevel=5)
    chosen = _chosen(found.config, stored, given)
    return Loaded(folder, found.config, dict(found), chosen, _info(found), found.beside)


def _stored_config(folder: Path, kinds: Iterable[str], variant: str | None, is_given: bool) -> GPT2Config:
    """The configuration that the files have, which need not be there where another is given."""
    format, main = recognised(folder, kinds, variant)
    if is_given and not main.with_name("config.json").exists():
        return GPT2Config()
    return config_of(FORMATS[format], main)


def config_of(kind: Format, main: Path) -> GPT2Config:
    """The configuration that the files have."""
    config = kind.config(main)
    if config is None:
        raise CheckpointError(
            f"{main}: has no config.json beside it; give config=model.config, or put it there by "
            "model.config.save_pretrained(folder)"
        )
    return config


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
    known = {*tied, *found.wrong, *(name for name in found.dropped if MASK_BUFFERS.fullmatch(name))}
    return {
        "missing_keys": [*(TRANSFORMERS.spell(row, found.head != "base") for row in missing), *found.lacking],
        "unexpected_keys": [name for name in found.dropped if name not in known],
        "mismatched_keys": found.mismatched,
        "error_msgs": [],
    }


def warn_of_fresh(found: Checkpoint, stacklevel: int) -> None:
    """Say which tensors of a model the files lack, or have in another shape."""
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


def read_config(path: PathLike, **overrides: Any) -> GPT2Config:
    """The configuration of a checkpoint in any format, with changes."""
    format, main = recognised(Path(path))
    config = config_of(FORMATS[format], main)
    return config.replace(**overrides) if overrides else config


def read_weights(path: PathLike, config: GPT2Config, head: str) -> dict[str, Array]:
    """The tensors of a checkpoint in any format for a model with this head, under the table's names and in its layout.

    A task head that the files lack as a whole is missing from the answer too.
    """
    return dict(open(path, config, head))


def recognised(path: Path, kinds: Iterable[str] = (), variant: str | None = None) -> tuple[str, Path]:
    """The format of a folder or of a file, and its main file: the first of `kinds`, or of all, that is there."""
    there, kinds = _files(path), list(kinds or FORMATS)
    for format in kinds:
        for file in there:
            patterns = [varied(name, variant) for name in FORMATS[format].main]
            if matches(file.name, patterns) and FORMATS[format].is_it(file):
                return format, file
    if any(file.name == "adapter_config.json" for file in there):
        raise CheckpointError(
            f"{path}: expected the weights of a GPT-2, found an adapter of PEFT; load the model that it was made for, "
            "and call PeftModel.from_pretrained(model, folder)"
        )
    if found := _otherwise_named(path, there, kinds):
        return found
    names = ", ".join(file.name for file in there[:8]) or "nothing"
    wanted = ", ".join(dict.fromkeys(varied(FORMATS[format].main[0], variant) for format in kinds))
    raise CheckpointError(f"{path}: expected the weights of a GPT-2, such as {wanted}; found no weights, but {names}")


def _otherwise_named(path: Path, there: list[Path], kinds: list[str]) -> tuple[str, Path] | None:
    """The format of the one file that has a name which such files often have; the most particular one, the last."""
    files = [file for file in there if any(matches(file.name, FORMATS[format].others) for format in kinds)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointError(f"{path}: expected one file of weights, found {names}; give the one that is meant")
    for format in reversed(kinds) if files else ():
        if matches(files[0].name, FORMATS[format].others) and FORMATS[format].is_it(files[0]):
            return format, files[0]
    return None


def _files(path: Path) -> list[Path]:
    """A file, or the files in a folder, that with the shortest name first."""
    try:
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file()]
        else:  # TensorFlow names a checkpoint by what its files begin with
            files = [next(file for file in (path, Path(f"{path}.index")) if file.is_file())]
    except (OSError, ValueError, StopIteration):  # longer than a path may be, with a zero byte in it, or nothing
        raise CheckpointError(f"{path}: no such file or folder; check the path") from None
    return sorted(files, key=lambda path: (len(path.name), path.name))


def head_of(format: Format, found: Mapping[str, Array], config: GPT2Config) -> str:
    """The head that a checkpoint has: the one whose tensors are there, or else what config.json names."""
    shapes: dict[str, Shape] = {name: array.shape for name, array in found.items()}
    heads = {architecture: head for head, architecture in ARCHITECTURES.items()}
    architecture = re.sub("^(TF|Flax)", "", (config.architectures or [""])[0])
    named = heads.get(architecture, "lm")
    fitting = [head for head in HEADS if (rows := _own(config, head)) and _are_there(format.spelling, rows, shapes)]
    return fitting[0] if fitting and named not in fitting else named


def _own(config: GPT2Config, head: str) -> list[Weight]:
    return [row for row in head_rows(config, head) if row.path != "lm_head"]


def _are_there(spelling: Spelling, rows: list[Weight], shapes: Mapping[str, Shape]) -> bool:
    return all(shapes.get(spelling.spell(row)) == spelling.shape(row) for row in rows)


Source = tuple[Weight, np.dtype[Any], Callable[[], Array]]


def upload(save_pretrained: Callable[..., Any], repo_id: str, options: Mapping[str, Any]) -> str:
    """Upload what a model's `save_pretrained` writes, by its options and those of `hub.push`: the commit's address."""
    how = {name: options[name] for name in ("max_shard_size", "safe_serialization", "variant") if name in options}
    wanted = {name: value for name, value in options.items() if name not in how}
    return push(partial(save_pretrained, **how), repo_id, **arguments.sort_saving("push_to_hub", wanted))


def save(
    folder: PathLike,
    config: GPT2Config,
    generation_config: Any,
    sources: Iterable[Source],
    head: str,
    max_shard_size: int | str,
    kind: str = "safetensors",
    variant: str | None = None,
    own: Mapping[str, Made] | None = None,
) -> None:
    """Write config.json, generation_config.json (where there is one) and the weights, or their shards and index.

    `own` are tensors that a caller's class has besides the table, by their names in the file. `kind` is a key of
    `formats.table`; a `variant` has another name and leaves the others. The model's files are replaced together,
    other files of the folder stay: see `files.folders.replaced`.
    """
    with replaced(folder, partial(is_model_file, kind=kind, variant=variant)) as stage:
        tensors = {**spelled(sources, head, FORMATS[kind].spelling), **(own or {})}
        FORMATS[kind].write(stage, tensors, config, max_shard_size)
        if generation_config is not None:
            generation_config.save_pretrained(stage)
        for path in list(stage.iterdir()) if variant else []:
            _vary(path, variant)


def _vary(path: Path, variant: str | None) -> None:
    """Give a file of weights, or an index of shards and what it names, the name of a variant."""
    if path.name.endswith(".index.json"):
        index = read_json(path)
        index["weight_map"] = {name: varied(file, variant) for name, file in index["weight_map"].items()}
        write_json(path, index)
    path.rename(path.with_name(varied(path.name, variant)))


def _in_layout(spelling: Spelling, weight: Weight, make: Callable[[], Array]) -> Array:
    (part,) = parts_of(spelling, weight, fitting(weight.name, make(), weight.shape))
    return part


def spelled(sources: Iterable[Source], head: str, spelling: Spelling) -> dict[str, Made]:
    """Rows of the table under the names and in the layout of a format."""
    return {
        spelling.spell(weight, head != "base"): (
            dtype,
            spelling.shape(weight),
            partial(_in_layout, spelling, weight, make),
        )
        for weight, dtype, make in sources
    }


def write_weights(
    folder: Path,
    sources: Iterable[Source],
    head: str,
    spelling: Spelling = TRANSFORMERS,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write rows of the table, each with its dtype and a function that makes its array in the table's layout."""
    tensors = spelled(sources, head, spelling)
    containers.write_shards(folder / WEIGHTS["safetensors"][0], tensors, containers.write_safetensors, max_shard_size)


def is_model_file(path: Path, kind: str = "safetensors", variant: str | None = None) -> bool:
    """Whether a file of a folder is one of those that save_pretrained writes, or would be read in their place."""
    weights = [varied(name, variant) for name in (*WEIGHTS["safetensors"], *WEIGHTS[kind])]
    return matches(path.name, (*SETTINGS, *weights)) and not path.is_dir()
