"""The options of a generation as the user says them: what each may be, and the configuration that holds them."""

from gpt2_multi.generation.config.settings import TASK as TASK
from gpt2_multi.generation.config.settings import Bias as Bias
from gpt2_multi.generation.config.settings import GenerationConfig as GenerationConfig
from gpt2_multi.generation.config.settings import as_generation_config as as_generation_config
from gpt2_multi.generation.config.settings import task_options as task_options
from gpt2_multi.generation.config.table import OPTIONS as OPTIONS
