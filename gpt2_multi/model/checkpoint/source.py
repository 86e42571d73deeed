"""What a folder or a file is: which format, what names, what model; nothing is looked at but names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Array, Shape, reading
from gpt2_multi.files.folders import PathLike
from gpt2_multi.files.hub import WEIGHTS, matches, varied
from gpt2_multi.model.checkpoint.names import Names, named
from gpt2_multi.model.checkpoint.sizes import guess, said, sized
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import ARCHITECTURES, Format
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.spelling import Spelling
from gpt2_multi.model.weights import HEADS, Weight, head_rows, table

_LN_F = next(row for row in table(GPT2Config()) if row.path == "ln_f")


class Source(NamedTuple):
    """A checkpoint that was found: where, in which format, its main file, and its tensors by the names of the table."""

    path: Path
    format: str
    main: Path
    names: Names

    @property
    def kind(self) -> Format:
        """Its row in the table of formats."""
        return FORMATS[self.format]

    @property
    def where(self) -> str:
        """What an error calls it; raises CheckpointError where none of its tensors is one of a GPT-2."""
        names = self.names
        if names.prefix is None and (found := [*names.originals.values(), *names.dropped]):
            some = ", ".join(shortened(name) for name in found[:3])
            raise CheckpointError(
                f"{self.path}: none of its {len(found)} tensors is named as one of a GPT-2, such as "
                f"{self.kind.spelling.spell(_LN_F)}, whatever stands before it; found {some}"
            )
        return f"{self.path} (names after {names.prefix!r})" if names.prefix else str(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """What safetensors say beside their tensors; other files say nothing."""
        is_there = self.main.exists() and self.kind.own == WEIGHTS["safetensors"]
        return containers.read_metadata(self.main) if is_there else {}

    def config(self, given: Mapping[str, Any]) -> tuple[GPT2Config, str]:
        """The configuration that the files have, or else that of their shapes; and what was guessed, in a sentence.

        `given` are settings that somebody knows better: the number of heads, which is in no shape.
        """
        if (config := self.kind.config(self.main)) is not None:
            return config, ""
        where, tensors, unsaid = self.where, self.names.tensors, GPT2Config()
        program = {name: values[0] for name, values in self.kind.fixed.items() if getattr(unsaid, name) not in values}
        with reading(self.main, "checkpoint of a GPT-2"):
            known = {**program, **self.kind.known(self.main, tensors)}
            if (heads := said(given, "n_head")) is not None:
                known["n_head"] = heads
            config = sized(tensors, self.kind.spelling, where, known)
        return config, "" if "n_head" in known else guess(str(self.main), config)


def find(path: PathLike, kinds: Iterable[str] = (), variant: str | None = None, **which: Any) -> Source:
    """Find out what a folder or a file is: one of `kinds`, or of all; `which` tensors are meant says `names.named`."""
    format, main = recognised(Path(path), kinds, variant)
    kind = FORMATS[format]
    return Source(Path(path), format, main, named(kind.read(main), kind.spelling, str(path), **which))


def recognised(path: Path, kinds: Iterable[str] = (), variant: str | None = None) -> tuple[str, Path]:
    """The format of a folder or of a file, and its main file: the first of `kinds`, or of all, that is there.

    Raises CheckpointError for a folder that has none, or several under names with numbers or of the caller's choice.
    """
    there, kinds = _files(path), list(kinds or FORMATS)
    for format in kinds:
        patterns = [varied(name, variant) for name in FORMATS[format].main]
        for file in there:
            if matches(file.name, patterns) and FORMATS[format].is_it(file):
                numbered = [other for other in there if matches(other.name, [name for name in patterns if "*" in name])]
                _only(path, list(dict.fromkeys([file, *numbered])))
                return format, file
    if any(file.name == "adapter_config.json" for file in there):
        raise CheckpointError(
            f"{path}: expected the weights of a GPT-2, found an adapter of PEFT; load the model that it was made for, "
            "and call PeftModel.from_pretrained(model, folder)"
        )
    if found := None if variant else _otherwise_named(path, there, kinds):
        return found
    names = ", ".join(file.name for file in there[:8]) or "nothing"
    wanted = ", ".join(dict.fromkeys(varied(FORMATS[format].main[0], variant) for format in kinds))
    raise CheckpointError(f"{path}: expected the weights of a GPT-2, such as {wanted}; found no weights, but {names}")


def _otherwise_named(path: Path, there: list[Path], kinds: list[str]) -> tuple[str, Path] | None:
    """The format of the one file that has a name which such files often have; the most particular one, the last."""
    files = [file for file in there if any(matches(file.name, FORMATS[format].others) for format in kinds)]
    _only(path, files)
    for format in reversed(kinds) if files else ():
        if matches(files[0].name, FORMATS[format].others) and FORMATS[format].is_it(files[0]):
            return format, files[0]
    return None


def _only(path: Path, files: list[Path]) -> None:
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointError(f"{path}: expected one file of weights, found {names}; give the one that is meant")


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
