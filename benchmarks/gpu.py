"""What a GPU makes of GPT-2: `python -m benchmarks.gpu [--small] [--minutes N] [--only NAMES]`.

Needs nothing from outside, and measures what it finds of PyTorch, transformers and JAX. Each part is a process of its
own with a share of the time; a part that fails or is late is said to be so, and the others go on. Rows are printed as
they come, as JSON lines, also into a file in the folder that OUT names; the table is last. On a CPU, `--small` tries
whether all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt2_multi.model.config import GPT2Config

SIZES = {"gpt2": (12, 768, 12), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}  # layers, width, heads
TINY = (2, 64, 4)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # operations a second in bfloat16, dense, by the data sheets
PARTS = {  # part -> the packages that it needs, and its share of the time
    "generation": (("torch",), 0.25),
    "generation_transformers": (("torch", "transformers"), 0.25),
    "quantized": (("torch", "bitsandbytes"), 0.1),
    "training": (("torch",), 0.2),
    "training_transformers": (("torch", "transformers"), 0.12),
    "jax": (("jax", "flax"), 0.18),
}
OURS = "gpt2_multi"


def say(what: str, who: str, value: float, unit: str, **more: Any) -> None:
    """One row, at once."""
    print(json.dumps({"what": what, "who": who, "value": round(value, 4), "unit": unit, **more}), flush=True)


@contextmanager
def going_on(what: str, who: str) -> Iterator[None]:
    """Whatever fails is a row too."""
    try:
        yield
    except Exception as error:
        sentence = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps({"what": what, "who": who, "error": sentence}), flush=True)


def seconds(call: Callable[[], Any], wait: Callable[[], Any], count: int = 5) -> float:
    """The median of so many calls, after one that does not count."""
    call()
    wait()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def settings(name: str, small: bool) -> GPT2Config:
    """The configuration of a size, without dropout and ends; or of a tiny model."""
    layers, width, heads = TINY if small else SIZES[name]
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": None, "bos_token_id": None}
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, **none)


class Torch:
    """The device, and models on it with random weights."""

    def __init__(self, small: bool, theirs: bool) -> None:
        import torch

        self.torch, self.small, self.theirs = torch, small, theirs
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.who = "transformers" if theirs else OURS
        torch.manual_seed(0)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def model(self, name: str, dtype: str, attention: str = "sdpa") -> Any:
        """A language model."""
        config = settings(name, self.small)
        with self.torch.device(self.device):
            if not self.theirs:
                from gpt2_multi.pt import GPT2LMHeadModel

                return GPT2LMHeadModel(config, param_dtype=dtype, attn_implementation=attention)
            import transformers

            own = {key: value for key, value in config.to_dict().items() if key in ("n_layer", "n_embd", "n_head")}
            none = {key: getattr(config, key) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "eos_token_id")}
            made = transformers.GPT2Config(**own, **none, bos_token_id=None, attn_implementation=attention)
            return transformers.GPT2LMHeadModel(made).to(getattr(self.torch, dtype))

    def ids(self, rows: int, length: int) -> Any:
        """Random tokens."""
        return self.torch.randint(0, 50257, (rows, length), device=self.device)

    def forget(self) -> None:
        """Free what nobody holds, and begin to count memory."""
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()


def card(here: Torch) -> None:
    """What the device can do at most: bytes read and written, and bfloat16 operations, in a second."""
    torch, size = here.torch, 2**20 if here.small else 2**31
    a = torch.zeros(size, dtype=torch.uint8, device=here.device)
    b = torch.empty_like(a)
    say("copy", "card", 2 * size / seconds(lambda: b.copy_(a), here.wait) / 1e12, "TB/s")
    width = 256 if here.small else 8192
    x = torch.randn(width, width, device=here.device, dtype=torch.bfloat16)
    say("matrix product in bfloat16", "card", 2 * width**3 / seconds(lambda: x @ x, here.wait) / 1e12, "TFLOP/s")


def generation(small: bool, theirs: bool = False) -> None:
    """Milliseconds of a token with a static cache, and of a prompt."""
    here = Torch(small, theirs)
    if not theirs:
        with going_on("card", "card"):
            card(here)
        with going_on("tokens of a graph", OURS):
            say("tokens of a graph that are the ordinary ones", OURS, equal(here), "of 1")
    cases = [("gpt2-large", 1, "bfloat16"), ("gpt2-large", 32, "bfloat16"), ("gpt2", 1, "bfloat16")]
    cases += [("gpt2-xl", 1, "bfloat16"), ("gpt2", 32, "bfloat16"), ("gpt2-xl", 32, "bfloat16")]
    cases += [("gpt2-large", 1, "float16")]
    for name, rows, dtype in cases[: 2 if small else None]:
        what = f"{name}, {dtype}, batch {rows}"
        with going_on(what, here.who):
            of_tokens(here, here.model(name, dtype).eval(), what, rows)
            here.forget()
    with going_on("prompt of 1024", here.who), here.torch.no_grad():
        model, ids = here.model("gpt2-large", "bfloat16").eval(), here.ids(1, 1024)
        took = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), here.wait)
        say("gpt2-large, bfloat16, prompt of 1024", here.who, took * 1e3, "ms")


def quantized(small: bool) -> None:
    """Milliseconds of a token, and bytes of the weights, in NF4 and in the two kinds of int8."""
    from gpt2_multi import BitsAndBytesConfig
    from gpt2_multi.pt import GPT2LMHeadModel

    here, twice = Torch(small, False), {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    kinds: dict[str, dict[str, Any]] = {
        "NF4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **twice)},
        "LLM.int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "int8": {"quantization": "int8"},
    }
    with tempfile.TemporaryDirectory() as folder:
        here.model("gpt2-xl", "bfloat16").cpu().save_pretrained(folder)
        for name, given in kinds.items():
            with going_on(what := f"gpt2-xl, {name}, batch 1", OURS):
                here.forget()
                model = GPT2LMHeadModel.from_pretrained(folder, dtype="bfloat16", device_map=here.device, **given)
                say(f"{what}, weights", OURS, model.get_memory_footprint() / 1e9, "GB")
                of_tokens(here, model, what, 1)


def of_tokens(here: Torch, model: Any, what: str, rows: int) -> None:
    """A token greedily and sampled: what more tokens take than few, by their number."""
    ids, (few, many) = here.ids(rows, 32), (8, 16) if here.small else (8, 200)
    more: dict[str, Any] = {"cache_implementation": "static", "pad_token_id": 0}
    if here.theirs:
        more["attention_mask"] = here.torch.ones_like(ids)
    sampled = {"do_sample": True, "top_k": 50, "top_p": 0.95}
    for kind, rules in (("greedy", {"do_sample": False}), ("sampled", sampled)):

        def call(new: int, rules: dict[str, Any] = rules) -> Any:
            return model.generate(ids, max_new_tokens=new, **rules, **more)

        start = time.perf_counter()
        call(many)
        here.wait()
        say(f"{what}, {kind}, first call", here.who, time.perf_counter() - start, "s")
        long, short = (seconds(lambda new=new: call(new), here.wait, 3) for new in (many, few))
        say(f"{what}, {kind}", here.who, (long - short) / (many - few) * 1e3, "ms/token")
        if rows > 1:
            break


def equal(here: Torch) -> float:
    """How many tokens of the demo model, greedy and by every rule, a graph and the ordinary way have in common."""
    from gpt2_multi.pt import GPT2LMHeadModel

    model, ids = GPT2LMHeadModel.from_pretrained("demo").to(here.device), here.ids(3, 9) % 512
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 25, "top_k": 20, "top_p": 0.9}
    same = []
    for options in ({}, {"do_sample": True, "seed": 3, "min_p": 0.01, "typical_p": 0.9, **rules}):
        found, expected = (
            model.generate(ids, max_new_tokens=60, eos_token_id=[], cache_implementation=kind, **options)
            for kind in ("static", None)
        )
        same.append(float((found == expected).float().mean()))
    return min(same)


def training(small: bool, theirs: bool = False) -> None:
    """Tokens a second of a compiled step; and of a plain one, by both implementations of attention."""
    here = Torch(small, theirs)
    rows, length = (2, 32) if small else (16, 1024)
    with going_on("training, compiled", here.who):
        of_steps(here, f"training gpt2, {rows} x {length}, compiled", "sdpa", rows, length, compiled=True)
    if theirs:
        return
    rows = 2 if small else 8
    for attention in ("sdpa", "eager", "flash_attention_2"):
        with going_on("training, plain", attention):
            of_steps(here, f"training gpt2, {rows} x {length}, {attention} attention", attention, rows, length)
    for attention in ("sdpa", "flash_attention_2"):
        with going_on("training, documents in a row", attention):
            what = f"training gpt2, {rows * 8} documents in a row of {rows * length}, {attention} attention"
            of_steps(here, what, attention, 1, rows * length, documents=rows * 8)


def of_steps(
    here: Torch, what: str, attention: str, rows: int, length: int, compiled: bool = False, documents: int = 0
) -> None:
    """Forward, backward and fused AdamW, bfloat16 by autocast; of so many documents of different lengths in a row."""
    torch, model = here.torch, here.model("gpt2", "float32", attention).train()
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), here.ids(rows, length)
    more = {"skip_logits": True} if "skip_logits" in signature(model.forward).parameters else {}
    if documents:
        ends = [length * (i + i % 2) // documents for i in range(documents)] + [length]  # short, long, short, ...
        more["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None].to(here.device)

    def loss() -> Any:
        with torch.autocast(here.device, torch.bfloat16):
            return model(ids, labels=ids, use_cache=False, **more).loss

    forward = torch.compile(loss) if compiled else loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    here.forget()
    took = seconds(step, here.wait, 10)
    say(what, here.who, rows * length / took, "tokens/s")
    if here.device == "cuda":
        say(f"{what}, peak memory", here.who, torch.cuda.max_memory_allocated() / 2**20, "MiB")
    name = torch.cuda.get_device_name() if here.device == "cuda" else ""
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    if peak and compiled:
        say(f"{what}, of the card's peak", here.who, operations(model, rows, length) / took / peak * 100, "%")


def operations(model: Any, rows: int, length: int) -> float:
    """Of a step: six for each parameter that multiplies and each token, and those of attention, not halved."""
    count = sum(x.numel() for x in model.parameters()) - model.transformer.wpe.weight.numel()
    config = model.config
    return float((6 * count + 12 * config.n_layer * config.n_embd * length) * rows * length)


def jax(small: bool) -> None:
    """Generation and training by JAX."""
    import jax
    import numpy as np

    from gpt2_multi.flax import FlaxGPT2LMHeadModel
    from gpt2_multi.flax.training import create_train_state, optimizer, train_step

    who, rng = f"{OURS}, JAX", np.random.default_rng(0)
    few, many = (8, 16) if small else (8, 200)
    for name, rows in (("gpt2", 1), ("gpt2", 32), ("gpt2-large", 1)):
        what = f"{name}, bfloat16, batch {rows}, greedy"
        with going_on(what, who):
            model = FlaxGPT2LMHeadModel(settings(name, small), dtype="bfloat16", param_dtype="bfloat16")
            ids = rng.integers(0, 50257, (rows, 32))

            def call(new: int, model: Any = model, ids: Any = ids) -> Any:
                return jax.block_until_ready(model.generate(ids, max_new_tokens=new))

            long, short = (seconds(lambda new=new, call=call: call(new), lambda: None, 3) for new in (many, few))
            say(what, who, (long - short) / (many - few) * 1e3, "ms/token")
    rows, length = (2, 32) if small else (16, 1024)
    with going_on("training", who):
        model = FlaxGPT2LMHeadModel(settings("gpt2", small), dtype="bfloat16", param_dtype="float32")
        state = [create_train_state(model, optimizer(1e-4, max_norm=None))]
        ids = rng.integers(0, 50257, (rows, length))

        def step() -> None:
            state[0], _ = train_step(state[0], {"input_ids": ids, "labels": ids})

        took = seconds(step, lambda: jax.block_until_ready(state[0].params), 5)
        say(f"training gpt2, {rows} x {length}, compiled", who, rows * length / took, "tokens/s")


def part(name: str, small: bool) -> None:
    """Measure one part, in this process."""
    if name in ("jax", "quantized"):
        (jax if name == "jax" else quantized)(small)
    else:
        kind, _, theirs = name.partition("_")
        (generation if kind == "generation" else training)(small, bool(theirs))


def measured(name: str, small: bool, patience: float, log: Any) -> list[dict[str, Any]]:
    """The rows of a part, which is given so many seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *["--small"] * small]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(patience, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("{"):
                rows.append(json.loads(line))
                for out in (sys.stdout, log):
                    print(line, end="", file=out, flush=True)
        process.wait()
        timer.cancel()
    if process.returncode:
        late = f"ended after {patience:.0f} s" if process.returncode == -9 else f"ended with {process.returncode}"
        rows.append({"what": name, "who": "all", "error": late})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All rows in Markdown, and how often each of ours fits into the time of transformers."""
    theirs = {row["what"]: row["value"] for row in rows if row["who"] == "transformers" and "value" in row}
    lines = ["| what | who | value | unit | beside transformers |", "|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['what']} | {row['who']} | not measured | {row['error']} | |")
            continue
        beside = ""
        if row["what"] in theirs and row["who"] != "transformers" and row["value"]:
            ratio = theirs[row["what"]] / row["value"]
            beside = f"{1 / ratio if row['unit'] in ('tokens/s', '%') else ratio:.2f}"
        lines.append(f"| {row['what']} | {row['who']} | {row['value']:.4g} | {row['unit']} | {beside} |")
    return "\n".join(lines)


def environment() -> str:
    """The card and the versions, in a line."""
    found = []
    for package in ("torch", "triton", "transformers", "jax", "flax"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    asked = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
    if find_spec("torch") is None:
        asked = "import jax; print(jax.devices()[0].device_kind)"
    name = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout.strip()
    return ", ".join([name, *found, time.strftime("%Y-%m-%d")])


def main() -> int:
    """The command: returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure GPT-2 on a GPU.")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try whether all runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="how long all of it may take")
    parser.add_argument("--only", metavar="NAMES", help=f"only these parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        part(given.part, given.small)
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    wanted = given.only.split(",") if given.only else list(PARTS)
    chosen = {name: PARTS[name] for name in wanted if all(map(find_spec, PARTS[name][0]))}
    rows, end = [], time.monotonic() + given.minutes * 60
    with Path(os.environ.get("OUT", os.devnull), *["gpu.jsonl"] * ("OUT" in os.environ)).open("a") as log:
        while chosen:
            name, left = next(iter(chosen)), end - time.monotonic()
            share = left * chosen[name][1] / sum(share for _, share in chosen.values())  # with what others have left
            rows += measured(name, given.small, share, log)
            del chosen[name]
    print(table(rows))
    print(environment())
    return 0 if any("value" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
