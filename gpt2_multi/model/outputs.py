"""What the models return: dataclasses shared by the three frameworks, since they hold any kind of array.

Shapes: B batch, C choices, T length, S keys seen by the attention, H heads, D head width, E `n_embd`, V vocabulary,
L labels. Fields that were not asked for are None; as in transformers, indexing and unpacking pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from gpt2_multi.errors import LostError


class Later:
    """The value of a field that is computed when somebody reads it, as logits that a loss has not needed.

    Once it `is_lost`, as after an optimizer's step, the field is not there to whoever looks at the output (`in`,
    `keys`, `items`, `hasattr`, a copy), keeps its place, and tells whoever asks for it that it is.
    """

    def __init__(self, compute: Callable[[], Any], is_lost: Callable[[], bool]) -> None:
        self.compute = compute
        self.is_lost = is_lost

    def value(self) -> Any:
        """What is computed now; LostError where the weights are no longer those of the call."""
        if self.is_lost():
            raise LostError(
                "logits: expected the weights of the call, found that they have changed since; read the logits before "
                "the optimizer's step, or call the model with skip_logits=False"
            )
        return self.compute()

    def __repr__(self) -> str:
        return f"<not computed{', the weights have changed since' if self.is_lost() else ', until it is read'}>"

    def __reduce__(self) -> Any:
        return lost, ()  # what can be had has been computed before


def lost() -> Later:
    """What can no longer be had, in a copy of an output."""
    return Later(nothing, lambda: True)


def nothing() -> None:
    """The default of a field that may be given a `Later`: made so, no attribute of the class hides `__getattr__`."""


class Output(dict[str, Any]):
    """Access by attribute, by name (`out["logits"]`) and by position (`out[0]`, `loss, logits = out.to_tuple()`).

    It is a dict to whoever asks (Trainer, accelerate, DataParallel), and has in it what its attributes are.
    A loop over it is one over names; over values after a call with names of 2019, as `logits, past = model(x, past=p)`.
    """

    unpacks = False

    def __post_init__(self) -> None:
        """Take all fields as one dict, or as pairs, as those do that make a dict anew from its items."""
        first = fields(self)[0].name  # type: ignore[arg-type]
        given = getattr(self, first)
        if isinstance(given, (dict, Iterator)):
            setattr(self, first, None)
            self.update(given)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Later):
            vars(self).pop(name, None)
        else:
            object.__setattr__(self, name, value)
        if name not in self.__dataclass_fields__:
            return
        if value is None:
            super().pop(name, None)
        else:
            super().__setitem__(name, value)

    def __getattr__(self, name: str) -> Any:
        found = super().get(name)
        if not isinstance(found, Later):
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")
        setattr(self, name, found.value())
        return getattr(self, name)

    def __reduce__(self) -> Any:
        self.values()  # computes what would come later
        return type(self), tuple(self._raw().values()), vars(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._raw().items())})"

    def _raw(self) -> dict[str, Any]:
        """All fields, of which nothing is computed."""
        return {field.name: super(Output, self).get(field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _names(self) -> list[str]:
        """The names of the fields in the order of their places."""
        return [name for name, value in self._raw().items() if value is not None]

    def __contains__(self, key: object) -> bool:
        found = self._raw().get(key)  # type: ignore[call-overload]
        return found is not None and not (isinstance(found, Later) and found.is_lost())

    def keys(self) -> list[str]:  # type: ignore[override]
        """The names of the fields that are there."""
        return [name for name in self._names() if name in self]

    def get(self, key: str, default: Any = None) -> Any:
        """The field of this name, or what stands for it."""
        return getattr(self, key) if key in self else default

    def copy(self) -> dict[str, Any]:
        """The fields that are there, as a dict."""
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def values(self) -> list[Any]:  # type: ignore[override]
        """The fields that are there, in order."""
        return [getattr(self, key) for key in self.keys()]

    def items(self) -> list[tuple[str, Any]]:  # type: ignore[override]
        """(name, value) of the fields that are there."""
        return [(key, getattr(self, key)) for key in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, as `return_dict=False` gives them."""
        return tuple(self[:])

    def __getitem__(self, key: str | int | slice) -> Any:
        names = self._names()
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in names[key])
        if not isinstance(key, str):
            return getattr(self, names[key])
        if key not in names:
            raise KeyError(f"{type(self).__name__} has no '{key}' here; it has {', '.join(self.keys())}")
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.__dataclass_fields__:
            raise KeyError(f"{type(self).__name__} has no field '{key}'")
        setattr(self, key, value)

    def update(self, *args: Any, **fields: Any) -> None:
        """Assign fields."""
        for key, value in dict(*args, **fields).items():
            self[key] = value

    def _keep(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{type(self).__name__}: its fields stay; assign None to one, or take dict(output)")

    __delitem__ = pop = popitem = clear = setdefault = _keep

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple() if self.unpacks else self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(repr=False)
class BaseModelOutputWithPastAndCrossAttentions(Output):
    """The bare model's output.

    last_hidden_state: (B, T, E), after ln_f. past_key_values: a (key, value) pair per layer, each (B, H, S, D).
    hidden_states: n_layer + 1 of (B, T, E), the embeddings first, the last after ln_f. attentions, cross_attentions:
    n_layer of (B, H, T, S), after the softmax.
    """

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class CausalLMOutputWithCrossAttentions(Output):
    """The language model's output. loss: (), with labels. logits: (B, T, V). The rest as in the bare model's."""

    loss: Any = None
    logits: Any = field(default_factory=nothing)
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class GPT2DoubleHeadsModelOutput(Output):
    """loss: (), of `labels`. mc_loss: (), of `mc_labels`. logits: (B, C, T, V). mc_logits: (B, C)."""

    loss: Any = None
    mc_loss: Any = None
    logits: Any = field(default_factory=nothing)
    mc_logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class SequenceClassifierOutputWithPast(Output):
    """loss: (), with labels. logits: (B, L), at the last token of each row."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class TokenClassifierOutput(Output):
    """loss: (), with labels. logits: (B, T, L)."""

    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class QuestionAnsweringModelOutput(Output):
    """loss: (), with positions. start_logits, end_logits: (B, T)."""

    loss: Any = None
    start_logits: Any = None
    end_logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(repr=False)
class GenerateOutput(Output):
    """What `generate` gives with `return_dict_in_generate`, for B prompts with n texts each, N new tokens, K beams.

    sequences: (B * n, T + N), the prompts in front. texts: the same as text, and token_ids: as lists of ids without
    padding, where texts were given.
    log_probs: (B * n, N), of each new token among `scores`; 0 where a row is finished. scores: N of (B * n, V), or of
    (B * K, V) with beams, the logits (with beams log-probabilities) after all rules. logits: the same before them.
    sequences_scores: (B * n,), of beams: the sum of log_probs, divided by length ** length_penalty.
    beam_indices: (B * n, N), the row of `scores` that each token was chosen in; -1 where a row is finished.
    hidden_states, attentions: for each step those of all layers, as in the model's output; of the first step for the
    prompts, (B, T, E) and (B, H, T, T), and of those after it for the token that was read, (R, 1, E) and (R, H, 1, S).
    past_key_values: the cache of `sequences` but their last column, to go on from; None with beams.
    """

    sequences: Any = None  # the order of transformers, and what it has not after that
    sequences_scores: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    beam_indices: Any = None
    attentions: tuple[tuple[Any, ...], ...] | None = None
    hidden_states: tuple[tuple[Any, ...], ...] | None = None
    past_key_values: Any = None
    log_probs: Any = None
    texts: Any = None
    token_ids: Any = None
