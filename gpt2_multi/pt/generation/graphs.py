"""Steps that never leave their device, and the CUDA graphs that repeat them, for `cache_implementation="static"`.

All that a step reads, counts and writes are tensors which stay where they are: so no Python and no waiting comes
between two tokens, and the host looks now and then. A step computes what the model's forward and the ordinary loop
compute, and runs only where nothing but their own code would have run. Weights are read by their addresses, so that
what is written into them counts; where a parameter is another one, or lies elsewhere, graphs are made anew.

R rows, C columns of the cache, S of them that are read, H heads, D head width, E `n_embd`, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from threading import Lock
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_multi.generation.options import Options
from gpt2_multi.pt.attention import is_autocast, lowest, merge_heads, upcast
from gpt2_multi.pt.generation.cpu_kernels import is_own
from gpt2_multi.pt.generation.rules import choose, ends, process
from gpt2_multi.pt.layers import is_unchanged
from gpt2_multi.pt.model import ACTIVATIONS

DEVICES = {"cuda"}  # where steps repeat each other; tests have it on a CPU, without graphs
LEAST = 256  # columns of the cache that a step reads; then twice as many, and so on
MOST = 4  # kinds of steps that a model keeps
LIMIT = 64  # shapes that a part of a step is compiled for
WARM = 2  # steps that run before one is recorded
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # of a block, as they are used


class Settings(NamedTuple):
    """What of a model's configuration a step is made for."""

    epsilon: float
    activation: str
    scales: tuple[float, ...]  # of the scores of each layer
    heads: tuple[int, ...]  # of each layer
    head_dim: int

    @classmethod
    def of(cls, body: Any) -> Self:
        """Those of a model."""
        layers = [block.attn for block in body.h]
        scales, heads = tuple(one.scale for one in layers), tuple(one.num_heads for one in layers)
        return cls(body.config.layer_norm_epsilon, body.config.activation, scales, heads, layers[0].head_dim)


class Weights(NamedTuple):
    """The parameters of a model, in the order of a step."""

    wte: Tensor  # (V, E)
    wpe: Tensor  # (P, E)
    layers: tuple[tuple[Tensor, ...], ...]  # of each part a weight and a bias
    norm: tuple[Tensor, Tensor]
    head: Tensor  # (V, E)

    @classmethod
    def of(cls, model: Any) -> Self:
        """Those of a model, which this does not hold."""
        body = model.transformer
        layers = tuple(
            tuple(getattr(block.get_submodule(part), name) for part in PARTS for name in ("weight", "bias"))
            for block in body.h
        )
        return cls(body.wte.weight, body.wpe.weight, layers, (body.ln_f.weight, body.ln_f.bias), model.lm_head.weight)

    def flat(self) -> list[Tensor]:
        """All of them."""
        return [self.wte, self.wpe, *self.norm, self.head, *(x for layer in self.layers for x in layer)]


@dataclass
class Track:
    """What steps carry from one to the next, in tensors that stay where they are."""

    keys: list[Tensor]  # (R, H, C, D) of each layer
    values: list[Tensor]
    bias: Tensor  # (R, 1, 1, C), of the scores: 0 where a key counts
    place: Tensor  # (1,), the column of the next key
    position: Tensor  # (R,), of the next token
    added: Tensor  # (R, E), the embedding of its type, or 0
    token: Tensor  # (R,), the next that is read
    ids: Tensor  # (R, C), the text so far at the end of them
    keep: Tensor  # (R, C), which of them count
    step: Tensor  # (1,), how many tokens were made
    shown: Tensor  # (R, C), what the caller sees of them
    finished: Tensor  # (R,)
    stop: Tensor  # (R,), the states of the stop strings
    needed: Tensor  # () how many steps there were before all rows were over

    @classmethod
    def empty(cls, rows: int, columns: int, settings: Settings, wte: Tensor) -> Self:
        """That of no text."""
        shapes = [(rows, heads, columns, settings.head_dim) for heads in settings.heads]
        keys, values = ([wte.new_zeros(shape) for shape in shapes] for _ in range(2))
        integers, flags = wte.new_zeros(rows, columns, dtype=torch.long), wte.new_zeros(rows, columns, dtype=torch.bool)
        bias = wte.new_full((rows, 1, 1, columns), lowest(wte.dtype))
        one, row = integers.new_zeros(1), integers.new_zeros(rows)
        return cls(
            keys, values, bias, one, row, wte.new_zeros(rows, wte.shape[1]), row.clone(), integers, flags,
            one.clone(), integers.clone(), flags[:, 0].clone(), row.clone(), one[0].clone(),
        )  # fmt: skip

    def reset(self) -> None:
        """Begin with a token of no text."""
        for x in (self.place, self.position, self.token, self.step, self.stop):
            x.zero_()

    def load(self, state: Any, types: Tensor | None) -> None:
        """Go on from a state, whose cache has all tokens but the last, and types (R, E) as they are embedded."""
        length, made, cache = state.cache.length, state.length, state.cache
        for (key, value), keys, values in zip(cache, self.keys, self.values, strict=True):
            keys[:, :, :length], values[:, :, :length] = key, value
        there = self.keep.new_ones(len(self.token), length) if state.keep is None else state.keep[:, :length]
        self.bias.fill_(lowest(self.bias.dtype))
        self.bias[:, 0, 0, :length].masked_fill_(there, 0)
        self.place.fill_(length)
        self.position.copy_(there.sum(-1))
        self.added.copy_(torch.zeros_like(self.added) if types is None else types)
        self.keep.zero_()
        self.ids[:, -made:], self.keep[:, -made:] = state.ids[:, :made], state.mask[:, :made]
        self.token.copy_(state.ids[:, made - 1])
        self.step.fill_(state.step)
        self.shown[:, : state.shown.shape[1]] = state.shown
        self.finished.copy_(state.finished)
        self.stop.copy_(state.stop)
        self.needed.fill_(state.step)


def read(weights: Weights, track: Track) -> Tensor:
    """The first block's input, of the next token and its position: (R, E)"""
    return F.embedding(track.token, weights.wte) + F.embedding(track.position, weights.wpe) + track.added


def block_step(
    x: Tensor, layer: tuple[Tensor, ...], keys: Tensor, values: Tensor, bias: Tensor, place: Tensor,
    scale: float, epsilon: float, activation: str,
) -> Tensor:  # fmt: skip
    """What a block makes of the next token, whose key and value it stores: (R, E) -> (R, E); bias (R, 1, 1, S)"""
    ln_1, ln_1_bias, c_attn, c_attn_bias, out, out_bias, ln_2, ln_2_bias, c_fc, c_fc_bias, c_proj, c_proj_bias = layer
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], ln_1, ln_1_bias, epsilon), c_attn, c_attn_bias)
    q, k, v = qkv.view(len(x), 3, keys.shape[1], 1, keys.shape[3]).unbind(1)  # (R, H, 1, D)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    columns = bias.shape[-1]
    a = attend(q, keys[:, :, :columns], values[:, :, :columns], bias, scale)
    x = x + F.linear(merge_heads(a)[:, 0], out, out_bias)
    inner = F.linear(F.layer_norm(x, x.shape[-1:], ln_2, ln_2_bias, epsilon), c_fc, c_fc_bias)
    return x + F.linear(ACTIVATIONS[activation](inner), c_proj, c_proj_bias)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of one query: (R, H, 1, D)"""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)


def finish(
    x: Tensor, norm: tuple[Tensor, Tensor], head: Tensor, epsilon: float, track: Track, options: Options
) -> None:
    """Choose the next token by the last block's output (R, E), and count it."""
    logits = F.linear(F.layer_norm(x, x.shape[-1:], *norm, epsilon), head)
    processed = process(upcast(logits), track.ids, track.keep, track.step, options)
    chosen = choose(processed, track.step, options)
    if options.fill < logits.shape[-1]:  # what the cache holds is what the caller sees
        chosen = chosen.masked_fill(track.finished, options.fill)
    track.needed.add_(~track.finished.all())
    track.shown.index_copy_(1, track.step, chosen.masked_fill(track.finished, options.fill)[:, None])
    ended, stop = ends(chosen, track.stop, options)
    track.stop.copy_(stop)
    track.finished.logical_or_(ended)
    track.ids.copy_(torch.cat([track.ids[:, 1:], chosen[:, None]], 1))
    track.keep.copy_(F.pad(track.keep[:, 1:], (0, 1), value=True))
    track.token.copy_(chosen)


def count(track: Track) -> None:
    """One more token is there."""
    for counter in (track.place, track.position, track.step):
        counter.add_(1)


@dataclass(eq=False)
class Steps:
    """The steps of a model for rows and options of one kind: their tensors, and a graph for each count of columns."""

    settings: Settings
    weights: Weights
    addresses: list[int]
    options: Options
    track: Track
    is_compiled: bool
    graphs: dict[int, Any] = field(default_factory=dict)  # columns that are read -> a CUDA graph
    lock: Lock = field(default_factory=Lock)  # whoever has it, has the tensors

    @classmethod
    def of(cls, model: Any, rows: int, columns: int, options: Options) -> Self:
        """Those of a model, with room for so many columns."""
        settings, weights = Settings.of(model.transformer), Weights.of(model)
        own = {name: x.clone() for name, x in options._asdict().items() if isinstance(x, Tensor)}
        track = Track.empty(rows, columns, settings, weights.wte)
        addresses = [x.data_ptr() for x in weights.flat()]
        return cls(settings, weights, addresses, options._replace(**own), track, can_compile(weights.wte))

    @property
    def columns(self) -> int:
        """For how many there is room."""
        return self.track.keep.shape[1]

    def fits(self, model: Any, columns: int) -> bool:
        """Whether the model's parameters are what and where they were, and there is room."""
        known = zip(Weights.of(model).flat(), self.weights.flat(), self.addresses, strict=True)
        is_same = all(x is own and x.data_ptr() == at for x, own, at in known)
        return is_same and columns <= self.columns and Settings.of(model.transformer) == self.settings

    def load(self, state: Any, options: Options) -> None:
        """Go on from a state, by options of the same kind."""
        for own, given in zip(self.options, options, strict=True):
            if isinstance(given, Tensor):
                own.copy_(given)
        types = None if state.types is None else F.embedding(state.types[:, -1], self.weights.wte)
        self.track.load(state, types)

    def once(self, columns: int) -> None:
        """One step, which reads so many columns."""
        settings, weights, track = self.settings, self.weights, self.track
        made: Callable[..., Callable[..., Any]] = compiled if self.is_compiled else as_written
        block, end = made(block_step), made(finish)
        x, bias = read(weights, track), track.bias.index_fill_(3, track.place, 0)[..., :columns]
        for layer, keys, values, scale in zip(weights.layers, track.keys, track.values, settings.scales, strict=True):
            x = block(x, layer, keys, values, bias, track.place, scale, settings.epsilon, settings.activation)
        end(x, weights.norm, weights.head, settings.epsilon, track, self.options)
        count(track)

    def prepare(self, first: int, last: int) -> None:
        """Have the graphs for keys in these columns, from the first to the last; what the tensors hold is lost."""
        for columns in sorted({bucket(place + 1, self.columns) for place in range(first, last + 1)}):
            if columns not in self.graphs and self.track.token.is_cuda:
                self.graphs[columns] = self.recorded(columns)

    def recorded(self, columns: int) -> Any:
        """A graph of one step, after some that compile what it runs."""
        self.track.reset()
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            try:
                for _ in range(WARM):
                    self.once(columns)
            except Exception as error:  # whatever a compiler says, there is a way without it
                if not self.is_compiled:
                    raise
                warnings.warn(
                    f"cache_implementation: steps are not compiled, as torch.compile fails: {error}", stacklevel=2
                )
                self.is_compiled = False
                self.once(columns)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # what other threads do is no part of it
            self.once(columns)
        return graph

    def run(self, first: int, number: int) -> None:
        """So many steps, the first of which stores its key in this column."""
        for place in range(first, first + number):
            columns = bucket(place + 1, self.columns)
            if columns in self.graphs:
                self.graphs[columns].replay()
            else:
                self.once(columns)


def bucket(columns: int, most: int) -> int:
    """How many columns are read where so many are filled."""
    return min(max(LEAST, 1 << (columns - 1).bit_length()), most)


def can_compile(x: Tensor) -> bool:
    """Whether steps are compiled: on a GPU, by Triton, which PyTorch's builds for it bring along."""
    return x.is_cuda and find_spec("triton") is not None


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a step as it is."""
    return function


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a step, compiled for each shape that it meets; a model's blocks are of one."""
    made = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*given: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=LIMIT):
            return made(*given)

    return call


kept: WeakKeyDictionary[Any, dict[Any, Steps]] = WeakKeyDictionary()  # model -> kind -> the steps


def steps_of(model: Any, rows: int, columns: int, options: Options) -> Steps:
    """Those that a model keeps of this kind, or new ones in the place of the oldest."""
    own = kept.setdefault(model, {})
    kind = (rows, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in options))
    found = own.pop(kind, None)
    if found is None or not found.fits(model, columns):
        found = None  # whose memory is free from here on
        while len(own) >= MOST:
            del own[next(iter(own))]
        found = Steps.of(model, rows, bucket(columns, model.config.n_positions), options)
    own[kind] = found
    return found


def is_served(model: Any, ids: Tensor) -> bool:
    """Whether a model's steps can repeat each other: a language model as it was made, where its ids are."""
    if ids.device.type not in DEVICES or getattr(model, "head", "") != "lm":
        return False
    first = model.transformer.wte.weight

    def is_alike(x: Any) -> bool:
        is_there = type(x) is nn.Parameter and (x.dtype, x.device) == (first.dtype, ids.device)
        return x is None or (is_there and x.layout is torch.strided)

    has_more = model.config.add_cross_attention or model.lm_head.bias is not None
    return not has_more and is_own(model, is_quiet, is_alike) and is_configured(model)


def is_configured(model: Any) -> bool:
    """Whether parts of a model have the weights and settings by which steps compute, those of its configuration."""
    config = model.config
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    is_same = all(block.mlp.act is ACTIVATIONS[config.activation] for block in model.transformer.h)
    is_same = is_same and all(norm.eps == config.layer_norm_epsilon for norm in norms)
    return is_same and all(x is not None for x in Weights.of(model).flat())


def is_quiet(x: Tensor) -> bool:
    """Whether nobody records, traces or changes what is computed with a tensor."""
    is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_unchanged(x) and not (is_autocast(x) or is_captured)


def repeated(model: Any, strategy: Any, state: Any, options: Options) -> Iterator[Any]:
    """The states after each stride of steps on the device, until all is over; those of others wait for their turn."""
    first, last = state.length - 1, state.length + strategy.room - 3
    steps = steps_of(model, len(state.ids), last + 1, options)
    with steps.lock:
        steps.prepare(first, last)
        steps.load(state, options)
        track = steps.track
        state.shown, state.finished = track.shown[:, : strategy.room], track.finished
        state.needed = None if state.needed is None else track.needed
        while strategy.is_open(state):
            number = min(strategy.stride - state.step % strategy.stride, strategy.room - state.step)
            steps.run(state.length - 1, number)
            state.step, state.length = state.step + number, state.length + number
            yield state
        state.shown, state.finished = state.shown.clone(), state.finished.clone()
        state.needed = None if state.needed is None else state.needed.clone()
