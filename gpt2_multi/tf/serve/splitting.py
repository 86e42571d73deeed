"""GPT-2's words in TensorFlow: where each begins, from the classes of code points, without a regular expression.

The classes are those of `gpt2_multi.tokenizer.engine.words`, pinned to Unicode 16. N code points of all texts stand in
one row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from gpt2_multi.tokenizer.engine.words import code_point_classes

CLASSES = ("other", "letter", "number", "space")
SPACE = CLASSES.index("space")
APOSTROPHE = ord("'")


@lru_cache(maxsize=1)
def class_table() -> Any:
    """The class of every code point, as an index into CLASSES: (0x110000,) uint8"""
    table = np.zeros(0x110000, np.uint8)
    for number, name in enumerate(CLASSES):
        for low, high in code_point_classes()[name]:
            table[low : high + 1] = number
    return table


def word_starts(points: tf.Tensor, breaks: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Where words begin, (N,): points (N,) int32, breaks (N,) where a new text begins, table: `class_table`.

    White space goes with the word after it where it is one U+0020, and is otherwise one word but for its last.
    """
    kind = tf.cast(tf.gather(table, points), tf.int32)
    before, last = moved(kind, 1, -1), moved(points, 1, -1)
    is_space, was_space = kind == SPACE, before == SPACE
    is_followed = ~ahead(breaks, 1, True) & ~ahead(is_space, 1, True)  # by something else than white space
    starts = breaks | (is_space & (~was_space | is_followed))
    starts |= ~is_space & tf.where(was_space, last != ord(" "), before != kind)
    return contracted(points, breaks, starts)


def contracted(points: tf.Tensor, breaks: tf.Tensor, starts: tf.Tensor) -> tf.Tensor:
    """The starts of words where 's, 't, 'd, 'm, 'll, 've and 're are words, if a word begins with the apostrophe."""
    one_more = ~ahead(breaks, 1, True)
    first = tf.where(one_more, ahead(points, 1, 0), 0)
    second = tf.where(one_more & ~ahead(breaks, 2, True), ahead(points, 2, 0), 0)
    quote = starts & (points == APOSTROPHE)
    short = quote & among(first, "stdm")
    long = quote & tf.reduce_any([among(first, a) & among(second, b) for a, b in ("ll", "ve", "re")], 0)
    starts &= ~moved(short | long, 1, False)
    return starts | moved(short, 2, False) | moved(long, 3, False)


def among(points: tf.Tensor, letters: str) -> tf.Tensor:
    """Where code points (N,) are one of these letters."""
    return tf.reduce_any(points[:, None] == tf.constant([ord(letter) for letter in letters]), -1)


def moved(row: tf.Tensor, by: int, fill: Any) -> tf.Tensor:
    """What stands `by` places before, (N,)"""
    return tf.concat([tf.fill([by], tf.constant(fill, row.dtype)), row], 0)[: tf.shape(row)[0]]


def ahead(row: tf.Tensor, by: int, fill: Any) -> tf.Tensor:
    """What stands `by` places after, (N,)"""
    return tf.concat([row, tf.fill([by], tf.constant(fill, row.dtype))], 0)[by:]
