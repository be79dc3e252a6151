"""What evaluation harnesses send, against transformers in float32: token ids, echo, logprobs=1, max_tokens=1."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from fairlead import demo

ASKED = {"model": "demo", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}


@pytest.fixture(scope="module")
def client(start_module_server: Callable[..., Any]) -> Iterator[httpx.Client]:
    server = start_module_server("demo", "--port", "0", "--dtype", "float32")
    with httpx.Client(base_url=server.wait_for_url(120), timeout=120) as made:
        yield made


def test_loglikelihoods_equal_transformers(client: httpx.Client, count: Callable[..., int]) -> None:
    """The prompts of a batch share a request, as harnesses send them; their tokens come from /tokenize."""
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"]
    assert "messages" in info["chat_template"]
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    vocab_size = model.config.vocab_size
    draw = random.Random(0)
    text = client.post("/tokenize", json={"prompt": "ROMEO: But soft, what light through yonder window breaks?"}).json()
    worst = 0.0
    num = count(20, full=200)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randrange(2, 60))] for _ in range(num - 1)]
    prompts.append(text["tokens"])
    for start in range(0, num, 10):
        batch = prompts[start : start + 10]
        answer = client.post("/v1/completions", json={**ASKED, "prompt": batch}).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(batch)))
        for prompt, choice in zip(batch, answer["choices"], strict=True):
            with torch.inference_mode():
                expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), dim=-1)
            found = choice["logprobs"]
            assert len(found["token_logprobs"]) == len(found["tokens"]) == len(found["top_logprobs"]) == len(prompt) + 1
            assert found["token_logprobs"][0] is None
            for i in range(1, len(prompt)):
                worst = max(worst, abs(found["token_logprobs"][i] - float(expected[i - 1, prompt[i]])))
                best = max(found["top_logprobs"][i].values())
                worst = max(worst, abs(best - float(expected[i - 1].max())))
                is_greedy = found["token_logprobs"][i] == best
                assert is_greedy == (int(expected[i - 1].argmax()) == prompt[i])
            worst = max(worst, abs(found["token_logprobs"][-1] - float(expected[-1].max())))
    print(f"{num} prompts, the largest difference is {worst:.2e}")
    assert worst <= 1e-4
