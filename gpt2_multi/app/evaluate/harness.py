"""A model for EleutherAI's lm_eval, under the name gpt2_multi: `--model_args pretrained=gpt2,backend=flax`.

Versions of lm_eval that look for entry points find it by themselves; `gpt2-multi lm-eval` runs the command line of any
version with it. What lm_eval lacks, or has otherwise, is as in its own class for transformers' models.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gpt2_multi.app.evaluate.scorer import Scorer, Source
from gpt2_multi.errors import InputError, nearest
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.scoring import Window
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

LOGGER = logging.getLogger(__name__)
DEVICE = "cuda:0"  # what lm_eval's command line says where nobody names a device: the fastest there is
Pair = tuple[Any, list[int], list[int]]  # of a request: its key, the ids before, and those that are scored


@register_model("gpt2_multi")
class GPT2MultiLM(TemplateLM):
    """A GPT-2 on one of three backends.

    pretrained: "demo", a folder, or a name on the hub. batch_size: rows that are read at once, or "auto": as many as
    their lengths allow. max_length: tokens that are read at once, by default all that the model can. max_gen_toks: of
    an answer, where the task says nothing.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_known(unknown)
        self.batch_size = size_of(batch_size, max_batch_size)
        device = None if device == DEVICE else device
        self.scorer: Scorer = Source(str(pretrained), backend, device, dtype, quantize, self.batch_size).load()
        LOGGER.info("%s computes on %s", self.scorer.row.title, self.scorer.device)
        self.tokenizer = GPT2Tokenizer.from_pretrained(pretrained)  # in which a control token is one, as in lm_eval's
        most = self.scorer.config.n_positions
        if max_length is not None and not 2 <= max_length <= most:
            raise InputError(f"max_length: expected 2 to {most}, which the model can read, found {max_length}")
        self.max_length, self.max_gen_toks = max_length or most, max_gen_toks
        self._device, self.name = self.scorer.device, str(pretrained)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"{self.name}: the tokenizer has no eos_token, which lm_eval needs; set it")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that texts stand after."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer, and the template of its chats, from others."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; GPT-2 puts nothing around it."""
        return list(self.tokenizer(string).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the text that the model reads."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """Of each pair the log-probability of the ids scored, and whether greedy choice gives them."""
        found: dict[int, tuple[float, bool]] = {}
        windows = [self._window(i, before, after) for i, (_, before, after) in enumerate(requests)]
        answers = self.scorer.answers(windows)
        for i, (log_probs, best) in tqdm(answers, "Running loglikelihood requests", len(windows), disable=disable_tqdm):
            found[i] = float(log_probs.sum()), bool(best.all())
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def _window(self, number: int, before: list[int], after: list[int]) -> Window:
        if not 1 <= len(after) <= self.max_length:
            raise InputError(f"continuation: expected 1 to {self.max_length} tokens, found {len(after)}")
        ids = [*before, *after][-self.max_length - 1 :]
        return Window(number, ids, len(ids) - len(after))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows that do not overlap but for one token."""
        given = [request.args[0] for request in requests]
        rows = [self._rolling(text) for text in given]
        pairs = [(None, *make_disjoint_window(pair)) for row in rows for pair in row]
        found = iter(self._loglikelihood_tokens(pairs, disable_tqdm))
        totals = [sum(total for total, _ in islice(found, len(row))) for row in rows]
        for text, total in zip(given, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _rolling(self, text: str) -> list[Any]:
        ids = self.tok_encode(text)
        return list(get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each prompt, up to a string; samples have a seed each, whatever the batches are."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for rows in groups.values():
                options = requests[rows[0]].args[1]
                for batch in batched(rows, self.batch_size or 8):
                    answers = self._written([requests[i].args[0] for i in batch], batch, options)
                    for i, answer in zip(batch, answers, strict=True):
                        found[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _written(self, prompts: Sequence[str], numbers: Sequence[int], given: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(given, default_max_gen_toks=self.max_gen_toks))
        until, new = options.pop("until") or [], options.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise InputError(
                f"max_gen_toks: expected less than {self.max_length}, which the model can read, found {new}"
            )
        if not options["do_sample"]:
            options.pop("temperature", None)
        config = self.scorer.model.generation_config.with_options(
            {"num_return_sequences": 1, "return_dict_in_generate": False, "stop_strings": until or None, **options}
        )
        config = replace(
            config, max_new_tokens=new, max_length=None, seed=[(options.get("seed") or 0) + i for i in numbers]
        )
        rows = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        return [postprocess_generated_text(text, until, None) for text in self._continued(rows, config)]

    def _continued(self, rows: list[list[int]], config: GenerationConfig) -> list[str]:
        row, model = self.scorer.row, self.scorer.model
        ids, mask = texts.pad(rows)
        output = model.generate(
            row.to_tensor(model, ids),
            attention_mask=row.to_tensor(model, mask),
            generation_config=config,
            tokenizer=self.tokenizer,
        )
        made = row.to_numpy(output)[:, ids.shape[1] :].tolist()
        ends = texts.trim(made, self.tokenizer, config, model.config)
        return [self.tokenizer.decode(end, skip_special_tokens=True) for end in ends]


def check_known(unknown: Iterable[str]) -> None:
    """InputError for arguments that there are not."""
    known = [name for name in inspect.signature(GPT2MultiLM).parameters if name != "unknown"]
    for name in unknown:
        advice = nearest(name, known) or f"; there are {', '.join(known)}"
        raise InputError(f"model_args: {name!r} is none of the arguments of gpt2_multi{advice}")


def size_of(batch_size: int | str, most: int | None) -> int | None:
    """How many rows are read at once; None for as many as their lengths allow."""
    if str(batch_size).partition(":")[0] == "auto":
        return most
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise InputError(f'batch_size: expected a number from 1, or "auto", found {batch_size!r}')
    return int(batch_size)


def batched(rows: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    """So many at once."""
    return (rows[i : i + size] for i in range(0, len(rows), size))


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's command line, in which this model has a name."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
