"""Training on several devices with `tf.distribute`: every replica holds every variable and takes a part of the batch.

strategy = tf.distribute.MirroredStrategy()
with strategy.scope():
    model = TFGPT2LMHeadModel.from_pretrained("gpt2")
    model.compile("adamw")
model.fit(dataset)
"""

from __future__ import annotations

import tensorflow as tf


def over_replicas(count: tf.Tensor) -> tf.Tensor:
    """A count summed over all replicas: divided by it, a replica's sum of losses is its part of the mean over all."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return count
    return context.all_reduce(tf.distribute.ReduceOp.SUM, count)
