"""LiteLLM's provider for self-hosted vLLM. Arguments: the server's URL."""

import sys

import litellm

litellm.telemetry = False
asked = {"model": "hosted_vllm/demo", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "num_retries": 0}
chat = [{"role": "user", "content": "Speak, Romeo."}]

answer = litellm.completion(messages=chat, max_tokens=12, temperature=0, **asked)
assert answer.usage.completion_tokens == 12
pieces = litellm.completion(messages=chat, max_tokens=12, temperature=0, stream=True, **asked)
text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
assert text == answer.choices[0].message.content
whole = litellm.text_completion(prompt="ROMEO:", max_tokens=5, **asked)
assert whole.choices[0].text
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 5000}], **asked)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("LiteLLM did not know the error of a full context")
print("ok")
