"""From the texts of a call to rows of tokens: how texts are read, cut, filled up, and what is said of each token."""

from gpt2_multi.tokenizer.encoding.results import BatchEncoding as BatchEncoding
from gpt2_multi.tokenizer.encoding.results import Encoding as Encoding
