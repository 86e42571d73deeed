"""Texts to ids in TensorFlow: code points, words, each different word once, and the words of each text put together.

B texts, N code points of all of them, W words, U different words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from gpt2_multi.tf.serve.merging import Merges
from gpt2_multi.tf.serve.splitting import CLASSES, among, class_table, word_starts
from gpt2_multi.tokenizer.engine.bpe import BPE, spell, unspell

UNKNOWN = -1
NUMBER = CLASSES.index("number")
HIDDEN = -2  # a token that hides what it overlaps, but is ordinary text
OUTSIDE = b"\xff"  # before a token's text: a byte that no word has


class Encoder(tf.Module):
    """What turns texts into ids: the merges, the words that are one token, and tokens that stand outside the merges."""

    def __init__(
        self,
        bpe: BPE,
        outside: Sequence[Mapping[str, int]],
        prefix_space: bool = False,
        digits: bool | None = None,
    ) -> None:
        """outside: groups of tokens that are found in texts before words are, the longest first where several begin.

        prefix_space: put a space before ordinary text that begins without one. digits: cut digits apart each for itself
        (True), or from what is none; None, not at all.
        """
        super().__init__()
        table = bpe.table()
        self.merges, self.classes = Merges(table), tf.constant(class_table())
        known = {b"": UNKNOWN}  # a table may not be empty
        known |= {
            raw: at for raw, at, whole in zip(table.raw, table.ids, table.whole, strict=True) if whole and at >= 0
        }
        if bpe.ignore_merges:
            known |= {raw: at for token, at in bpe.vocab.items() if spell(raw := unspell(token)) == token}
        self.use_regex, self.digits = bpe.use_regex, digits
        self.finders, self.prefix_space = [Finder(group) for group in outside], prefix_space
        found = ((token, at) for group in outside for token, at in group.items() if at != HIDDEN)
        self.words = look_up(known | {OUTSIDE + token.encode(): at for token, at in found})

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """The ids of texts (B,) of bytes, which are UTF-8 but for what becomes U+FFFD: (B, None) int32"""
        points = tf.strings.unicode_decode(texts, "UTF-8", errors="replace")
        return self.encode_points(points.flat_values, points.row_splits)

    def encode_points(self, points: tf.Tensor, splits: tf.Tensor) -> tf.RaggedTensor:
        """The ids of texts as code points (N,) int32, which begin and end at `splits` (B + 1,) int64."""
        size = tf.shape(points, tf.int64)[0]
        breaks = marks(splits[:-1], size)
        begins = ends = inside = tf.zeros_like(breaks)
        for finder in self.finders:
            begin, end = finder.find(points, breaks | begins | ends, inside)
            begins, ends = begins | begin, ends | end
            inside = tf.cumsum(tf.cast(begins, tf.int32)) > tf.cumsum(tf.cast(ends, tf.int32))
        edges = breaks | ends
        if self.digits is not None:
            edges |= parted(tf.gather(self.classes, points) == NUMBER, self.digits) & ~inside
        if self.prefix_space:
            lacking = edges & ~inside & (points != ord(" "))
            points, splits, edges, begins, inside = spaced(points, splits, lacking, edges, begins, inside)
            size = tf.shape(points, tf.int64)[0]
        starts = word_starts(points, edges | begins, self.classes) if self.use_regex else edges | begins
        places = tf.where(starts & (begins | ~inside))[:, 0]  # (W,)
        words = spelled(tf.RaggedTensor.from_row_splits(points, tf.concat([places, [size]], 0), validate=False))
        if self.finders:
            words = tf.where(tf.gather(begins, places), OUTSIDE + words, words)
        ids = self.encode_words(words)
        first = tf.searchsorted(places, splits)  # the word that each text begins with, (B + 1,)
        return tf.RaggedTensor.from_row_splits(ids.flat_values, tf.gather(ids.row_splits, first), validate=False)

    def encode_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """The ids of words (W,) of bytes: (W, None)"""
        different, which = tf.unique(words)
        ids = self.words.lookup(different)  # (U,)
        missing = tf.where(ids == UNKNOWN)[:, 0]
        parts = tf.strings.bytes_split(tf.gather(different, missing))
        bytes_of = tf.reshape(tf.io.decode_raw(parts.flat_values, tf.uint8), [-1])
        symbols, owners = self.merges.joined(tf.cast(bytes_of, tf.int32), tf.cast(parts.value_rowids(), tf.int32))
        owners = tf.gather(missing, owners)
        every = tf.concat([tf.where(ids != UNKNOWN)[:, 0], owners], 0)
        values = tf.concat([tf.boolean_mask(ids, ids != UNKNOWN), tf.gather(self.merges.ids, symbols)], 0)
        order = tf.argsort(every, stable=True)
        count = tf.shape(ids, tf.int64)[0]
        rows = tf.RaggedTensor.from_value_rowids(
            tf.gather(values, order), tf.gather(every, order), count, validate=False
        )
        return tf.gather(rows, which)


class Finder(tf.Module):
    """What finds tokens in texts."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        super().__init__()
        self.known = look_up({token.encode(): at for token, at in tokens.items()})
        self.firsts = "".join(sorted({token[0] for token in tokens}))
        self.sizes = sorted({len(token) for token in tokens}, reverse=True)

    def find(self, points: tf.Tensor, breaks: tf.Tensor, taken: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Where a token begins, and where the text goes on after one: (N,) each.

        None reaches over a break, and none begins where the text is taken already.
        """
        size = tf.shape(points, tf.int64)[0]
        places = tf.where(among(points, self.firsts) & ~taken)[:, 0]
        text, length = tf.cumsum(tf.cast(breaks, tf.int32)), tf.zeros_like(places)
        found = tf.fill(tf.shape(places), UNKNOWN)
        for count in self.sizes:
            here = places[:, None] + tf.range(count, dtype=tf.int64)  # (M, count)
            inside, here = here[:, -1] < size, tf.minimum(here, size - 1)
            inside &= tf.gather(text, here[:, -1]) == tf.gather(text, places)
            windows = spelled(tf.RaggedTensor.from_tensor(tf.gather(points, here)))
            at = self.known.lookup(windows)
            hit = (found == UNKNOWN) & inside & (at != UNKNOWN)
            length, found = tf.where(hit, tf.constant(count, tf.int64), length), tf.where(hit, at, found)
        is_there = found != UNKNOWN
        places, length, found = (tf.boolean_mask(x, is_there) for x in (places, length, found))
        chosen = tf.searchsorted(places, apart(places, length))
        chosen = tf.boolean_mask(chosen, tf.gather(found, chosen) != HIDDEN)
        begins = tf.gather(places, chosen)
        return marks(begins, size), marks(begins + tf.gather(length, chosen), size)


def look_up(known: Mapping[bytes, int]) -> tf.lookup.StaticHashTable:
    """A table in the graph from strings to ids; UNKNOWN for others."""
    keys, values = tf.constant(list(known), tf.string), tf.constant(list(known.values()), tf.int32)
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), UNKNOWN)


def parted(chosen: tf.Tensor, each: bool) -> tf.Tensor:
    """Where a run of chosen places begins or ends, (N,) bool; with `each`, each of them begins one."""
    before = tf.concat([tf.zeros([1], tf.bool), chosen], 0)[: tf.shape(chosen)[0]]
    return chosen | before if each else chosen != before


def marks(places: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Which of so many places (size,) are among these; some may lie at the end."""
    here = tf.ones_like(places, tf.bool)
    return tf.tensor_scatter_nd_update(tf.zeros([size + 1], tf.bool), places[:, None], here)[:size]


def spaced(
    points: tf.Tensor, splits: tf.Tensor, lacking: tf.Tensor, edges: tf.Tensor, *others: tf.Tensor
) -> list[tf.Tensor]:
    """Code points (N,), the splits of their texts and marks on them, with a space before those that lack one.

    A mark of `edges` moves onto the space, those of `others` stay where they are.
    """
    number = tf.cast(lacking, tf.int64)
    shift = tf.concat([[0], tf.cumsum(number)], 0)  # how far each moves to the right, (N + 1,)
    size = tf.shape(points, tf.int64)[0] + shift[-1]
    places = tf.range(size - shift[-1]) + shift[1:]
    filled = tf.fill([size], ord(" "))
    found = [tf.tensor_scatter_nd_update(filled, places[:, None], points), splits + tf.gather(shift, splits)]
    for mark, at in ((edges, places - number), *((other, places) for other in others)):
        found.append(tf.tensor_scatter_nd_update(tf.zeros([size], tf.bool), at[:, None], mark))
    return found


def apart(places: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """The places (M,) int64 from the left that no place before reaches into."""

    def leftmost() -> tf.Tensor:
        after = tf.searchsorted(places, places + lengths)  # the next that may follow each
        chosen = tf.TensorArray(tf.int64, 0, dynamic_size=True)
        count = tf.shape(places)[0]
        _, chosen = tf.while_loop(
            lambda at, chosen: at < count,
            lambda at, chosen: (after[at], chosen.write(chosen.size(), places[at])),
            (0, chosen),
        )
        return chosen.stack()

    overlap = tf.reduce_any(places[1:] < (places + lengths)[:-1])
    return tf.cond(overlap, leftmost, lambda: places)


def spelled(words: tf.RaggedTensor) -> tf.Tensor:
    """Words as code points (W, None) in UTF-8: (W,) strings"""
    points = words.flat_values
    nothing = ((points & 0xFFFE) == 0xFFFE) | ((points >= 0xFDD0) & (points <= 0xFDEF))
    # TensorFlow before 2.20 makes U+FFFD of noncharacters
    return tf.cond(tf.reduce_any(nothing), lambda: by_bytes(words), lambda: tf.strings.unicode_encode(words, "UTF-8"))


def repaired(texts: tf.Tensor) -> tf.Tensor:
    """Texts, (B,) bytes, as UTF-8: what is none becomes U+FFFD."""
    return spelled(tf.strings.unicode_decode(texts, "UTF-8", errors="replace"))


def by_bytes(words: tf.RaggedTensor) -> tf.Tensor:
    """The same, each byte by itself."""
    points = words.flat_values[:, None]  # (N, 1)
    size = 1 + tf.reduce_sum(tf.cast(points >= tf.constant([0x80, 0x800, 0x10000]), tf.int32), -1)  # bytes of each
    shift = 6 * (size[:, None] - 1 - tf.range(4))  # of the bits in each byte, (N, 4)
    bits = tf.bitwise.right_shift(points, tf.maximum(shift, 0))
    lead = tf.gather(tf.constant([0, 0, 0xC0, 0xE0, 0xF0]), size)[:, None]
    is_first = tf.range(4) == 0
    value = tf.where(is_first, lead | bits, 0x80 | (bits & 0x3F))
    single = tf.gather(tf.constant([bytes([byte]) for byte in range(256)]), value)
    characters = tf.strings.reduce_join(tf.where(shift >= 0, single, b""), -1)  # (N,)
    return tf.strings.reduce_join(words.with_flat_values(characters), -1)
