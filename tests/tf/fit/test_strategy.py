"""Training on two devices, in a process of its own: devices are split before TensorFlow starts."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow")
from tests.support.effort import THOROUGH

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2

# Losses of two epochs, of evaluate and of a batch, what predict gives, and whether the replicas' weights are equal.
PROGRAM = """
import json, sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": sys.argv[2] == "quick"})
from gpt2_multi.tf import TFGPT2ForSequenceClassification, TFGPT2LMHeadModel
from gpt2_multi.tf.fit.optimizers import AdamW

rng = np.random.default_rng(0)
ids = rng.integers(1, 50, (9, 12))
few = ids.copy()  # labels of which each replica has another number, of some batches none
few[2:4, 3:], few[6:8] = -100, -100
compiled = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}
CASES = {
    "smaller last batch": (TFGPT2LMHeadModel, few, 9, {"metrics": ["accuracy", "perplexity"]}),
    "smaller first batch": (TFGPT2LMHeadModel, ids, 3, {"metrics": ["accuracy"]}),
    "other counts": (TFGPT2LMHeadModel, few, 9, {"weighted_metrics": ["accuracy"]}),
    "classes": (TFGPT2ForSequenceClassification, rng.integers(0, 2, 9), 9, {"metrics": ["accuracy"]}),
    "compiled loss": (TFGPT2LMHeadModel, ids, 8, compiled),
}

def run(strategy, cls, labels, rows, options):
    with strategy.scope():
        model = cls.from_pretrained(f"{sys.argv[1]}/{cls.head}")
        model.compile(AdamW(1e-2, weight_decay=1.0, global_clipnorm=0.05, epsilon=1e-3), **options)
    weights = [np.linspace(0, 2, rows)] if "weighted_metrics" in options else []
    data = tf.data.Dataset.from_tensor_slices(({"input_ids": ids[:rows]}, labels[:rows], *weights)).batch(4)
    history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
    found = {f"{name} {i}": loss for name, losses in history.items() for i, loss in enumerate(losses)}
    found |= model.evaluate(data, verbose=0, return_dict=True)
    found["batch"] = model.train_on_batch(ids[:2], labels[:2], return_dict=True)["loss"]
    output = model.predict(data, verbose=0)
    found["type"], found["logits"] = type(output).__name__, output.logits.ravel()[::7].tolist()
    copies = [strategy.experimental_local_results(variable.value) for variable in model.variables]
    found["copies"] = [len(c) for c in copies]
    found["equal"] = all(np.array_equal(c[0].numpy(), c[-1].numpy()) for c in copies)
    return found

if len(sys.argv) > 3:  # one of several hosts, which TF_CONFIG names
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    print(json.dumps({case: run(strategy, *CASES[case]) for case in sys.argv[3:]}, default=float))
    sys.exit()
found = []
for devices in (1, 2):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
    assert strategy.num_replicas_in_sync == devices
    found.append({case: run(strategy, *given) for case, given in CASES.items()})
    keras.utils.clear_session()  # Keras keeps a generator of the first strategy
print(json.dumps(found, default=float))
"""
CASES = ["smaller last batch", "smaller first batch", "other counts", "classes", "compiled loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models are."""
    from gpt2_multi.model.config import GPT2Config
    from tests.support import fixtures

    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sharding")
    for head in ("lm", "sequence_classification"):
        fixtures.write_model(folder / head, config, head, dtype=np.float32)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What the program found on one device, and on two, by case."""
    command = [sys.executable, "-c", PROGRAM, str(folder), "thorough" if THOROUGH else "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(two, one):
    """What two devices or hosts found is what one device found."""
    assert two.pop("equal") and one.pop("equal")
    assert two.pop("type") == one.pop("type")
    np.testing.assert_allclose(two.pop("logits"), one.pop("logits"), atol=1e-3)
    assert one["loss 1"] < one["loss 0"]
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_two_devices_train_as_one(found, case):
    one, two = (dict(each[case]) for each in found)
    assert set(one.pop("copies")) == {1} and set(two.pop("copies")) == {2}
    assert_same(two, one)


if THOROUGH:  # it takes a minute

    def test_two_hosts_train_as_one_device(found, folder):
        """Each is a process of this host; the last batch has rows for one of them alone."""
        with socket.socket() as first, socket.socket() as second:
            for each in (first, second):
                each.bind(("127.0.0.1", 0))
            workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]
        running = [host(folder, workers, index) for index in range(2)]
        try:
            answers = [process.communicate(timeout=600) for process in running]
        finally:
            for process in running:
                process.kill()
        for process, (printed, errors) in zip(running, answers, strict=True):
            assert process.returncode == 0, errors[-3000:]
            for case, two in json.loads(printed.splitlines()[-1]).items():
                one = dict(found[0][case])
                assert set(one.pop("copies")) == set(two.pop("copies")) == {1}
                assert_same(two, one)


def host(folder, workers, index):
    """The program as one of several hosts."""
    task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    command = [sys.executable, "-c", PROGRAM, str(folder), "thorough", *CASES]
    environment = {**os.environ, "TF_CONFIG": json.dumps(task), "TF_CPP_MIN_LOG_LEVEL": "3"}  # or pipes may be full
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_every_case_was_run(found):
    assert [list(each) for each in found] == [CASES, CASES]
