"""Checkpoints of every format: found, named and opened; loaded by the three frameworks, and saved."""

from gpt2_multi.model.checkpoint.checkpoint import Checkpoint as Checkpoint
from gpt2_multi.model.checkpoint.checkpoint import Own as Own
from gpt2_multi.model.checkpoint.checkpoint import open as open
from gpt2_multi.model.checkpoint.checkpoint import read_config as read_config
from gpt2_multi.model.checkpoint.checkpoint import read_weights as read_weights
from gpt2_multi.model.checkpoint.loading import Loaded as Loaded
from gpt2_multi.model.checkpoint.loading import load as load
from gpt2_multi.model.checkpoint.loading import load_state as load_state
from gpt2_multi.model.checkpoint.loading import two_dtypes as two_dtypes
from gpt2_multi.model.checkpoint.loading import warn_of_fresh as warn_of_fresh
from gpt2_multi.model.checkpoint.programs import Programs as Programs
from gpt2_multi.model.checkpoint.programs import said_by as said_by
from gpt2_multi.model.checkpoint.quantized import Quantized as Quantized
from gpt2_multi.model.checkpoint.saving import is_model_file as is_model_file
from gpt2_multi.model.checkpoint.saving import save as save
from gpt2_multi.model.checkpoint.saving import upload as upload
from gpt2_multi.model.checkpoint.saving import write_weights as write_weights
from gpt2_multi.model.checkpoint.source import find as find
from gpt2_multi.model.checkpoint.source import head_of as head_of
