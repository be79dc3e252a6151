"""LangChain's OpenAI classes. Arguments: the server's URL."""

import sys

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url = f"{sys.argv[1]}/v1"


class Verdict(BaseModel):
    """What the model must answer."""

    guilty: bool


chat = ChatOpenAI(model="demo", base_url=url, api_key="none", max_tokens=12, temperature=0, max_retries=0)
answer = chat.invoke([("system", "Be brief."), ("user", "Speak, Romeo.")])
assert answer.content
assert answer.usage_metadata["output_tokens"] == 12
chunks = chat.stream([("system", "Be brief."), ("user", "Speak, Romeo.")])
assert "".join(chunk.content for chunk in chunks) == answer.content
assert len(chat.batch(["One", "Two", "Three"])) == 3

strict = ChatOpenAI(model="demo", base_url=url, api_key="none", max_tokens=200, max_retries=0)
verdict = strict.with_structured_output(Verdict, method="json_schema").invoke("Is he guilty?")
assert isinstance(verdict, Verdict)

llm = OpenAI(model="demo", base_url=url, api_key="none", max_tokens=12, temperature=0, max_retries=0)
text = llm.invoke("ROMEO:")
assert text
assert "".join(llm.stream("ROMEO:")) == text
print("ok")
