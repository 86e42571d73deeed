"""What a GPT-2 is, and how its files hold it."""
