"""Equality with transformers: the check of promise N1, and how to draw a model's weights so that it means something.

One teacher-forced pass of the reference over prompt + output: its argmax at every position must be the token emitted,
and its log-probability the one reported. Positions where the reference's own best two differ by less than MARGIN are
left out and counted.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fairlead.engine.llm import LLM
from fairlead.request import RequestOutput, SamplingParams

MARGIN = 1e-5
LOGPROB_TOLERANCE = 1e-4
MAX_PROMPT = 300


@dataclass(kw_only=True)
class Reference:
    """A checkpoint with transformers' float32 model of it."""

    name: str
    directory: Path
    model: Any
    num_left_out: int = 0
    num_checked: int = 0
    checked: set[tuple[int, ...]] = field(default_factory=set)

    def logits(self, token_ids: tuple[int, ...] | list[int], **inputs: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) of every position."""
        with torch.inference_mode():
            logits_TV: torch.Tensor = self.model(torch.tensor([token_ids]), use_cache=False, **inputs).logits[0].float()
        return logits_TV

    def check(self, output: RequestOutput) -> None:
        """Asserts that each token is the reference's argmax, with its log-probability."""
        completion = output.outputs[0]
        ids = (*output.prompt_token_ids, *completion.token_ids)
        if ids in self.checked:
            return
        self.checked.add(ids)
        logits_TV = self.logits(ids)[len(output.prompt_token_ids) - 1 : -1]
        best_T2 = logits_TV.topk(2).values
        logprobs_TV = logits_TV.log_softmax(-1)
        assert completion.logprobs is not None
        for i, token_id in enumerate(completion.token_ids):
            error = abs(completion.logprobs[i][token_id].logprob - logprobs_TV[i, token_id].item())
            assert error <= LOGPROB_TOLERANCE, f"token {i} of {len(ids)}: log-probability off by {error:.2e}"
            self.num_checked += 1
            if best_T2[i, 0] - best_T2[i, 1] < MARGIN:
                self.num_left_out += 1
            else:
                assert token_id == logits_TV[i].argmax().item(), f"token {i} of prompt length {len(ids)}"

    def report(self) -> None:
        """Prints the counts; asserts that at most one position in 10,000 was a near-tie."""
        print(f"{self.name}: {self.num_checked} positions checked, {self.num_left_out} near-ties left out")
        assert self.num_left_out <= self.num_checked / 10_000 + 1


def prompts_for(vocab_size: int, count: int) -> list[list[int]]:
    """Prompts of 1 to MAX_PROMPT tokens, among them the lengths around block borders as far as `count` allows."""
    rng = np.random.default_rng(count)
    lengths = [MAX_PROMPT, 1, 16, 17, 33, 2, 15, 31, 32][:count]
    lengths += rng.integers(1, MAX_PROMPT + 1, size=count - len(lengths)).tolist()
    return [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]


def logits_of(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    """Our logits (T, V) of every position of a prompt that fits into one step."""
    model: Any = llm.engine._runner.model  # no public way leads to the hidden states
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda module, args, hidden_TE: seen.append(hidden_TE))
    try:
        llm.generate([token_ids], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    finally:
        hook.remove()
    assert len(seen[0]) == len(token_ids)
    with torch.inference_mode():
        logits_TV: torch.Tensor = model.logits(seen[0])
    return logits_TV


def redraw(
    model: Any, *, seed: int, norms_less_one: bool = False, embedding_scale: float = 1.0, gain: float = 1.5
) -> None:
    """Draws all weights of a transformers model anew, so that outputs vary and a wrong position or head shows.

    Inputs of variance 1 keep about that variance, and attention scores spread by about 4. `norms_less_one` is for
    norms whose weight is stored less one, `embedding_scale` for models that multiply their embeddings by that. `gain`
    is that of a matrix: the larger, the more outputs vary, and the more rounding errors grow on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors |= {name: t for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.empty(tensor.shape).normal_(generator=generator)
            tensor.copy_(_drawn(name, noise, norms_less_one, embedding_scale, gain))


def _drawn(name: str, noise: torch.Tensor, norms_less_one: bool, embedding_scale: float, gain: float) -> torch.Tensor:
    layer, leaf = name.split(".")[-2:] if "." in name else ("", name)
    if leaf == "e_score_correction_bias":
        return noise * 0.1
    if leaf == "bias":
        return noise * (0.1 if "norm" in layer else 0.5)
    if layer in ("embed_tokens", "lm_head"):
        # Rows of equal length: else the longest ones win almost every step.
        rows = functional.normalize(noise, dim=1) * (math.sqrt(noise.shape[1]) / 2)
        return rows / (embedding_scale if layer == "embed_tokens" else 1.0)
    if noise.dim() == 1:
        mean = 4.0 if "q_norm" in name or "q_layernorm" in name else 1.0
        # The final norm has both signs: else a tied head, whose rows are the embeddings, repeats the last token.
        weight = noise.sign() if name == "model.norm.weight" else mean + 0.2 * noise
        return weight - 1.0 if norms_less_one else weight
    if layer in ("q_proj", "qkv_proj", "q_b_proj"):
        gain *= 2
    return noise * (gain / math.sqrt(noise.shape[-1]))
