"""Byte-level BPE in pure Python: exact for any table of merges, and never worse than n log n in the length of a word.

Inside, a token is a *symbol*: 0 to 255 are the bytes, and 256 + k is what the k-th merge makes (or an earlier symbol,
if that text was made before). A pair of symbols is one integer, so that a lookup builds no tuple. Ids come last.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from typing import Any, NamedTuple

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.words import split_words, windows

NO_MERGE = 1 << 62
SHORT = 48  # bytes up to which scanning a list beats a heap
CACHED_WORDS = 1 << 16
CACHED_CHARS = 64  # longer words hardly ever return, and would make the cache's size depend on them
SHIFT = 32
POSITION = (1 << SHIFT) - 1


@lru_cache(maxsize=1)
def byte_characters() -> str:
    """The printable characters by which GPT-2's files spell the bytes 0 to 255, in that order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@lru_cache(maxsize=1)
def _to_bytes() -> dict[int, int]:
    """Character -> byte; other characters of Latin-1 become one that it cannot encode."""
    return dict.fromkeys(range(256), 0xFFFF) | {ord(char): byte for byte, char in enumerate(byte_characters())}


def spell(raw: bytes) -> str:
    """Bytes as GPT-2's files spell them."""
    return raw.decode("latin-1").translate(dict(enumerate(byte_characters())))


def unspell(token: str) -> bytes:
    """The bytes that a token stands for; a token that the byte alphabet cannot spell stands for its own text."""
    try:
        return token.translate(_to_bytes()).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "surrogatepass")


class MergeTable(NamedTuple):
    """The merges as arrays. A symbol is a byte, or from 256 on what a merge made."""

    pairs: list[int]  # of each merge that is the first of its pair, left symbol << SHIFT | right symbol, in their order
    made: list[int]  # the symbol that each of them makes
    raw: list[bytes]  # the bytes of each symbol
    ids: list[int]  # of each symbol; the unknown token's, or -1, where the vocabulary does not hold it
    whole: list[bool]  # whether the bytes of each symbol merge to just that symbol
    settled: list[bool]  # of each merge, whether no merge before it has what it makes
    orderly: bool  # whether no token has two merges; then all are settled


class WordCache(dict[str, tuple[int, ...]]):
    """Word -> ids, bounded: two generations, of which the older is dropped when the younger is full.

    A word used since the last change of generation survives, as in an LRU, while a hit stays one plain dict lookup.
    """

    def __init__(self, engine: "BPE", size: int) -> None:
        super().__init__()
        self._engine, self._size = engine, size
        self._older: dict[str, tuple[int, ...]] = {}

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._older.get(word) or self._engine.encode_bytes(word.encode())
        if len(word) <= CACHED_CHARS:
            if len(self) >= self._size:
                self._older = dict(self)
                self.clear()
            self[word] = ids
        return ids


class BPE:
    """The merges of a byte-level BPE and the ids of what they make.

    Args:
        vocab: token -> id, tokens spelled with `byte_characters`.
        merges: pairs of tokens, the most frequent first.
        unk_id: the id for a byte that the vocabulary does not hold, if there is one.
        cached_words: how many words' ids to remember, at most twice over.
        ignore_merges: whether a word of the vocabulary is that token, whatever the merges make of it.
        use_regex: whether a text is cut into words, or is one.

    Raises:
        TokenizerError: a merge names or makes a token that the vocabulary does not hold.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        unk_id: int | None = None,
        cached_words: int = CACHED_WORDS,
        ignore_merges: bool = False,
        use_regex: bool = True,
    ) -> None:
        self.vocab, self.merges, self.unk_id = vocab, merges, unk_id
        self.ignore_merges, self.use_regex = ignore_merges, use_regex
        self._pairs: dict[int, int] = {}  # left << SHIFT | right -> rank
        self._made: list[int] = []  # rank -> symbol
        self._parts: list[tuple[int, int]] = [(byte, -1) for byte in range(256)]  # symbol -> what its merge joins
        self._bytes = [bytes([byte]) for byte in range(256)]  # symbol -> its bytes
        self._ids = [vocab.get(char, -1) for char in byte_characters()]  # symbol -> id
        self._add_merges()
        self._whole: list[bool | None] = [True] * 256 + [None] * (len(self._parts) - 256)  # see _is_whole
        # In an orderly table every token has one merge, so that a symbol's number is 256 + the rank of that merge.
        self._orderly = len(self._parts) == 256 + len(merges)
        self._words = {raw: symbol for symbol, raw in enumerate(self._bytes)} if self._orderly else {}
        self._cache = WordCache(self, cached_words)

    def __reduce__(self) -> tuple[type["BPE"], tuple[Any, ...]]:
        return BPE, (self.vocab, self.merges, self.unk_id, CACHED_WORDS, self.ignore_merges, self.use_regex)

    def _add_merges(self) -> None:
        symbols = {char: byte for byte, char in enumerate(byte_characters())}
        for rank, (left, right) in enumerate(self.merges):
            first, second, made = symbols.get(left), symbols.get(right), self.vocab.get(left + right)
            if first is None or second is None or made is None:
                raise TokenizerError(self._explain(rank, left, right, symbols))
            symbol = symbols.setdefault(left + right, len(self._parts))
            if symbol == len(self._parts):
                self._parts.append((first, second))
                self._bytes.append(self._bytes[first] + self._bytes[second])
                self._ids.append(made)
            self._made.append(symbol)
            self._pairs.setdefault(first << SHIFT | second, rank)

    def _explain(self, rank: int, left: str, right: str, symbols: Mapping[str, int]) -> str:
        problem = f"makes {left + right!r}, which the vocabulary does not hold"
        for token in (left, right):
            if token not in symbols:
                problem = f"names {token!r}, which is neither a byte nor made by an earlier merge"
        return f"merge {rank}, ({left!r}, {right!r}), {problem}; take merges and vocabulary from the same tokenizer"

    def table(self) -> MergeTable:
        """The merges for another engine."""
        pairs = sorted(self._pairs, key=self._pairs.__getitem__)
        made = [self._made[self._pairs[pair]] for pair in pairs]
        first: dict[int, int] = {}  # symbol -> the first merge that has it
        for at, pair in enumerate(pairs):
            first.setdefault(pair >> SHIFT, at)
            first.setdefault(pair & POSITION, at)
        settled = [first.get(symbol, NO_MERGE) > at for at, symbol in enumerate(made)]
        ids = [(-1 if self.unk_id is None else self.unk_id) if known < 0 else known for known in self._ids]
        whole = [self._orderly and self._is_whole(symbol) for symbol in range(len(self._ids))]
        return MergeTable(pairs, made, self._bytes, ids, whole, settled, self._orderly)

    @property
    def complete(self) -> bool:
        """Whether the vocabulary holds all 256 bytes, so that every text has ids of its own."""
        return min(self._ids[:256]) >= 0

    def encode(self, text: str) -> list[int]:
        """The ids of an ordinary text without lone surrogates.

        Raises:
            TokenizerError: the text needs a byte that the vocabulary does not hold, and there is no unknown token.
        """
        lookup = self._cache.__getitem__
        if not self.use_regex:
            return list(lookup(text)) if text else []
        parts = (chain.from_iterable(map(lookup, split_words(part))) for part in windows(text))
        return list(chain.from_iterable(parts))

    def words(self, text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The words of an ordinary text, each with its ids."""
        parts = map(split_words, windows(text)) if self.use_regex else [[text]]
        for word in chain.from_iterable(parts):
            yield word, self._cache[word]

    def encode_bytes(self, raw: bytes) -> tuple[int, ...]:
        """The ids of one word, without the cache."""
        if self.ignore_merges and (known := self.vocab.get(spell(raw))) is not None:
            return (known,)
        symbol = self._words.get(raw)
        if symbol is not None and self._is_whole(symbol):
            return self._to_ids((symbol,))
        symbols = list(raw)
        return self._to_ids(self._merge_short(symbols) if len(symbols) <= SHORT else self._merge_long(symbols))

    def _to_ids(self, symbols: Iterable[int]) -> tuple[int, ...]:
        ids = tuple(map(self._ids.__getitem__, symbols))
        return ids if min(ids, default=0) >= 0 else tuple(self._known(ids, symbols))

    def _known(self, ids: Iterable[int], symbols: Iterable[int]) -> Iterator[int]:
        for found, symbol in zip(ids, symbols, strict=True):
            if found < 0 and self.unk_id is None:
                raise TokenizerError(
                    f"the vocabulary has no token for the byte 0x{symbol:02x} ({byte_characters()[symbol]!r}); "
                    "add it, or name an unk_token that the vocabulary holds"
                )
            yield self.unk_id if found < 0 and self.unk_id is not None else found

    def _is_whole(self, symbol: int) -> bool:
        """Whether the bytes of `symbol` merge to just `symbol`, found out without merging them, and remembered."""
        whole, pending = self._whole, [symbol]
        while whole[symbol] is None:
            left, right = self._parts[pending[-1]]
            unknown = [part for part in (left, right) if whole[part] is None]
            if not unknown:
                made = pending.pop()
                whole[made] = bool(whole[left] and whole[right] and self._seam_holds(left, right))
            pending += unknown
        return bool(whole[symbol])

    def _seam_holds(self, left: int, right: int) -> bool:
        """Whether no merge crosses the seam between two tokens while each is being made.

        Follows the two tokens that meet there back in time: at each step the one made later is undone, and the two
        that met before may not have been a merge that came first. Among merges of one rank the left one comes first.
        """
        while max(left, right) >= 256:
            undo_left, made_at = left > right, max(left, right) - 256
            if undo_left:
                left = self._parts[left][1]
            else:
                right = self._parts[right][0]
            rank = self._pairs.get(left << SHIFT | right, NO_MERGE)
            if rank < made_at or (rank == made_at and not undo_left):
                return False
        return True

    def _merge_short(self, symbols: list[int]) -> list[int]:
        """BPE by scanning: the least rank, the leftmost of equals, until none is left. Quadratic, and quickest."""
        get = self._pairs.get
        ranks = [get(left << SHIFT | right, NO_MERGE) for left, right in pairwise(symbols)]
        while ranks and (rank := min(ranks)) != NO_MERGE:
            at = ranks.index(rank)
            symbols[at : at + 2] = [self._made[rank]]
            del ranks[at]
            if at < len(ranks):
                ranks[at] = get(symbols[at] << SHIFT | symbols[at + 1], NO_MERGE)
            if at:
                ranks[at - 1] = get(symbols[at - 1] << SHIFT | symbols[at], NO_MERGE)
        return symbols

    def _merge_long(self, symbols: list[int]) -> list[int]:
        """The same by a heap of rank << SHIFT | position over a linked list; entries gone stale are skipped."""
        get, made, end = self._pairs.get, self._made, len(symbols)
        after, before = list(range(1, end + 1)), list(range(-1, end - 1))
        ranks = (get(left << SHIFT | right, NO_MERGE) for left, right in pairwise(symbols))
        heap = [rank << SHIFT | at for at, rank in enumerate(ranks) if rank != NO_MERGE]
        heapify(heap)
        while heap:
            entry = heappop(heap)
            rank, at = entry >> SHIFT, entry & POSITION
            right = after[at]
            if symbols[at] < 0 or right == end or get(symbols[at] << SHIFT | symbols[right]) != rank:
                continue
            symbols[at], symbols[right] = made[rank], -1
            after[at] = right = after[right]
            if right < end:
                before[right] = at
                if (new := get(symbols[at] << SHIFT | symbols[right])) is not None:
                    heappush(heap, new << SHIFT | at)
            left = before[at]
            if left >= 0 and (new := get(symbols[left] << SHIFT | symbols[at])) is not None:
                heappush(heap, new << SHIFT | left)
        return [symbol for symbol in symbols if symbol >= 0]
