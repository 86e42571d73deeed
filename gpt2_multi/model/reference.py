"""GPT-2 in NumPy: the oracle that the tests, `doctor` and `verify` hold every backend against.

Written for reading, in the order of Radford et al. 2019; it computes in the dtype of the weights that it is given
(float64 in the tests). Weights are a mapping from the table's canonical names to arrays. Shapes: B batch, T length,
S keys, H heads, D head width, E `n_embd`, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2_multi.model.checkpoint.quantized import rounded
from gpt2_multi.model.config import GPT2Config

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]
IGNORED = -100  # a label that does not count


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[x.dtype])(x))


def _tanh_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow on either side


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),  # Hendrycks and Gimpel 2016
    "tanh_gelu": _tanh_gelu,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}


@dataclass
class Trace:
    """What `forward` saw on its way: see `outputs.BaseModelOutputWithPastAndCrossAttentions` for the shapes."""

    last_hidden_state: Array = field(default_factory=lambda: np.zeros(0))
    past: list[tuple[Array, Array]] = field(default_factory=list)
    hidden_states: list[Array] = field(default_factory=list)
    attentions: list[Array] = field(default_factory=list)
    cross_attentions: list[Array] = field(default_factory=list)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def positions(mask: Array) -> Array:
    """The position of each token: the count of unmasked tokens before it. mask: (B, T) -> (B, T)."""
    return np.asarray(np.maximum(np.cumsum(mask != 0, axis=-1) - 1, 0))


def _layer_norm(config: GPT2Config, w: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    return np.asarray(scaled * w[f"{name}.weight"] + w[f"{name}.bias"])


def _dense(config: GPT2Config, w: Weights, name: str, x: Array) -> Array:
    x = x if config.quantization is None else rounded(x)
    return np.asarray(x @ w[f"{name}.weight"] + w[f"{name}.bias"])


def _split(config: GPT2Config, x: Array) -> Array:
    batch, length, _ = x.shape
    return np.asarray(x.reshape(batch, length, -1, config.n_embd // config.n_head).swapaxes(1, 2))  # (B, H, T, D)


def _attend(config: GPT2Config, layer: int, q: Array, k: Array, v: Array, keep: Array, head_mask: Any) -> Any:
    scores = q @ k.swapaxes(-1, -2) * config.score_scale(layer)  # (B, H, T, S)
    probs = softmax(np.where(keep, scores, np.finfo(scores.dtype).min))
    probs = probs if head_mask is None else probs * head_mask
    return (probs @ v).swapaxes(1, 2).reshape(len(q), q.shape[2], -1), probs  # (B, T, E), (B, H, T, S)


def forward(
    config: GPT2Config,
    w: Weights,
    input_ids: Array | None = None,
    *,
    attention_mask: Array | None = None,
    token_type_ids: Array | None = None,
    position_ids: Array | None = None,
    head_mask: Array | None = None,
    inputs_embeds: Array | None = None,
    encoder_hidden_states: Array | None = None,
    encoder_attention_mask: Array | None = None,
) -> Trace:
    """The bare model without dropout, on (B, T) ids or (B, T, E) embeddings; masks are 1 where a token counts."""
    x = w["wte.weight"][input_ids] if inputs_embeds is None else inputs_embeds
    mask = np.ones(x.shape[:2]) if attention_mask is None else attention_mask
    x = x + w["wpe.weight"][positions(mask) if position_ids is None else position_ids]
    if token_type_ids is not None:
        x = x + w["wte.weight"][token_type_ids]
    keep = np.tril(np.ones((x.shape[1],) * 2, bool)) & (mask != 0)[:, None, None, :]  # (B, 1, T, S)
    trace = Trace()
    for i in range(config.n_layer):
        trace.hidden_states.append(x)
        q, k, v = map(
            lambda t: _split(config, t),
            np.split(_dense(config, w, f"h.{i}.attn.c_attn", _layer_norm(config, w, f"h.{i}.ln_1", x)), 3, -1),
        )
        trace.past.append((k, v))
        a, probs = _attend(config, i, q, k, v, keep, None if head_mask is None else head_mask[i][:, None, None])
        trace.attentions.append(probs)
        x = x + _dense(config, w, f"h.{i}.attn.c_proj", a)
        if encoder_hidden_states is not None:
            x = x + _cross(config, w, i, x, encoder_hidden_states, encoder_attention_mask, trace)
        hidden = ACTIVATIONS[config.activation](
            _dense(config, w, f"h.{i}.mlp.c_fc", _layer_norm(config, w, f"h.{i}.ln_2", x))
        )
        x = x + _dense(config, w, f"h.{i}.mlp.c_proj", hidden)
    trace.last_hidden_state = _layer_norm(config, w, "ln_f", x)
    trace.hidden_states.append(trace.last_hidden_state)
    return trace


def _cross(config: GPT2Config, w: Weights, i: int, x: Array, states: Array, mask: Array | None, trace: Trace) -> Array:
    q = _split(
        config, _dense(config, w, f"h.{i}.crossattention.q_attn", _layer_norm(config, w, f"h.{i}.ln_cross_attn", x))
    )
    k, v = (_split(config, t) for t in np.split(_dense(config, w, f"h.{i}.crossattention.c_attn", states), 2, -1))
    keep = np.ones(states.shape[:2], bool) if mask is None else mask != 0
    a, probs = _attend(config, i, q, k, v, keep[:, None, None, :], None)
    trace.cross_attentions.append(probs)
    return _dense(config, w, f"h.{i}.crossattention.c_proj", a)


def lm_logits(config: GPT2Config, w: Weights, hidden: Array) -> Array:
    """Logits over the vocabulary, by the embedding unless the head is untied: (..., E) -> (..., V)."""
    hidden = hidden if config.quantization is None else rounded(hidden)
    return np.asarray(hidden @ w["wte.weight" if config.tie_word_embeddings else "lm_head.weight"].T)


def last_tokens(mask: Array) -> Array:
    """The index of the last unmasked token of each row: (B, T) -> (B,)."""
    return np.asarray(mask.shape[-1] - 1 - np.argmax(mask[..., ::-1] != 0, axis=-1))


def summary(config: GPT2Config, w: Weights, hidden: Array, mask: Array, mc_token_ids: Array | None = None) -> Array:
    """The multiple-choice head: (B, C, T, E), mask (B, C, T) -> (B, C, L)."""
    index = {"first": np.argmax(mask != 0, -1), "last": last_tokens(mask)}.get(config.summary_type, mc_token_ids)
    index = last_tokens(mask) if index is None else index
    pooled = np.take_along_axis(hidden, index[..., None, None], -2)[..., 0, :]
    if config.summary_type == "mean":
        pooled = (hidden * mask[..., None]).sum(-2) / mask.sum(-1)[..., None]
    if config.summary_use_proj:
        name = "multiple_choice_head.summary"
        pooled = pooled @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    return np.asarray(ACTIVATIONS[config.summary_function](pooled) if config.summary_function else pooled)


def cross_entropy(logits: Array, labels: Array) -> float:
    """The mean negative log-likelihood of the labels that are not -100: (..., K) logits, (...) labels."""
    logits, labels = logits.reshape(-1, logits.shape[-1])[labels.ravel() != IGNORED], labels[labels != IGNORED]
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float(np.mean(log_z - logits[np.arange(len(labels)), labels])) if len(labels) else 0.0


def outputs(config: GPT2Config, w: Weights, head: str, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """What the model of this head (a key of `weights.HEADS`) gives for `inputs`, named as its `forward` names them.

    The answer is flat: `logits`, `loss`, `hidden_states.{i}`, `attentions.{i}`, `past.{i}.key` and so on.
    """
    given = dict(inputs)
    body = {key: value for key, value in given.items() if key in BODY_INPUTS}
    ids = given.get("input_ids")
    source = given["inputs_embeds"][..., 0] if ids is None else ids
    choices = source.shape if source.ndim == 3 else None
    if choices:  # as rows of a batch
        body = {key: x if key == "head_mask" else x.reshape(-1, *x.shape[2:]) for key, x in body.items()}
    trace = forward(config, w, **body)
    hidden = trace.last_hidden_state if choices is None else trace.last_hidden_state.reshape(*choices, -1)
    mask = inputs.get("attention_mask", np.ones(hidden.shape[:-1]))
    if head == "sequence_classification" and "attention_mask" not in inputs and ids is not None:
        mask = ids != config.pad_token_id
    return _lists(trace) | HEADS[head](config, w, hidden, mask, given)


BODY_INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "head_mask", "inputs_embeds",
    "encoder_hidden_states", "encoder_attention_mask",
)  # fmt: skip


def _lists(trace: Trace) -> dict[str, Any]:
    out: dict[str, Any] = {f"past.{i}.key": key for i, (key, _) in enumerate(trace.past)}
    out |= {f"past.{i}.value": value for i, (_, value) in enumerate(trace.past)}
    for name in ("hidden_states", "attentions", "cross_attentions"):
        out |= {f"{name}.{i}": value for i, value in enumerate(getattr(trace, name))}
    return out


def _base(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    return {"last_hidden_state": hidden}


def _lm(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    logits = lm_logits(config, w, hidden)
    if "labels" not in given:
        return {"logits": logits}
    labels = given["labels"][..., 1:]
    counted = (mask[..., 1:] != 0) & (mask[..., :-1] != 0)  # a hidden token neither is predicted nor predicts
    return {"logits": logits, "loss": cross_entropy(logits[..., :-1, :], np.where(counted, labels, IGNORED))}


def _double(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    scores = summary(config, w, hidden, mask, given.get("mc_token_ids"))[..., 0]
    out = _lm(config, w, hidden, mask, given) | {"mc_logits": scores}
    return out if "mc_labels" not in given else out | {"mc_loss": cross_entropy(scores, given["mc_labels"])}


def _sequence(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    logits = hidden[np.arange(len(hidden)), last_tokens(mask)] @ w["score.weight"].T
    labels = given.get("labels")
    if labels is None:
        return {"logits": logits}
    if config.num_labels == 1:
        return {"logits": logits, "loss": float(np.mean((logits.reshape(labels.shape) - labels) ** 2))}
    if labels.dtype.kind == "f":
        return {"logits": logits, "loss": float(np.mean(np.logaddexp(0, logits) - labels * logits))}
    return {"logits": logits, "loss": cross_entropy(logits, labels)}


def _token(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    logits = hidden @ w["classifier.weight"].T + w["classifier.bias"]
    if "labels" not in given:
        return {"logits": logits}
    return {"logits": logits, "loss": cross_entropy(logits, np.where(mask != 0, given["labels"], IGNORED))}


def _span(config: GPT2Config, w: Weights, hidden: Array, mask: Array, given: Mapping[str, Array]) -> dict[str, Any]:
    start, end = np.moveaxis(hidden @ w["qa_outputs.weight"].T + w["qa_outputs.bias"], -1, 0)
    out = {"start_logits": start, "end_logits": end}
    if "start_positions" not in given or "end_positions" not in given:
        return out
    losses = (_position_loss(start, given["start_positions"]), _position_loss(end, given["end_positions"]))
    return out | {"loss": sum(losses) / 2}


def _position_loss(logits: Array, position: Array) -> float:
    inside = (position >= 0) & (position < logits.shape[1])
    return cross_entropy(logits, np.where(inside, position, IGNORED))


HEADS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "base": _base,
    "lm": _lm,
    "double_heads": _double,
    "sequence_classification": _sequence,
    "token_classification": _token,
    "question_answering": _span,
}


class Upcast(Mapping[str, Array]):
    """Tensors in float64, each upcast when it is used."""

    def __init__(self, tensors: Weights) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name].astype(np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def oracle(config: GPT2Config, weights: Weights, ids: Array) -> list[Array]:
    """What goes into each layer of a language model, what the last norm gives, and the logits, in float64: (B, T) ids.

    The tensors are upcast one by one, so that a mapped checkpoint may be larger than memory.
    """
    tied = config if "lm_head.weight" in weights else config.replace(tie_word_embeddings=True)
    with np.errstate(all="ignore"):  # weights that are not finite are compared too
        trace = forward(config, Upcast(weights), ids)
        return [*trace.hidden_states, lm_logits(tied, Upcast(weights), trace.last_hidden_state)]
