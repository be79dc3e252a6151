"""Promise N1: greedy output in float32 equals that of an independent reference, token for token.

One teacher-forced pass of the reference over prompt + output: its argmax at every position must be the token emitted,
and its log-probability the one reported. Positions where the reference's own best two differ by less than MARGIN are
left out, counted and printed. Shapes: T tokens, E model width, H heads, D head size, V vocabulary.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fairlead.engine.llm import LLM
from fairlead.layers.attention import Attention
from fairlead.request import EngineStats, RequestOutput, SamplingParams

MARGIN = 1e-5
TOLERANCE = 1e-4  # of logits and log-probabilities
MAX_PROMPT = 300


@dataclass(kw_only=True)
class Reference:
    """What a checkpoint must give: `logits` turns token ids (1, T) into logits (1, T, V), in float32."""

    directory: Path
    logits: Callable[[torch.Tensor], torch.Tensor]
    num_left_out: int = 0
    num_checked: int = 0
    worst_logprob: float = 0.0
    checked: set[tuple[int, ...]] = field(default_factory=set)

    @classmethod
    def of_transformers(cls, directory: Path, attention: str = "eager") -> "Reference":
        """transformers' model of a checkpoint, with one of its attention implementations."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention
        )
        return cls.of_model(directory, model)

    @classmethod
    def of_model(cls, directory: Path, model: Any) -> "Reference":
        """A model of transformers that is loaded already."""
        return cls(directory=directory, logits=lambda ids_1T: model(ids_1T, use_cache=False).logits.float())

    def logits_of(self, token_ids: list[int] | tuple[int, ...]) -> torch.Tensor:
        """Logits (T, V) of every position."""
        with torch.inference_mode():
            return self.logits(torch.tensor([token_ids]))[0]

    def check(self, output: RequestOutput) -> None:
        """Asserts that each token is the reference's argmax, with its log-probability."""
        completion = output.outputs[0]
        ids = (*output.prompt_token_ids, *completion.token_ids)
        if ids in self.checked:
            return
        logits_TV = self.logits_of(ids)[len(output.prompt_token_ids) - 1 : -1]
        best_T2, logprobs_TV = logits_TV.topk(2).values, logits_TV.log_softmax(-1)
        assert completion.logprobs is not None
        for i, token_id in enumerate(completion.token_ids):
            where = f"token {i} after a prompt of {len(output.prompt_token_ids)}"
            error = abs(completion.logprobs[i][token_id].logprob - logprobs_TV[i, token_id].item())
            self.worst_logprob = max(self.worst_logprob, error)
            assert error <= TOLERANCE, f"{where}: log-probability off by {error:.2e}"
            self.num_checked += 1
            if best_T2[i, 0] - best_T2[i, 1] < MARGIN:
                self.num_left_out += 1
            else:
                assert token_id == logits_TV[i].argmax().item(), where
        self.checked.add(ids)


def prompts_for(vocab_size: int, num_prompts: int, longest: int = MAX_PROMPT) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, among them those around block borders as far as the number allows."""
    rng = np.random.default_rng(num_prompts)
    lengths = [n for n in (longest, 1, 16, 17, 33, 2, 15, 31, 32) if n <= longest][:num_prompts]
    lengths += rng.integers(1, longest + 1, size=num_prompts - len(lengths)).tolist()
    return [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]


def open_llm(directory: Path, max_model_len: int, **settings: Any) -> LLM:
    """An engine in float32 that takes token ids."""
    return LLM(str(directory), dtype="float32", skip_tokenizer_init=True, max_model_len=max_model_len, **settings)


def check_greedy(
    reference: Reference,
    prompts: list[list[int]],
    num_new: int,
    *,
    rounds: int = 1,
    least_distinct: float = 0.5,
    **settings: Any,
) -> EngineStats:
    """Asserts N1: submits all prompts at once, `rounds` times, and checks every output. Returns the engine's counters.

    Of the first 64 tokens of an output at least the share `least_distinct` must be distinct, on average.
    """
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0, detokenize=False)
    with _opened(reference.directory, max(map(len, prompts)) + num_new, **settings) as llm:
        outputs = [o for _ in range(rounds) for o in llm.generate(prompts, params, use_tqdm=False)]
        stats = llm.engine.stats()
        assert stats.kv_cache_usage == 0
        llm.engine.scheduler.check_integrity()
    for output in outputs:
        assert len(output.outputs[0].token_ids) == num_new
        reference.check(output)
    firsts = [output.outputs[0].token_ids[:64] for output in outputs]
    distinct = float(np.mean([len(set(ids)) / len(ids) for ids in firsts]))
    print(
        f"{reference.num_checked} positions checked, {reference.num_left_out} near-ties left out, "
        f"log-probabilities off by {reference.worst_logprob:.1e} at most, {distinct:.0%} of the tokens distinct"
    )
    assert reference.num_left_out <= reference.num_checked / 10_000, "near-ties hide too much"
    assert distinct >= least_distinct, f"only {distinct:.0%} of the tokens are distinct: a fault might not show"
    return stats


def check_logits(reference: Reference, prompt: list[int]) -> None:
    """Asserts that our logits of every position of a prompt are the reference's."""
    with _opened(reference.directory, len(prompt) + 1, max_num_batched_tokens=len(prompt)) as llm:
        torch.testing.assert_close(_logits(llm, prompt), reference.logits_of(prompt), atol=TOLERANCE, rtol=0)


def check_faults_show(
    reference: Reference, prompt: list[int], *, has_positions: bool = True, is_windowed: bool = False
) -> None:
    """Asserts that an engine with a wrong position, head or window gives other tokens than the reference.

    `has_positions` is False for models that are told no positions: ALiBi sees distances.
    """
    right_T = reference.logits_of(prompt).argmax(-1)

    def shows(llm: LLM) -> bool:
        return bool((_logits(llm, prompt).argmax(-1) != right_T).any())

    model: Any
    with _opened(reference.directory, len(prompt) + 2, max_num_batched_tokens=len(prompt)) as llm:
        model = llm.engine._runner.model
        assert not shows(llm)
        if has_positions:
            with _hooked(model.register_forward_pre_hook(_move_positions)):
                assert shows(llm), "a wrong position does not show"
        layer = next(module for module in model.modules() if isinstance(module, Attention))
        with _hooked(layer.register_forward_hook(_swap_heads)):
            assert shows(llm), "a wrong head does not show"
    if is_windowed:
        with _wider_window(reference.directory) as directory, _opened(directory, len(prompt) + 1) as llm:
            assert shows(llm), "a wrong window does not show"


def _move_positions(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    token_ids_T, positions_T, step = args
    return token_ids_T, positions_T + (positions_T >= len(positions_T) // 3), step


def _swap_heads(module: torch.nn.Module, args: tuple[Any, ...], out_THD: torch.Tensor) -> torch.Tensor:
    return torch.cat((out_THD[:, 1:2], out_THD[:, :1], out_THD[:, 2:]), 1)


def _logits(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Our logits (T, V) of every position of a prompt, computed in one step without the cache."""
    model: Any = llm.engine._runner.model  # no public way leads to the hidden states
    seen: list[torch.Tensor] = []
    llm.reset_prefix_cache()
    with _hooked(model.register_forward_hook(lambda module, args, hidden_TE: seen.append(hidden_TE))):
        llm.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    assert len(seen[0]) == len(prompt)
    with torch.inference_mode():
        logits_TV: torch.Tensor = model.logits(seen[0])
    return logits_TV


@contextmanager
def _opened(directory: Path, max_model_len: int, **settings: Any) -> Iterator[LLM]:
    llm = open_llm(directory, max_model_len, **settings)
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _wider_window(directory: Path) -> Iterator[Path]:
    """The checkpoint with a sliding window that is 8 tokens wider."""
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.iterdir():
            (Path(folder) / file.name).symlink_to(file)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["sliding_window"] += 8
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(folder)
