"""Rule N1: greedy output in float32 equals a reference's, token for token.

One teacher-forced pass of the reference over prompt + output: its argmax at every position must be the token emitted,
and its log-probability the one reported. Positions where the reference's own best two differ by less than 1e-5 are
left out and counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fairlead import LLM, SamplingParams

MARGIN = 1e-5
TOLERANCE = 1e-4

Reference = Callable[[torch.Tensor], torch.Tensor]
"""Token ids (1, T) to logits (1, T, V)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """What a comparison found. `distinct` is the mean share of distinct tokens in an output."""

    num_checked: int
    num_left_out: int
    num_wrong: int
    worst_logprob: float
    distinct: float

    @property
    def holds(self) -> bool:
        """Whether every token agrees, all log-probabilities do, and near-ties are rare."""
        few = self.num_left_out <= self.num_checked / 10_000 + 1
        return self.num_wrong == 0 and self.worst_logprob <= TOLERANCE and few


def transformers_reference(directory: Path, attention: str = "eager") -> Reference:
    """transformers' model of a checkpoint in float32, with one of its attention implementations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    model.requires_grad_(False)

    def logits(ids_1T: torch.Tensor) -> torch.Tensor:
        logits_1TV: torch.Tensor = model(ids_1T, use_cache=False).logits
        return logits_1TV

    return logits


def prompts_for(vocab_size: int, num_prompts: int, longest: int) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, among them those around block borders."""
    rng = np.random.default_rng(num_prompts)
    lengths = [n for n in (1, longest, 17, 16, 33, 15, 2, 32, 31) if n <= longest][:num_prompts]
    lengths += rng.integers(1, longest + 1, size=num_prompts - len(lengths)).tolist()
    return [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]


def compare_greedy(
    directory: Path, reference: Reference, prompts: list[list[int]], num_new: int, **settings: Any
) -> Equality:
    """Generates for all prompts at once and compares with the reference."""
    inputs: list[Mapping[str, Any]] = [{"prompt_token_ids": p} for p in prompts]
    longest = max(map(len, prompts)) + num_new
    llm = LLM(str(directory), dtype="float32", skip_tokenizer_init=True, **{"max_model_len": longest, **settings})
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0, detokenize=False)
    try:
        outputs = llm.generate(inputs, params, use_tqdm=False)
    finally:
        llm.close()
    num_left_out = num_wrong = 0
    worst = 0.0
    for output in outputs:
        completion = output.outputs[0]
        ids = [*output.prompt_token_ids, *completion.token_ids]
        with torch.inference_mode():
            logits_TV = reference(torch.tensor([ids]))[0, len(output.prompt_token_ids) - 1 : -1].float()
        best_T2, logprobs_TV = logits_TV.topk(2).values, logits_TV.log_softmax(-1)
        assert completion.logprobs is not None
        for i, token_id in enumerate(completion.token_ids):
            error = abs(completion.logprobs[i][token_id].logprob - logprobs_TV[i, token_id].item())
            worst = max(worst, error)
            if best_T2[i, 0] - best_T2[i, 1] < MARGIN:
                num_left_out += 1
            elif token_id != logits_TV[i].argmax().item():
                num_wrong += 1
    return Equality(
        num_checked=len(prompts) * num_new,
        num_left_out=num_left_out,
        num_wrong=num_wrong,
        worst_logprob=worst,
        distinct=float(np.mean([len(set(o.outputs[0].token_ids)) / num_new for o in outputs])),
    )
