"""Training on two devices: each test starts a process of its own, since devices are split before TensorFlow starts."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow")

# Losses of two epochs, of evaluate, and what predict gives: on one device, or on two virtual ones under a strategy.
PROGRAM = """
import json, sys
import keras, numpy as np, tensorflow as tf
devices, folder, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from gpt2_multi.tf import TFGPT2ForSequenceClassification, TFGPT2LMHeadModel
from gpt2_multi.tf.training import AdamW
rng = np.random.default_rng(0)
ids = rng.integers(1, 50, (9, 12))
labels = ids.copy()
rows, options, cls = 9, {"metrics": ["accuracy"]}, TFGPT2LMHeadModel
if case == "other counts":  # of counted labels: the second half of each batch has fewer, of one batch none
    labels[2:4, 3:], labels[6:8] = -100, -100
if case == "equal parts":
    rows, options = 8, {}
if case == "one class":
    cls, labels = TFGPT2ForSequenceClassification, rng.integers(0, 2, 9)
if case == "compiled loss":  # whose mean over replicas is a mean over rows where the parts are equal
    rows, options = 8, {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
assert strategy.num_replicas_in_sync == devices
with strategy.scope():
    model = cls.from_pretrained(folder)
    keras.utils.set_random_seed(0)
    if cls is TFGPT2ForSequenceClassification:
        model.score.kernel.assign(rng.normal(size=(16, 2)))
    model.compile(AdamW(1e-2, weight_decay=1.0), **options)
data = tf.data.Dataset.from_tensor_slices(({"input_ids": ids[:rows]}, labels[:rows])).batch(4)
history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
found = {f"{name} {i}": loss for name, losses in history.items() for i, loss in enumerate(losses)}
found |= model.evaluate(data, verbose=0, return_dict=True)
found["batch"] = model.train_on_batch(ids[:3], labels[:3], return_dict=True)["loss"]
found["logits"] = model.predict(data, verbose=0).logits.ravel()[::7].tolist()
copies = [strategy.experimental_local_results(variable.value) for variable in model.variables]
found["equal"] = all(np.array_equal(*(x.numpy() for x in (c[0], c[-1]))) for c in copies)
print(json.dumps(found))
"""


def run(devices, folder, case):
    """What the program found, on this many devices."""
    command = [sys.executable, "-c", PROGRAM, str(devices), str(folder), case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from gpt2_multi.config import GPT2Config
    from tests import fixtures

    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("sharding") / "m"
    fixtures.write_model(where, config, "lm", dtype=np.float32)
    return where


@pytest.mark.parametrize("case", ["equal parts", "smaller last batch", "other counts", "one class", "compiled loss"])
def test_two_devices_train_as_one(folder, case):
    one, two = run(1, folder, case), run(2, folder, case)
    assert two.pop("equal") and one.pop("equal")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-4 if name == "logits" else 0, err_msg=name)
    assert one["loss 1"] < one["loss 0"]
