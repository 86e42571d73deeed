"""The files of a tokenizer, read and written."""

from gpt2_multi.tokenizer.files.around import Piece as Piece
from gpt2_multi.tokenizer.files.around import flagged as flagged
from gpt2_multi.tokenizer.files.folder import read_folder as read_folder
from gpt2_multi.tokenizer.files.folder import read_merges as read_merges
from gpt2_multi.tokenizer.files.folder import read_vocab as read_vocab
from gpt2_multi.tokenizer.files.folder import write_folder as write_folder
from gpt2_multi.tokenizer.files.folder import write_vocabulary as write_vocabulary
from gpt2_multi.tokenizer.files.parts import GPT2_PARTS as GPT2_PARTS
from gpt2_multi.tokenizer.files.parts import Parts as Parts
from gpt2_multi.tokenizer.files.steps import GPT2_STEPS as GPT2_STEPS
from gpt2_multi.tokenizer.files.steps import Steps as Steps
from gpt2_multi.tokenizer.files.tokenizer_json import read_tokenizer_json as read_tokenizer_json
from gpt2_multi.tokenizer.files.tokenizer_json import to_tokenizer_json as to_tokenizer_json
from gpt2_multi.tokenizer.files.vocabulary import ROLES as ROLES
from gpt2_multi.tokenizer.files.vocabulary import AddedToken as AddedToken
from gpt2_multi.tokenizer.files.vocabulary import Vocabulary as Vocabulary
from gpt2_multi.tokenizer.files.vocabulary import check_merges as check_merges
from gpt2_multi.tokenizer.files.vocabulary import check_vocab as check_vocab
