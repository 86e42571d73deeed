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

    A class, since Keras' own forgets what it does not decay when it is saved. It updates as PyTorch's and Optax' do,
    which add epsilon to what v is without its bias, Keras' own before. Under a strategy gradients are clipped when they
    are summed over the replicas, Keras' own before. `options` are Keras', such as `global_clipnorm=1.0`.
    """

    def __init__(self, learning_rate: Any = 5e-5, weight_decay: float = 0.1, **options: Any) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **options)
        self.exclude_from_weight_decay(var_names=[UNDECAYED])

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Update one variable; its moments m and v are biased towards zero, where they begin (Kingma and Ba 2015)."""
        dtype, index = variable.dtype, self._get_variable_index(variable)
        rate, gradient, step = (tf.cast(x, dtype) for x in (learning_rate, gradient, self.iterations + 1))
        one, two = (1 - tf.constant(beta, dtype) ** step for beta in (self.beta_1, self.beta_2))
        m, v = self._momentums[index], self._velocities[index]
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (tf.square(gradient) - v) * (1 - self.beta_2))
        if self.amsgrad:
            self.assign(self._velocity_hats[index], tf.maximum(self._velocity_hats[index], v))
            v = self._velocity_hats[index]
        decay = (self.weight_decay or 0.0) if self._use_weight_decay(variable) else 0.0
        self.assign_sub(variable, rate * (m / one / (tf.sqrt(v / two) + self.epsilon) + decay * variable))

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: `update_step` does."""

    def _clip_gradients(self, grads: list[tf.Tensor]) -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        return super()._clip_gradients(grads)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars  # they are summed already


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
