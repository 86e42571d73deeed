"""The optimizer and the learning-rate schedule, as classes that Keras saves."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.tf.training import cosine_schedule

UNDECAYED = r"(^|/)(bias|gamma|beta)(/replica_\d+)?(:\d+)?$"  # as TensorFlow names its variables


@keras.saving.register_keras_serializable("gpt2_multi")
class AdamW(keras.optimizers.AdamW):
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and embeddings, not biases and layer norms.

    A class, since Keras' own forgets what it does not decay when it is saved. `options` are Keras', such as
    `global_clipnorm=1.0`.
    """

    def __init__(self, learning_rate: Any = 5e-5, weight_decay: float = 0.1, **options: Any) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **options)
        self.exclude_from_weight_decay(var_names=[UNDECAYED])


@keras.saving.register_keras_serializable("gpt2_multi")
class CosineSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """`cosine_schedule` of a learning rate, for an optimizer; Keras' CosineDecay warms up otherwise, from step 0."""

    def __init__(self, learning_rate: float, steps: int, warmup: int = 0, least: float = 0.1) -> None:
        self.settings: dict[str, Any] = dict(learning_rate=learning_rate, steps=steps, warmup=warmup, least=least)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        learning_rate, *shape = self.settings.values()
        return learning_rate * cosine_schedule(step, *shape)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same schedule from."""
        return dict(self.settings)
