"""Ask a server of ours by OpenAI's own client: whole texts, streams, log-probabilities, many at once, and refusals."""

import asyncio
import re
import subprocess
import sys

from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types import Completion

from gpt2_multi import GPT2LMHeadModel, GPT2Tokenizer

PROMPT = "ROMEO:"


def text_of(completion: Completion) -> str:
    """The text of the first choice."""
    return completion.choices[0].text


def check(url: str) -> None:
    """Ask for what a program asks for, one after the other."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none is asked for here", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"

    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, seed=3, n=2, stop=["\n\n"])
    assert found.object == "text_completion" and found.system_fingerprint
    assert [choice.index for choice in found.choices] == [0, 1]
    assert {choice.finish_reason for choice in found.choices} <= {"stop", "length"}
    assert found.usage and found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens

    options = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "seed": 3}
    whole = text_of(client.completions.create(**options))
    tokenizer, model = GPT2Tokenizer.from_pretrained("demo"), GPT2LMHeadModel.from_pretrained("demo")
    sampling = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": 12}
    assert PROMPT + whole == model.generate(PROMPT, tokenizer=tokenizer, **sampling)

    *pieces, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(map(text_of, pieces)) == whole and pieces[-1].choices[0].finish_reason == "length"
    assert not last.choices and last.usage and last.usage.completion_tokens == 12

    scored = client.completions.create(model="demo", prompt="To be", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert scored.text == "To be" and scored.logprobs and scored.logprobs.token_logprobs
    assert scored.logprobs.token_logprobs[0] is None and scored.logprobs.token_logprobs[-1] < 0

    chosen = client.completions.create(**options, extra_body={"top_k": 1})
    assert text_of(chosen) == text_of(client.completions.create(**{**options, "temperature": 0}))

    for wrong, field in (({"max_tokens": 5000}, "prompt"), ({"suffix": "b"}, "suffix"), ({"logprobs": 9}, "logprobs")):
        try:
            client.completions.create(**{**options, **wrong})
        except BadRequestError as error:
            assert error.param == field, error
        else:
            raise AssertionError(f"{wrong} is not refused")
    try:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Who art thou?"}])
    except NotFoundError as error:
        assert "no chat" in error.message
    else:
        raise AssertionError("a chat is not refused")


async def check_many(url: str) -> None:
    """What each gets does not depend on who else asks."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    asked = [client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, seed=seed) for seed in range(16)]
    together = [text_of(found) for found in await asyncio.gather(*asked)]
    alone = [
        text_of(await client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, seed=seed))
        for seed in range(16)
    ]
    assert together == alone and len(set(together)) == 16


with subprocess.Popen(
    [sys.executable, "-m", "gpt2_multi", "serve", "--port", "0", "--backend", "pt"], stdout=subprocess.PIPE, text=True
) as server:
    try:
        assert server.stdout
        address = re.search(r"http://[\d.:]+", server.stdout.readline())
        assert address, "the server did not begin"
        check(address[0])
        asyncio.run(check_many(address[0]))
    finally:
        server.terminate()
assert server.returncode == 0, server.returncode
print("OpenAI's client reads our answers, streams and refusals")
