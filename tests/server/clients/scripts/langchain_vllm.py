"""LangChain's VLLM class, which imports vllm itself, on Fairlead through the alias. No server."""

import fairlead.compat.vllm  # noqa: I001  (before anything looks for vllm)
from langchain_community.llms import VLLM

llm = VLLM(model="demo", trust_remote_code=False, max_new_tokens=12, top_k=10, top_p=0.95, temperature=0.8)
assert llm.invoke("ROMEO:")
found = llm.generate(["ROMEO:", "JULIET:"], stop=["\n"])
assert len(found.generations) == 2
llm.client.close()
print("ok", fairlead.compat.vllm.__version__)
