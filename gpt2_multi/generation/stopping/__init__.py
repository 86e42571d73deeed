"""What tokens spell, whatever the tokenizer, and the strings among it that end a text."""

from gpt2_multi.generation.stopping.table import FOUND as FOUND
from gpt2_multi.generation.stopping.table import automaton as automaton
from gpt2_multi.generation.stopping.table import stop_table as stop_table
from gpt2_multi.generation.stopping.table import until_end as until_end
