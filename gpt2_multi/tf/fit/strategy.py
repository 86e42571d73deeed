"""Training on several devices with `tf.distribute`: every replica holds every variable and takes a part of the batch::

    strategy = tf.distribute.MirroredStrategy()  # all GPUs of this host
    with strategy.scope():  # variables, the optimizer's too, are made on every device
        model = TFGPT2LMHeadModel.from_pretrained("gpt2")
        model.compile(AdamW(5e-5))
    model.fit(dataset)  # `dataset` has batches for all replicas together

Replicated are the weights, the optimizer's state and the metrics; split by rows are the batch and its activations; each
update sums the gradients of all replicas, so that the weights stay equal. One model has to fit into one device.

On several hosts each runs the same program, with TF_CONFIG in its environment, before anything else of TensorFlow::

    # TF_CONFIG='{"cluster": {"worker": ["host0:1234", "host1:1234"]}, "task": {"type": "worker", "index": 0}}'
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

with batches for all workers together, in a tf.data.Dataset, of which each takes its rows; only the worker of index 0
should write the model folder. `fit`, `evaluate` and `predict` give there what one device gives, also where the last
batch has a row for one worker alone. Models of Keras 3.15 itself do not run there: it averages the parts of a first
batch, and what a step reports along an axis that a number has not; neither happens here.

The model's own loss is the mean over the counted labels of all replicas, whatever part of them each one has, so `fit`
gives what one device gives. A compiled loss is Keras': the mean of the replicas' means. A loop of your own that calls
`strategy.run` gets each replica's part of the mean as `.loss`: take its gradient as it is, and sum it to report it.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.tf.layers import over_replicas, replicas


class LossOverReplicas(keras.metrics.Mean):
    """The loss that `fit` reports: of all replicas, weighted by all their rows.

    Keras hands it a replica's part times the number of replicas, weighted by that replica's rows: no mean where one has
    fewer rows, as in the last batch.
    """

    def update_state(self, values: tf.Tensor, sample_weight: Any = None) -> None:
        """values: (), sample_weight: (), both of this replica."""
        rows = tf.cast(1 if sample_weight is None else sample_weight, tf.float32)
        super().update_state(over_replicas(values) / replicas(), over_replicas(rows) / replicas())


def is_on_hosts(strategy: Any) -> bool:
    """Whether a strategy spreads over several hosts."""
    is_kind = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return is_kind and strategy.cluster_resolver.cluster_spec().num_tasks("worker") > 1
