"""Our classes as EleutherAI's lm_eval asks for a model; copy it to where you measure."""

from itertools import groupby

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel


class GPT2MultiLM(TemplateLM):
    """A GPT-2 as lm_eval asks: log-likelihoods of ends of texts, of whole texts, and greedy text up to a string."""

    def __init__(self, folder: str, batch_size: int = 8) -> None:
        super().__init__()
        self.tokenizer = GPT2Tokenizer.from_pretrained(folder)
        self.model = GPT2LMHeadModel.from_pretrained(folder).eval()
        self.length, self.batch_size = self.model.config.n_positions, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, **_) -> list[int]:
        return self.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Of (texts, ids before, ids scored) the log-probability of these, and whether greedy choice gives them."""
        results = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            rows = [(before + scored)[-self.length - 1 :] for _, before, scored in batch]
            inputs = self.tokenizer.pad({"input_ids": [row[:-1] for row in rows]}, return_tensors="pt")
            log_probs = self.model(**inputs.to(self.model.device)).logits.log_softmax(-1)
            for (_, _, scored), row, found in zip(batch, rows, log_probs, strict=True):
                ends = found[len(row) - 1 - len(scored) : len(row) - 1]  # padding is on the right
                ids = torch.tensor(scored, device=ends.device)
                total = ends.gather(-1, ids[:, None]).sum()
                results.append((float(total), bool((ends.argmax(-1) == ids).all())))
        return results

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.length, context_len=1)
            pairs = [(None, *make_disjoint_window(pair)) for pair in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests, **_) -> list[str]:
        texts = []
        for given, group in groupby((request.args for request in requests), key=lambda args: args[1]):
            options = normalize_gen_kwargs(given, default_max_gen_toks=64)
            until, new = options.pop("until"), options.pop("max_gen_toks")
            options = options if options["do_sample"] else {"do_sample": False}
            kept = [self.tok_encode(text)[new - self.length :] for text, _ in group]
            prompts = self.tokenizer.batch_decode(kept)
            limits = {"max_new_tokens": new, "stop_strings": until or None}
            answers = self.model.generate(prompts, tokenizer=self.tokenizer, **limits, **options)
            ends = [answer[len(prompt) :] for prompt, answer in zip(prompts, answers, strict=True)]
            texts += [min((end.partition(stop)[0] for stop in until), key=len, default=end) for end in ends]
        return texts
