"""The official client, as its own documentation uses it. Arguments: the server's URL."""

import asyncio
import sys
from typing import Literal

import openai
from pydantic import BaseModel

url = f"{sys.argv[1]}/v1"
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
CHAT = [{"role": "user", "content": "Speak, Romeo."}]

model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model

whole = client.completions.create(model=model, prompt="ROMEO:", max_tokens=12, temperature=0)
assert whole.usage.completion_tokens == 12
pieces = client.completions.create(model=model, prompt="ROMEO:", max_tokens=12, temperature=0, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text

answer = client.chat.completions.create(
    model=model, messages=CHAT, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=3, seed=1, n=2
)
assert [choice.index for choice in answer.choices] == [0, 1]
found = answer.choices[0].logprobs.content[0]
assert len(found.top_logprobs) == 3
assert bytes(found.bytes).decode("utf-8", "replace") == found.token

with client.chat.completions.stream(model=model, messages=CHAT, max_tokens=200, stop=[" ", "\n", "."]) as stream:
    kinds = {event.type for event in stream}
    final = stream.get_final_completion()
assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
assert final.choices[0].finish_reason == "stop"


class Verdict(BaseModel):
    """What the model must answer."""

    guilty: bool
    house: Literal["Montague", "Capulet"]


parsed = client.chat.completions.parse(model=model, messages=CHAT, response_format=Verdict, max_tokens=200)
assert isinstance(parsed.choices[0].message.parsed, Verdict)
with client.chat.completions.stream(
    model=model, messages=CHAT, response_format=Verdict, max_tokens=200, stream_options={"include_usage": True}
) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.parsed.house in ("Montague", "Capulet")
assert final.usage.completion_tokens > 0

try:
    client.completions.create(model="gpt", prompt="Hi")
    message = "no error"
except openai.NotFoundError as error:
    message = error.message
assert "does not exist" in message, message


async def many() -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as own:
        answers = await asyncio.gather(
            *(own.completions.create(model=model, prompt=f"Scene {i}:", max_tokens=5) for i in range(8))
        )
        assert all(answer.choices[0].finish_reason in ("length", "stop") for answer in answers)


asyncio.run(many())
print("ok", openai.__version__)
