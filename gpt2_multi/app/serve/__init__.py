"""A server of OpenAI's API, with a page to write in: the engine goes on with many texts at once."""
