"""Tier 3: every attention backend, step after step on a paged cache, against the reference on a plain one.

Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, V value size, B blocks of a table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec, RotaryAttention
from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead.testing.conformance.check import REFERENCE, UNSUPPORTED, Check, Outcome
from fairlead.testing.conformance.subject import Subject

HEAD_SIZES = (64, 80, 96, 128, 256)
GROUPS = ((4, 4), (4, 2), (6, 2), (8, 1), (16, 1))  # query heads, kv-heads

Kind = dict[str, Any]
KINDS: dict[str, Kind] = {
    "sliding window of 1": {"sliding_window": 1},
    "sliding window in a block": {"sliding_window": 5},
    "sliding window over blocks": {"sliding_window": 23},
    "soft cap": {"soft_cap": 1.5},
    "ALiBi": {"alibi": True},
    "sliding window and soft cap": {"sliding_window": 23, "soft_cap": 1.5},
    "sliding window and ALiBi": {"sliding_window": 7, "alibi": True},
    "values in the keys": {"heads": (4, 1), "value_part": 0.75},
}


def checks(subject: Subject) -> Iterator[Check]:
    """Per backend and dtype: head sizes, groups of heads, kinds of layers, block sizes, copies, stale memory."""
    for name in subject.platform.attention_backends():
        for dtype in subject.dtypes:
            yield from _Backend(subject, name, dtype).checks()


@dataclass(kw_only=True)
class _Sequence:
    """What the kit remembers of one sequence: its blocks, and how many tokens are stored in them."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A rotary table of angles that mean nothing."""

    cos_PR: torch.Tensor
    sin_PR: torch.Tensor
    interleaved: bool

    @classmethod
    def of(cls, size: int, dtype: str, *, interleaved: bool) -> "_Turn":
        """For `size` dimensions and 2048 positions."""
        angles = torch.outer(torch.arange(2048.0), 0.3 ** torch.arange(size // 2))
        angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
        cos, sin = (x.to(getattr(torch, dtype)) for x in (angles.cos(), angles.sin()))
        return cls(cos_PR=cos, sin_PR=sin, interleaved=interleaved)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first dimensions rotated, in float32."""
        size, (cos, sin) = self.cos_PR.shape[1], (x.float() for x in (self.cos_PR, self.sin_PR))
        q, k = q.float(), k.float()
        turned = reference.rotary_embedding(q[..., :size], k[..., :size], positions_T, cos, sin, self.interleaved)
        return torch.cat((turned[0], q[..., size:]), dim=-1), torch.cat((turned[1], k[..., size:]), dim=-1)


class _Backend:
    """One backend in one dtype."""

    def __init__(self, subject: Subject, name: str, dtype: str) -> None:
        self.s, self.name, self.dtype = subject, name, dtype
        self.hook = f"attention({name!r})"
        defaults, sizes = subject.platform.defaults, subject.platform.capabilities.head_sizes
        self.block_size = defaults.block_size
        self.head_size = 64 if not sizes or 64 in sizes else sizes[0]

    def checks(self) -> Iterator[Check]:
        """The checks of this backend and dtype."""
        capabilities = self.s.platform.capabilities
        known = (*HEAD_SIZES, *(size for size in capabilities.head_sizes if size not in HEAD_SIZES))
        for size in known:
            run = self._sweep([self._shape(head_size=size)])
            if capabilities.head_sizes and size not in capabilities.head_sizes:
                run = _unsupported("capabilities.head_sizes does not list it")
            yield self._check(f"head size {size}", run)
        for heads in GROUPS:
            yield self._check(f"{heads[0]} heads, {heads[1]} kv-heads", self._sweep([self._shape(heads=heads)]))
        for kind, settings in KINDS.items():
            yield self._check(kind, self._sweep([self._shape(**settings)]))
        for size in capabilities.block_sizes:
            yield self._check(f"block size {size}", self._sweep([self._shape(block_size=size)]))
        for kv_dtype in capabilities.kv_dtypes:
            if kv_dtype not in ("auto", self.dtype):
                yield self._check(f"cache of {kv_dtype}", self._stored(kv_dtype))
        yield self._check("rotary embedding in the write", self._rotary)
        yield self._check("copied blocks", lambda: self._examine(self._shape(), [self._copies]))
        has_swap = self.s.platform.max_swap_bytes(0) is not None
        swap = _unsupported("max_swap_bytes is None") if not has_swap else self._swap
        yield self._check("blocks on the host and back", swap)
        yield self._check("stale memory", lambda: self._examine(self._shape(), [self._stale]))

    def _check(self, what: str, run: Callable[[], Outcome]) -> Check:
        return Check(tier="attention", name=f"{self.name}, {self.dtype}, {what}", hook=self.hook, run=run)

    def _shape(
        self,
        *,
        heads: tuple[int, int] = (4, 2),
        head_size: int | None = None,
        block_size: int | None = None,
        alibi: bool = False,
        value_part: float | None = None,
        kv_dtype: str = "auto",
        **kind: Any,
    ) -> AttentionShape:
        size = head_size or self.head_size
        spec = AttentionSpec(
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_size=size,
            scale=size**-0.5,
            alibi_slopes=tuple(2.0 ** (-8 * (i + 1) / heads[0]) for i in range(heads[0])) if alibi else None,
            value_size=None if value_part is None else int(size * value_part),
            **kind,
        )
        size = block_size or self.block_size
        return AttentionShape(spec=spec, num_layers=1, block_size=size, dtype=self.dtype, kv_dtype=kv_dtype)

    def _sweep(self, shapes: Sequence[AttentionShape]) -> Callable[[], Outcome]:
        def run() -> Outcome:
            outcomes = [self._examine(shape, [self._steps]) for shape in shapes]
            return max(outcomes, key=lambda outcome: outcome.error or 0.0)

        return run

    def _examine(self, shape: AttentionShape, histories: Sequence[Callable[["_Trial"], list[float]]]) -> Outcome:
        """The largest error of some histories, each on a cache of its own; "unsupported" if the backend says so."""
        try:
            backend = self.s.platform.attention(self.name, shape)
        except ConfigError as error:
            return Outcome(status="unsupported", reason=str(error))
        errors = [e for history in histories for e in history(_Trial(self.s, self.hook, backend, shape))]
        return self.s.judge(errors, TOLERANCE[self.dtype])

    def _steps(self, trial: "_Trial") -> list[float]:
        """Prompts that end around a block's edge, decodes, chunks on a context, and a step of one token."""
        size = trial.shape.block_size
        lengths = [max(n, 1) for n in (1, size - 1, size, size + 1, 2 * size + 1)]
        seqs = [_Sequence() for _ in lengths]
        errors = [trial.step(list(zip(seqs, lengths, strict=True)))]
        errors.append(trial.step([(seq, 1) for seq in seqs]))
        fresh = _Sequence()
        mixed = [(seqs[1], 1), (seqs[3], size + 1), (fresh, 3), (seqs[0], 2)]
        errors.append(trial.step(mixed))
        errors.append(trial.step([(seqs[4], 1)]))
        errors.append(trial.step([(_Sequence(), 1)]))
        if self.s.full:
            errors.append(trial.step([(_Sequence(), 5 * size + 3), (seqs[2], 1), (_Sequence(), 97)]))
            errors += [trial.step([(seq, 1) for seq in reversed(seqs)]) for _ in range(size)]
        return errors

    def _rotary(self) -> Outcome:
        shape = self._shape()
        try:
            backend = self.s.platform.attention(self.name, shape)
        except ConfigError as error:
            return Outcome(status=UNSUPPORTED, reason=str(error))
        if not isinstance(backend, RotaryAttention):
            return Outcome(status=REFERENCE, reason="it has no forward_rotary")
        return self._examine(shape, [self._turns])

    def _turns(self, trial: "_Trial") -> list[float]:
        """All of a head's dimensions rotated by halves, then some of them by neighbours."""
        errors = []
        for size, interleaved in ((self.head_size, False), (self.head_size // 4 * 2, True)):
            trial.turn = _Turn.of(size, self.dtype, interleaved=interleaved)
            errors += self._steps(trial)
        return errors

    def _copies(self, trial: "_Trial") -> list[float]:
        """A sequence goes on in copies of its blocks, and in copies of the copies made in the same call."""
        size = trial.shape.block_size
        seq, other = _Sequence(), _Sequence()
        errors = [trial.step([(seq, 2 * size + 3), (other, 2)])]
        first, second = trial.take(len(seq.blocks)), trial.take(len(seq.blocks))
        trial.store_nan(first + second)
        pairs = [*zip(seq.blocks, first, strict=True), *zip(first, second, strict=True)]
        trial.copy(pairs)
        seq.blocks = second
        return [*errors, trial.step([(seq, 1), (other, 1)])]

    def _stored(self, kv_dtype: str) -> Callable[[], Outcome]:
        shape = self._shape(kv_dtype=kv_dtype)
        return lambda: self._examine(shape, [self._steps, self._copies, self._stale])

    def _swap(self) -> Outcome:
        return self._examine(self._shape(), [self._swaps])

    def _swaps(self, trial: "_Trial") -> list[float]:
        """A sequence's blocks go to the host, others take their place, and they come back to blocks elsewhere."""
        size = trial.shape.block_size
        seq, other = _Sequence(), _Sequence()
        errors = [trial.step([(seq, 2 * size + 3), (other, 2)])]
        trial.swap(seq)
        return [*errors, trial.step([(seq, 1), (other, 1)])]

    def _stale(self, trial: "_Trial") -> list[float]:
        """Every block has held NaN, as uninitialised memory may: what is not a sequence's own is not read."""
        trial.fill_with_nan()
        return self._steps(trial)


class _Trial:
    """One backend with a cache, and beside it the reference with its own, of what was really stored."""

    def __init__(self, subject: Subject, hook: str, backend: Any, shape: AttentionShape) -> None:
        self.s, self.hook, self.backend, self.shape = subject, hook, backend, shape
        spec, self._rng = shape.spec, np.random.default_rng(7)
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._generator = torch.Generator().manual_seed(7)
        num_blocks = (64 if subject.full else 24) + 200 // shape.block_size
        self._free = (1 + self._rng.permutation(num_blocks - 1)).tolist()
        self._padding_block = self._free.pop()
        self._runner = subject.platform.graph_runner()
        self.turn: _Turn | None = None
        self._num_blocks = num_blocks
        self._caches = backend.allocate(num_blocks)
        slots = num_blocks * shape.block_size
        self._keys = torch.zeros(slots, spec.num_kv_heads, spec.head_size)
        self._values = self._keys if spec.value_size is not None else torch.zeros_like(self._keys)

    def take(self, num_blocks: int) -> list[int]:
        """Blocks that nobody has."""
        return [self._free.pop() for _ in range(num_blocks)]

    def step(self, work: Sequence[tuple[_Sequence, int]]) -> float:
        """Gives each sequence so many new tokens in one step; returns the largest error of what they attend to."""
        for seq, num_new in work:
            seq.num_tokens += num_new
            seq.blocks += self.take(-(-seq.num_tokens // self.shape.block_size) - len(seq.blocks))
        return self._run([seq for seq, _ in work], [num_new for _, num_new in work])

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks here and there."""
        self.backend.copy_blocks(self._caches, pairs)
        size = self.shape.block_size
        for source, target in pairs:
            for cache in (self._keys, self._values):
                cache[target * size : (target + 1) * size] = cache[source * size : (source + 1) * size].clone()

    def swap(self, seq: _Sequence) -> None:
        """Moves a sequence's blocks to the host and into other blocks, with NaN in the ones that it leaves."""
        host, slots = self.backend.allocate_host(len(seq.blocks) + 1), range(1, len(seq.blocks) + 1)
        self.backend.copy_to_host(self._caches, host, list(zip(seq.blocks, slots, strict=True)))
        left = seq.blocks
        seq.blocks = self.take(len(seq.blocks))
        self.store_nan(left)
        self.store_nan(seq.blocks)
        self.backend.copy_from_host(host, self._caches, list(zip(slots, seq.blocks, strict=True)))
        size = self.shape.block_size
        for source, target in zip(left, seq.blocks, strict=True):
            for cache in (self._keys, self._values):
                cache[target * size : (target + 1) * size] = cache[source * size : (source + 1) * size].clone()

    def fill_with_nan(self) -> None:
        """Stores NaN in every slot of the backend's cache, a few at a time."""
        self.store_nan(list(range(self._num_blocks)))

    def store_nan(self, blocks: list[int]) -> None:
        """In every slot of them."""
        seq, num_left = _Sequence(blocks=blocks), len(blocks) * self.shape.block_size
        most = min(64, self.s.platform.defaults.max_num_batched_tokens)
        while num_left:
            num_new = min(most, num_left)
            seq.num_tokens, num_left = seq.num_tokens + num_new, num_left - num_new
            q, k, v = (x.fill_(torch.nan) for x in self._inputs(self._padded(num_new, num_new)))
            self._forward(self._placed(q, k, v), self._metadata([seq], [num_new]))
        self.s.platform.synchronize()

    def _run(self, seqs: list[_Sequence], query_lens: list[int]) -> float:
        spec, num_tokens = self.shape.spec, sum(query_lens)
        metadata = self._metadata(seqs, query_lens)
        q, k, v = self._inputs(len(metadata.slot_mapping_T))
        slots_T = torch.from_numpy(metadata.slot_mapping_T[:num_tokens]).long()
        seen_q, seen_k = q[:num_tokens].float(), k[:num_tokens].float()
        if self.turn is not None:
            seen_q, seen_k = self.turn(seen_q, seen_k, _positions(metadata)[:num_tokens])
        reference.kv_cache_write(self._as_stored(seen_k), self._keys, slots_T)
        if spec.value_size is None:
            reference.kv_cache_write(self._as_stored(v[:num_tokens].float()), self._values, slots_T)
        want = torch.zeros(num_tokens, spec.num_heads, spec.value_size or spec.head_size)
        if self.s.platform.capabilities.computes:
            want = reference.paged_attention(
                seen_q,
                self._keys,
                self._values,
                query_lens,
                [seq.num_tokens for seq in seqs],
                torch.from_numpy(self._tables(seqs)),
                self.shape.block_size,
                spec,
            )
        contexts = [seq.num_tokens for seq in seqs]
        where = f"{num_tokens} new tokens of {len(seqs)} sequences with contexts of {contexts}, {_describe(self.shape)}"
        inputs, hook = self._placed(q, k, v), f"{self.hook}.forward"
        got = self.s.check_inputs(hook, lambda: self._forward(inputs, metadata), inputs, where)
        like = torch.empty((len(q), *want.shape[1:]), dtype=self._dtype)
        self.s.check_tensor(hook, got, like, where)
        return self.s.compare(hook, got[:num_tokens], want, TOLERANCE[self.shape.dtype], where)

    def _as_stored(self, x: torch.Tensor) -> torch.Tensor:
        """What a cache of another dtype keeps of it: what is too large becomes the largest number."""
        if self.shape.kv_dtype == "auto":
            return x
        dtype: torch.dtype = getattr(torch, self.shape.kv_dtype)
        most = torch.finfo(dtype).max
        return x.clamp(-most, most).to(dtype).float()

    def _forward(self, inputs: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        """Plans and attends, as a model's layer does; convicts a plan that changes what it is given."""
        before = {name: getattr(metadata, name).copy() for name in metadata.__slots__}
        with torch.inference_mode():
            plan = self.backend.plan(metadata)
            for name, array in before.items():
                is_same = np.array_equal(array, getattr(metadata, name))
                self.s.expect(is_same, f"{self.hook}.plan", "metadata unchanged", f"{name} was changed")
            qkv, turn = (inputs["q"], inputs["k"], inputs.get("v")), self.turn
            if turn is None:
                out: torch.Tensor = self.backend.forward(*qkv, self._caches[0], plan)
            else:
                at = self.s.to_device(_positions(metadata))
                cos, sin = self.s.to_device(turn.cos_PR), self.s.to_device(turn.sin_PR)
                out = self.backend.forward_rotary(*qkv, at, cos, sin, turn.interleaved, self._caches[0], plan)
        return out

    def _padded(self, num_tokens: int, longest: int) -> int:
        """The number of rows of a step, padding included."""
        return self._runner.bucket(num_tokens, longest) or num_tokens

    def _inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q, k and v in the dtype, on the host."""
        spec = self.shape.spec
        shapes = ((spec.num_heads, 2.0), (spec.num_kv_heads, 2.0), (spec.num_kv_heads, 1.0))
        q, k, v = (
            (scale * torch.randn(num_tokens, heads, spec.head_size, generator=self._generator)).to(self._dtype)
            for heads, scale in shapes
        )
        return q, k, v

    def _placed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """As models hand them over: views of one tensor that a merged projection has made."""
        if self.shape.spec.value_size is not None:
            return {"q": self.s.to_device(q), "k": self.s.to_device(k)}
        merged = self.s.to_device(torch.cat([x.flatten(1) for x in (q, k, v)], dim=1))
        sizes = [x[0].numel() for x in (q, k, v)]
        views = [x.view(len(q), -1, self.shape.spec.head_size) for x in torch.split(merged, sizes, dim=1)]
        return dict(zip(("q", "k", "v"), views, strict=True))

    def _metadata(self, seqs: list[_Sequence], query_lens: list[int]) -> AttentionMetadata:
        """Blocks that have left the window are 0 in the tables that the backend sees.

        A step that the graph runner pads gets sequences of at most a block, all of them in one block.
        """
        size, window = self.shape.block_size, self.shape.spec.sliding_window
        num_padding = self._padded(sum(query_lens), max(query_lens)) - sum(query_lens)
        padding = [size] * (num_padding // size) + [num_padding % size] * (num_padding % size > 0)
        seqs = [*seqs, *(_Sequence(blocks=[self._padding_block], num_tokens=n) for n in padding)]
        query_lens = [*query_lens, *padding]
        tables = self._tables(seqs)
        slots: list[int] = []
        for i, (seq, num_new) in enumerate(zip(seqs, query_lens, strict=True)):
            first = seq.num_tokens - num_new
            if window is not None:
                tables[i, : max(0, first - window + 1) // size] = 0
            slots += [seq.blocks[p // size] * size + p % size for p in range(first, seq.num_tokens)]
        return AttentionMetadata(
            query_lens_S=np.array(query_lens, np.int32),
            seq_lens_S=np.array([seq.num_tokens for seq in seqs], np.int32),
            block_tables_SB=tables,
            slot_mapping_T=np.array(slots, np.int32),
        )

    def _tables(self, seqs: list[_Sequence]) -> np.ndarray:
        tables = np.zeros((len(seqs), max(len(seq.blocks) for seq in seqs)), np.int32)
        for row, seq in zip(tables, seqs, strict=True):
            row[: len(seq.blocks)] = seq.blocks
        return tables


def _positions(metadata: AttentionMetadata) -> torch.Tensor:
    """Of the packed tokens."""
    lens_S, ends_S = metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64)
    last_S = np.cumsum(lens_S)
    return torch.from_numpy(np.arange(last_S[-1]) + np.repeat(ends_S - last_S, lens_S))


def _unsupported(reason: str) -> Callable[[], Outcome]:
    return lambda: Outcome(status="unsupported", reason=reason)


def _describe(shape: AttentionShape) -> str:
    spec = shape.spec
    return f"{spec.num_heads} heads, {spec.num_kv_heads} kv-heads, head size {spec.head_size}, block {shape.block_size}"
