"""Byte-level BPE in TensorFlow: the merges of many words at once, on flat arrays.

N symbols of all words stand in one row; those of a word are beside each other. A symbol is a byte or what a merge made.
"""

from __future__ import annotations

import tensorflow as tf

from gpt2_multi.tf.serve.splitting import ahead, moved
from gpt2_multi.tokenizer.engine.bpe import NO_MERGE, SHIFT, MergeTable


class Merges(tf.Module):
    """The merges of a tokenizer, as tables that a SavedModel takes along."""

    def __init__(self, table: MergeTable) -> None:
        super().__init__()
        pairs, made, settled = table.pairs or [-1], table.made or [0], table.settled or [True]  # none may be empty
        keys, ranks = tf.constant(pairs, tf.int64), tf.range(len(pairs), dtype=tf.int64)
        self.ranks = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, ranks), NO_MERGE)
        self.made = tf.constant(made, tf.int32)
        self.settled = tf.constant(settled, tf.bool)
        self.ids = tf.constant(table.ids, tf.int32)
        self.orderly = table.orderly

    def joined(self, symbols: tf.Tensor, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """All words merged to their ends: symbols (N,) int32, words (N,) int32 from 0 on, each with a symbol."""
        shapes = (tf.TensorShape([None]),) * 3
        state = (symbols, words, self.rank(symbols, words))
        going = lambda symbols, words, ranks: tf.reduce_any(ranks < NO_MERGE)  # noqa: E731
        symbols, words, _ = tf.while_loop(going, self.step, state, shape_invariants=shapes)
        return symbols, words

    def rank(self, symbols: tf.Tensor, words: tf.Tensor) -> tf.Tensor:
        """The rank of each symbol with the next of its word, (N,) int64; NO_MERGE where there is none."""
        return tf.where(words == ahead(words, 1, -1), self.rank_of(symbols, ahead(symbols, 1, 0)), NO_MERGE)

    def rank_of(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """The ranks of pairs of symbols."""
        left, right = tf.cast(left, tf.int64), tf.cast(right, tf.int64)
        return self.ranks.lookup(tf.bitwise.left_shift(left, tf.constant(SHIFT, tf.int64)) + right)

    def step(self, symbols: tf.Tensor, words: tf.Tensor, ranks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Merge what is certain to be merged, at least the lowest rank of each word that has one."""
        lowest = tf.gather(tf.math.segment_min(ranks, words), words)
        first = alternate((ranks == lowest) & (ranks < NO_MERGE), ranks)
        if not self.orderly:
            settled = tf.gather(self.settled, tf.where(lowest < NO_MERGE, lowest, 0))
            return self.made_of(symbols, words, ranks, tf.where(settled, first, leftmost(first, words)))
        chosen = first | ((ranks < moved(ranks, 1, NO_MERGE)) & (ranks < ahead(ranks, 1, NO_MERGE)))
        bound = tf.gather(self.bound(symbols, words, ranks, chosen), words)
        return self.made_of(symbols, words, ranks, chosen & (ranks < bound))

    def bound(self, symbols: tf.Tensor, words: tf.Tensor, ranks: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
        """Below which rank nothing but the chosen pairs can be merged, of each word.

        That is the lowest rank of the pairs that are there when all of them are merged, and of those that each of them
        makes with what is beside it now.
        """
        _, after, merged = self.made_of(symbols, words, ranks, chosen)
        made, owner = tf.gather(self.made, tf.boolean_mask(ranks, chosen)), tf.boolean_mask(words, chosen)
        bound = tf.math.segment_min(merged, after)
        before, behind = (tf.boolean_mask(x, chosen) for x in (moved(symbols, 1, 0), ahead(symbols, 2, 0)))
        sides = (moved(words, 1, -1), self.rank_of(before, made)), (ahead(words, 2, -1), self.rank_of(made, behind))
        for word, rank in sides:
            beside = tf.where(tf.boolean_mask(word, chosen) == owner, rank, NO_MERGE)
            bound = tf.tensor_scatter_nd_min(bound, owner[:, None], beside)
        return bound

    def made_of(
        self, symbols: tf.Tensor, words: tf.Tensor, ranks: tf.Tensor, chosen: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The symbols, words and ranks where the chosen pairs (N,), no two of which overlap, are merged."""
        made = tf.gather(self.made, tf.where(chosen, ranks, 0))
        left = ~moved(chosen, 1, False)
        symbols, words = (tf.boolean_mask(x, left) for x in (tf.where(chosen, made, symbols), words))
        return symbols, words, self.rank(symbols, words)


def alternate(marked: tf.Tensor, ranks: tf.Tensor) -> tf.Tensor:
    """Every other one of the marked (N,) in each run of equal ranks, from its left: pairs of x x x overlap."""
    starts = marked & ~(moved(marked, 1, False) & (moved(ranks, 1, NO_MERGE) == ranks))
    place = tf.range(tf.shape(marked)[0])
    run = tf.cumsum(tf.cast(starts, tf.int32)) - 1
    begin = tf.gather(tf.concat([tf.boolean_mask(place, starts), [0]], 0), tf.maximum(run, 0))
    return marked & ((place - begin) % 2 == 0)


def leftmost(marked: tf.Tensor, words: tf.Tensor) -> tf.Tensor:
    """The first marked place (N,) of each word."""
    place = tf.range(tf.shape(marked)[0])
    first = tf.math.segment_min(tf.where(marked, place, tf.int32.max), words)
    return marked & (place == tf.gather(first, words))
