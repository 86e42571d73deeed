"""A checkpoint in any format: `open` finds out which, and gives its tensors as the table has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.arrays import Array, Shape, mapping, release, same
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model.checkpoint.quantized import (
    SCALE,
    Quantized,
    apart,
    check_stored,
    dequantized,
    with_method,
)
from gpt2_multi.model.checkpoint.sizes import cut
from gpt2_multi.model.checkpoint.source import Source, find, head_of
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.spelling import TORCH, Spelling, match, misshapen, refuse_unexpected, row_of, turned
from gpt2_multi.model.weights import Weight, head_rows

# What a caller's class has besides the table: shapes by name, with kernels as the table has them; and further names.
Own = Callable[[GPT2Config], tuple[Mapping[str, Shape], Mapping[str, str]]]


class Checkpoint(Mapping[str, Array]):
    """The tensors of a checkpoint: canonical name -> array in the table's layout, mapped from its file as a rule.

    `own` says what a model of a caller's class has besides the table; `beside` has what of it is there. `format` is a
    key of `formats.table`, `head` one of `weights.HEADS`, `found` every tensor as the file has it, by the names of
    `names`, and `places` those of each row of the table. `given` are settings that the caller wants otherwise than the
    files: with fewer words or positions tables are cut, and `cut` says which. `guessed` is a sentence of what nobody
    knows. A tensor of another shape than the configuration says is an error; with `ignore_mismatched_sizes` it is left
    out, and `wrong` has the row that it is by its name. A row in int8 is given as the float32 that it stands for, and
    as it is by `quantized`; `scales` are by the names of the integers.
    """

    def __init__(
        self,
        source: Source,
        config: GPT2Config,
        head: str,
        given: Mapping[str, Any] | None = None,
        guessed: str = "",
        *,
        ignore_mismatched_sizes: bool = False,
        own: Own | None = None,
    ) -> None:
        self.path, self.format, self.config, self.head = source.path, source.format, config, head
        self.names, self.guessed = source.names, guessed
        where, may_be_fewer = source.where, ignore_mismatched_sizes
        tensors, self.scales = apart(self.names.tensors)
        self.found, self.cut = cut(tensors, self.spelling, where, config, given or {}, may_be_fewer)
        self.scales = {
            name: x[: None if name not in self.cut else len(self.found[name])] for name, x in self.scales.items()
        }
        shapes = {name: array.shape for name, array in self.found.items()}
        matched = match(shapes, config, head, self.spelling, where, own is not None)
        self.wrong = {name: weight for name, weight in matched.items() if shapes[name] != self.spelling.shape(weight)}
        if self.wrong and not ignore_mismatched_sizes:
            raise misshapen(shapes, self.wrong, self.spelling, where)
        none: tuple[dict[str, Shape], dict[str, str]] = {}, {}
        self.own, others = none if own is None else own(config)  # makes a model: of a configuration that fits only
        refuse_unexpected(self.found, {*matched, *self.own, *others}, config, self.spelling, where)
        self.own_places = {name: other for other, name in others.items() if other in self.found}
        self.own_places.update((name, name) for name in self.own if name in self.found)
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
        if config.quantization is None and any(self.quantized(name) for name in self):
            self.config = with_method(config, "int8")
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
    def unused(self) -> list[str]:
        """What it holds beside the model: masks of old versions, and a head that is tied."""
        used = {*self.own_places.values(), *(name for names in self.places.values() for name in names)}
        unused = [name for name in self.found if name not in used]
        return unused + [name + SCALE for name in unused if name in self.scales]

    @property
    def dropped(self) -> list[str]:
        """The same by the names in its file, and what was to be left out."""
        return [*map(self.original, self.unused), *self.names.dropped]

    def original(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self.names.originals[name]

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
        return self._row(self.weights[name], self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def quantized(self, name: str) -> Quantized | None:
        """A row as the file has it in int8; None where it is stored in floats."""
        place = self.places[name][0]
        return self._integers(self.weights[name], place) if place in self.scales else None

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """What a row is given in: float32 for one in int8."""
        place = self.places[name][0]
        return np.dtype(self.scales.get(place, self.found[place]).dtype)

    def _row(self, weight: Weight, places: list[str]) -> Array:
        if places[0] in self.scales:
            return dequantized(weight, self._integers(weight, places[0]))
        return row_of(self.spelling, weight, [self.found[place] for place in places])

    def _integers(self, weight: Weight, place: str) -> Quantized:
        return Quantized(row_of(self.spelling, weight, [self.found[place]]), self.scales[place])

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
            for place in places:
                scale = self.scales.get(place)
                check_stored(str(self.path), self.original(place), self.weights[name], self.found[place], scale)

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
        check_stored(str(self.path), spelling.spell(head), head, stored, self.scales.get(spelling.spell(head)))
        tied, embedding = self._row(head, [spelling.spell(head)]), self["wte.weight"]
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
    prefix: str | None = None,
    drop: str | Iterable[str] = (),
    ignore_mismatched_sizes: bool = False,
    own: Own | None = None,
    **settings: Any,
) -> Checkpoint:
    """Open a folder, or the main file of a checkpoint, in any of the formats of `formats.table`, or of `kinds`.

    config and head, by default, are what the files say, or the shapes of their tensors where there is no config.json.
    `settings` are changed: `n_head`, which no shape says; `vocab_size` and `n_positions`, whose tables are cut.
    `prefix` chooses one of several GPT-2s by what stands before its names, and `drop` are patterns of names to leave
    out. Nothing but names and shapes is read before it is used, apart from checksums where a format has them. Raises
    CheckpointError or ConfigError for whatever is missing, damaged, or does not fit.
    """
    source, guessed = find(path, kinds, variant, prefix=prefix, drop=drop), ""
    if config is None:
        config, guessed = source.config(settings)
    config = config.replace(**settings) if settings else config
    head = head or head_of(source.kind, source.names.tensors, config)
    how: dict[str, Any] = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "own": own}
    return Checkpoint(source, config, head, settings, guessed, **how)


def read_config(path: PathLike, **overrides: Any) -> GPT2Config:
    """The configuration of a checkpoint in any format, with changes."""
    config, _ = find(path).config(overrides)
    return config.replace(**overrides) if overrides else config


def read_weights(path: PathLike, config: GPT2Config, head: str) -> dict[str, Array]:
    """The tensors of a checkpoint in any format for a model with this head, under the table's names and in its layout.

    A task head that the files lack as a whole is missing from the answer too.
    """
    return dict(open(path, config, head))
