"""Train the embedded demo model: a small Llama with its own tokenizer and chat template, from one file of plays.

    python examples/train_demo.py --text tinyshakespeare.txt --out demo

The output directory holds what `AutoModelForCausalLM` and `AutoTokenizer` load without a network. It is rewritten
whenever the validation loss improves, so that an interrupted run leaves its best model behind.

Shapes: N rows of a batch, T tokens of a row.
"""

# transformers annotates only a part of its functions.
# mypy: disable-error-code="no-untyped-call"

import argparse
import copy
import math
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCAB_SIZE = 1024
SHORT_ROW_TOKENS = 256
LONG_ROW_TOKENS = 1024

# System text opens the user turn that follows it. Content may be a string, null (an assistant message that only
# calls tools) or a list of parts, of which the text is read.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set pending = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}\
{%- set pending.system = pending.system + text(message.content) + '\\n\\n' -%}
{%- elif message.role in ['user', 'tool'] -%}{{ '<|user|>' + pending.system + text(message.content) + '<|end|>' }}
{%- set pending.system = '' -%}
{%- elif message.role == 'assistant' -%}{{ '<|assistant|>' + text(message.content) + '<|end|>' }}
{%- else -%}{{ raise_exception('Unknown role: ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if pending.system -%}{{ '<|user|>' + pending.system + '<|end|>' }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """What one speaker says at once; `start` is its offset in the text, in characters."""

    name: str
    words: str
    start: int

    def __str__(self) -> str:
        return f"{self.name}:\n{self.words}"


def find_speeches(text: str) -> list[Speech]:
    """Return the speeches in order: a line `NAME:` and the lines up to the next empty line."""
    pattern = re.compile(r"^([^\n:]{1,40}):\n(.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
    return [Speech(name=m[1], words=m[2].strip(), start=m.start()) for m in pattern.finditer(text)]


def train_bpe(text: str) -> Tokenizer:
    """Train byte-level BPE with all 256 bytes in the vocabulary, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def wrap_tokenizer(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Add what transformers saves beside the vocabulary: the special tokens' roles and the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=LONG_ROW_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class RowSampler:
    """Draws training rows: windows of the text, and chats made of consecutive speeches."""

    def __init__(self, text: str, bpe: Tokenizer, chat_share: float, noisy_share: float, rng: random.Random) -> None:
        self._text = text
        self._speeches = find_speeches(text)
        self._line_starts = [m.start() for m in re.finditer(r"^.", text, re.MULTILINE)]
        self._bpe = bpe
        # BPE dropout splits words in other ways each time, which teaches spelling from a text this small.
        # Source: Provilkov et al. 2020, "BPE-Dropout", section 3.
        self._noisy_bpe = Tokenizer.from_str(bpe.to_str())
        self._noisy_bpe.model.dropout = 0.1
        self._chat_share = chat_share
        self._noisy_share = noisy_share
        self._rng = rng

    def batch(self, num_rows: int, row_tokens: int) -> Tensor:
        """Return token ids of shape (N, T)."""
        return torch.tensor([self._row(row_tokens) for _ in range(num_rows)])

    def _row(self, row_tokens: int) -> list[int]:
        num_chars = 6 * row_tokens  # more than fills a row: a token has 2.4 characters on average
        text = self._chats(num_chars) if self._rng.random() < self._chat_share else self._window(num_chars)
        bpe = self._noisy_bpe if self._rng.random() < self._noisy_share else self._bpe
        return bpe.encode(text).ids[:row_tokens]

    def _window(self, num_chars: int) -> str:
        # Half of the windows begin with a speech, because prompts do: "ROMEO:" is to work at position 0.
        if self._rng.random() < 0.5:
            start = self._rng.choice(self._speeches).start
        else:
            start = self._rng.choice(self._line_starts)
        start = min(start, len(self._text) - num_chars)
        prefix = END_OF_TEXT if self._rng.random() < 0.1 else ""
        return prefix + self._text[start : start + num_chars]

    def _chats(self, num_chars: int) -> str:
        chats = ""
        while len(chats) < num_chars:
            chats += self._chat()
        return chats

    def _chat(self) -> str:
        """Return a chat of 2 to 6 turns; some open with the speeches before it, as with a system message."""
        num_turns = self._rng.choice((2, 2, 4, 6))
        first = self._rng.randrange(len(self._speeches) - num_turns)
        num_context = self._rng.choice((0, 0, 0, 1, 2))
        context = "".join(f"{speech}\n\n" for speech in self._speeches[max(0, first - num_context) : first])
        turns = self._speeches[first : first + num_turns]
        chat = ""
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            words = question.words
            if self._rng.random() < 0.4:  # people write shorter messages than dukes do: keep the last sentence
                words = re.split(r"(?<=[.?!;:])\s+", words)[-1]
            chat += f"{USER}{context}{words}{END}{ASSISTANT}{answer}{END}"
            context = ""
        return chat


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model (3.7 M parameters) with its generation settings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONG_ROW_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop embeddings and what each sublayer adds to the residual; Llama itself only knows attention dropout."""

    threshold = round(probability * 256)

    def drop(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        # One random byte per element: torch's own dropout draws floats, and takes a sixth of the step with that.
        words = torch.empty(output.numel() // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = (words.view(torch.uint8) >= threshold).view(output.shape)
        return output * keep * (256 / (256 - threshold))

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: list[int], row_tokens: int) -> float:
    """Return the mean loss per token, in nats, over the adjacent windows of `ids`."""
    num_rows = len(ids) // row_tokens
    ids_NT = torch.tensor(ids[: num_rows * row_tokens]).view(num_rows, row_tokens)
    rows_per_batch = 8192 // row_tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [model(input_ids=b, labels=b, use_cache=False).loss * len(b) for b in ids_NT.split(rows_per_batch)]
    return float(sum(losses)) / num_rows


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in bf16; each file is replaced at once, so that a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        copy.deepcopy(model).bfloat16().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)  # safetensors makes its file private
            file.replace(out / file.name)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the rate at `step`: linear warm-up, then a cosine down to a twentieth of the peak."""
    peak, warmup_steps = float(args.peak_lr), int(args.warmup_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, args.steps - warmup_steps)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sampler: RowSampler,
    held_out: list[int],
    args: argparse.Namespace,
) -> LlamaForCausalLM:
    """Train, saving the averaged weights at every new best validation loss, and return the best ones."""
    average = copy.deepcopy(model).eval()
    best: LlamaForCausalLM = average
    best_loss = math.inf
    add_dropout(model.train(), args.dropout)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    start_s = time.monotonic()
    for step in range(args.steps):
        # One batch in seven is of long rows, so that all positions up to the maximum are trained.
        row_tokens = LONG_ROW_TOKENS if step % 7 == 6 else SHORT_ROW_TOKENS
        ids_NT = sampler.batch(args.batch_tokens // row_tokens, row_tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        # bf16 is 1.9 times as fast as float32 on a CPU with AMX (13.5 against 7.0 thousand tokens/s on two cores).
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids_NT, labels=ids_NT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(args.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            held_out_loss = validation_loss(average, held_out, SHORT_ROW_TOKENS)
            is_best = held_out_loss < best_loss
            if is_best:
                best, best_loss = copy.deepcopy(average), held_out_loss
                save(best, tokenizer, args.out)
            minutes = (time.monotonic() - start_s) / 60
            train_loss, mark = float(loss.detach()), " saved" if is_best else ""
            print(f"{step + 1:6} {minutes:5.1f} min  train {train_loss:.3f}  val {held_out_loss:.4f}{mark}", flush=True)
    return best


def print_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print what the model makes of a few prompts, with the generation settings that are saved with it."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is love?"}], add_generation_prompt=True, tokenize=False
    )
    for prompt in ("ROMEO:", "KING RICHARD III:\n", chat):
        inputs = tokenizer(prompt, return_tensors="pt")
        output_NT = model.generate(**inputs, max_new_tokens=120)  # type: ignore[misc]  # its protocol is narrower
        print(f"{'-' * 40}\n{tokenizer.decode(output_NT[0])}")


def parse_args() -> argparse.Namespace:
    """Return the command line's settings; the defaults made the shipped model, with --threads 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="training text: speeches divided by empty lines")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--average-decay", type=float, default=0.995)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--chat-share", type=float, default=0.25)
    parser.add_argument("--noisy-share", type=float, default=0.4, help="share of rows with BPE dropout")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, save both, and show samples."""
    args = parse_args()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    split = text.index("\n\n", len(text) * 95 // 100) + 2
    bpe = train_bpe(text[:split])
    tokenizer = wrap_tokenizer(bpe)
    held_out = bpe.encode(text[split:]).ids
    sampler = RowSampler(text[:split], bpe, args.chat_share, args.noisy_share, random.Random(args.seed))
    print(f"tokens: {len(bpe.encode(text[:split]).ids)} to train on, {len(held_out)} held out")
    best = train(build_model(tokenizer), tokenizer, sampler, held_out, args)
    tokens_per_char = len(held_out) / len(text[split:])
    for row_tokens in (SHORT_ROW_TOKENS, LONG_ROW_TOKENS):
        loss = validation_loss(best, held_out, row_tokens)
        print(f"val at {row_tokens} tokens: {loss:.4f} nats/token, {loss * tokens_per_char:.4f} nats/character")
    print_samples(best, tokenizer)


if __name__ == "__main__":
    main()
