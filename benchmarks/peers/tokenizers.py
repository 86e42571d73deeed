"""TensorFlow's layer that tokenizes, and the tokenizers beside it. Each keeps to one core, and takes its own time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Texts = Sequence[str]


class Peer:
    """What all have in common. `encode` turns texts into rows of ids, both of the tokenizer's own types."""

    encode: Callable[[Any], Any]

    def given(self, texts: Texts) -> Any:
        """Texts as the tokenizer takes them."""
        return texts

    def seconds(self, texts: Texts) -> float:
        """How long it takes to encode texts."""
        given = self.given(texts)
        start = time.perf_counter()
        self.encode(given)
        return time.perf_counter() - start

    def ids(self, texts: Texts) -> list[int]:
        """The ids of texts, with a -1 after each."""
        rows = self.encode(self.given(texts))
        return [at for row in getattr(rows, "to_list", lambda: rows)() for at in (*row, -1)]


class Graph(Peer):
    """A layer of TensorFlow, from a tensor to a ragged one."""

    def __init__(self, folder: Path, _: frozenset[str]) -> None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.tf, self.folder = tf, folder
        self.layer = self.imported()

    def imported(self) -> Any:
        """The class of the layer."""
        raise NotImplementedError

    def made(self) -> Callable[[Any], Any]:
        """A new layer, as a compiled function."""
        raise NotImplementedError

    def first(self, texts: Texts) -> None:
        """Make the layer, anew where there is one, and encode texts, for which it is traced."""
        self.encode = self.made()
        self.encode(self.given(texts))

    def given(self, texts: Texts) -> Any:
        return self.tf.constant(texts)


class Ours(Graph):
    """This library's layer, which compiles itself."""

    package = "gpt2_multi"

    def imported(self) -> Any:
        from gpt2_multi.tf import TFGPT2Tokenizer

        return TFGPT2Tokenizer

    def made(self) -> Callable[[Any], Any]:
        layer = self.layer.from_pretrained(self.folder, padding=None)
        return lambda texts: layer(texts)["input_ids"]


class KerasHub(Graph):
    """KerasHub's layer, which remembers the words that it has seen."""

    package = "keras-hub"

    def imported(self) -> Any:
        from keras_hub.tokenizers import GPT2Tokenizer

        return GPT2Tokenizer

    def made(self) -> Any:
        layer = self.layer(str(self.folder / "vocab.json"), str(self.folder / "merges.txt"))
        return self.tf.function(layer, input_signature=[self.tf.TensorSpec([None], self.tf.string)])


class Python(Peer):
    """This library's tokenizer in Python."""

    package = "gpt2_multi"

    def __init__(self, folder: Path, _: frozenset[str]) -> None:
        from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

        self.prepare(GPT2Tokenizer.from_pretrained(folder))

    def prepare(self, ours: Any) -> None:
        """Make `encode`, by this library's tokenizer or with its vocabulary."""
        self.encode = lambda texts: [ours.encode(text, truncation=False) for text in texts]


class Tiktoken(Python):
    """tiktoken, whose calls for many texts would take eight threads."""

    package = "tiktoken"

    def prepare(self, ours: Any) -> None:
        from benchmarks.tokenizing.tokenizer import tiktoken_encoding

        peer = tiktoken_encoding(ours)
        self.encode = one_or_many(peer.encode_ordinary, partial(peer.encode_ordinary_batch, num_threads=1))


class Tokenizers(Python):
    """tokenizers, up to lists of ids."""

    package = "tokenizers"

    def prepare(self, ours: Any) -> None:
        from benchmarks.tokenizing.tokenizer import tokenizers_tokenizer

        peer = tokenizers_tokenizer(ours)
        encode = one_or_many(peer.encode, peer.encode_batch)
        self.encode = lambda texts: [row.ids for row in encode(texts)]


def one_or_many(one: Callable[[str], Any], many: Callable[[Texts], Any]) -> Callable[[Texts], Any]:
    """The call of a tokenizer for one text, or that for many, which may be in another thread."""
    return lambda texts: many(texts) if len(texts) > 1 else [one(texts[0])]
