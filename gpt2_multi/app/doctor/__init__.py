"""Does this machine compute GPT-2 rightly: the check, and the comparison of logits that it makes."""
