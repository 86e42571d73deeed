"""The parts of a tokenizer that only a tokenizer.json can say; without it, they are GPT-2's own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpt2_multi.tokenizer.files.around import NOTHING_AROUND, Around
from gpt2_multi.tokenizer.files.steps import GPT2_STEPS, Steps


@dataclass(frozen=True)
class Parts:
    """What is done to texts before they are merged and after it, whether a word of the vocabulary is merged, and what
    stands for a byte that the vocabulary does not hold, if it is not the unk_token of the settings.
    """

    steps: Steps = GPT2_STEPS
    around: Around = NOTHING_AROUND
    ignore_merges: bool = False
    unk_token: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> tuple["Parts", bool]:
        """The parts that tokenizer.json describes, and whether a space is put before each part of a text.

        Raises:
            TokenizerError: one of them is not known here.
            KeyError, TypeError, AttributeError, ValueError: the file is damaged.
        """
        steps, prefix = Steps.of(data.get("normalizer"), data.get("pre_tokenizer"))
        model = data.get("model") or {}
        around, ignores = Around.of(data.get("post_processor")), bool(model.get("ignore_merges"))
        return cls(steps, around, ignores, model.get("unk_token") or None), prefix

    @property
    def are_gpt2(self) -> bool:
        """Whether vocab.json, merges.txt and settings say all that there is to say."""
        return replace(self, around=NOTHING_AROUND) == GPT2_PARTS and not self.around.has_tokens

    def to_json(self, prefix: bool) -> dict[str, Any]:
        """What tokenizer.json says of them."""
        model = {"ignore_merges": self.ignore_merges, "unk_token": self.unk_token}
        return {**self.steps.to_json(prefix), "post_processor": self.around.to_json(), "model": model}


GPT2_PARTS = Parts()
