"""The Triton attention against float64 arithmetic on a plain cache, at odd shapes.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, E value size, L keys.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec, RotaryAttention
from fairlead.ops import reference
from fairlead.ops.memory import PooledAllocator
from fairlead.ops.table import TOLERANCE
from fairlead_triton.attention.backend import TritonAttention
from fairlead_triton.attention.plan import TritonPlan
from fairlead_triton.attention.tiles import DeviceTraits

# Small, so that a few tokens make several tiles, splits and chunks of splits.
TILES = {
    "prompt_rows": 128, "prompt_keys": 32, "decode_rows": 16, "decode_keys": 32, "split": 32, "merge_chunk": 2,
    "max_decode_rows": 16, "write_rows": 64,
}  # fmt: skip
TRAITS = DeviceTraits(num_processors=1)
KINDS: dict[str, dict[str, Any]] = {
    "head size 64": {"heads": (4, 2), "head_size": 64},
    "head size 80": {"heads": (3, 1), "head_size": 80},
    "head size 96": {"heads": (2, 2), "head_size": 96, "block_size": 32},
    "head size 128": {"heads": (4, 1), "head_size": 128, "block_size": 64},
    "head size 256": {"heads": (2, 1), "head_size": 256},
    "blocks of 128": {"heads": (3, 1), "head_size": 16, "block_size": 128},
    "20 heads a kv-head": {"heads": (20, 1), "head_size": 21, "block_size": 4},
    "blocks of one": {"heads": (4, 2), "block_size": 1},
    "blocks of two": {"heads": (4, 4), "block_size": 2, "dtype": "float16"},
    "blocks of eight": {"heads": (6, 2), "block_size": 8, "dtype": "bfloat16"},
    "window of one": {"heads": (4, 2), "sliding_window": 1},
    "window": {"heads": (4, 2), "sliding_window": 21, "block_size": 8},
    "window over splits": {"heads": (4, 2), "sliding_window": 60},
    "soft cap": {"heads": (4, 2), "soft_cap": 1.5},
    "slopes": {"heads": (4, 2), "slopes": True},
    "window, cap and slopes": {"heads": (4, 2), "sliding_window": 21, "soft_cap": 1.5, "slopes": True},
    "latent": {"heads": (4, 1), "head_size": 40, "value_size": 24},
    "latent, keys hold no more": {"heads": (4, 1), "head_size": 32, "value_size": 32},
    "latent in 16 bits": {"heads": (16, 1), "head_size": 72, "value_size": 64, "dtype": "bfloat16", "block_size": 64},
    "e4m3": {"heads": (4, 2), "kv_dtype": "fp8_e4m3", "kv_scales": (0.5, 0.25), "dtype": "bfloat16"},
    "e5m2": {"heads": (4, 2), "kv_dtype": "float8_e5m2", "kv_scales": (1.0, 2.0)},
    "e4m3 by token": {"heads": (4, 2), "kv_dtype": "float8_e4m3fn", "kv_scales": None},
    "e5m2 by token, latent": {
        "heads": (4, 1), "head_size": 40, "value_size": 24, "kv_dtype": "fp8_e5m2", "kv_scales": None,
    },
}  # fmt: skip

QUICK = ("head size 80", "blocks of eight", "window over splits", "window, cap and slopes", "latent", "e4m3 by token")
"""Those of the quick count: the interpreter takes seconds for each."""
CHOSEN = tuple(KINDS) if os.environ.get("FAIRLEAD_TEST_FULL") == "1" else QUICK


def allocator() -> PooledAllocator:
    return PooledAllocator(lambda shape, dtype: torch.empty(shape, dtype=dtype))


def make_backend(
    device: torch.device, *, heads: tuple[int, int], head_size: int = 16, block_size: int = 16, dtype: str = "float32",
    slopes: bool = False, value_size: int | None = None, sliding_window: int | None = None,
    soft_cap: float | None = None, tiles: dict[str, int] | None = None, num_layers: int = 1, **options: Any,
) -> TritonAttention:  # fmt: skip
    spec = AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        scale=head_size**-0.5,
        value_size=value_size,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        alibi_slopes=tuple(0.5**i for i in range(heads[0])) if slopes else None,
    )
    shape = AttentionShape(spec=spec, num_layers=num_layers, block_size=block_size, dtype=dtype)
    memory = PooledAllocator(lambda size, dtype: torch.empty(size, dtype=dtype, device=device))
    if device.type == "cpu":
        options = {"traits": TRAITS, "tuning": TILES if tiles is None else tiles, **options}
    return TritonAttention(shape, memory, device, **options)


@dataclass(kw_only=True)
class Stored:
    """One sequence: its blocks, and how many tokens are stored in them."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Trial:
    """A backend with a cache full of NaN, and beside it, in float64, what should be in there."""

    def __init__(self, device: torch.device, *, num_blocks: int = 0, **kind: Any) -> None:
        self.backend, self.device = make_backend(device, **kind), device
        self.spec, self.size = self.backend.spec, self.backend.shape.block_size
        self.dtype: torch.dtype = getattr(torch, self.backend.shape.dtype)
        num_blocks = num_blocks or 12 + 400 // self.size
        self.caches = self.backend.allocate(num_blocks)
        for tensor in self.caches[0].tensors():
            tensor.view(torch.uint8).fill_(0xFF)  # NaN in every format
        self.free = (1 + np.random.default_rng(3).permutation(num_blocks - 1)).tolist()
        self.generator = torch.Generator().manual_seed(5)
        slots = num_blocks * self.size
        self.keys = np.full((slots, self.spec.num_kv_heads, self.spec.head_size), np.nan)
        self.values = self.keys if self.spec.value_size else np.full_like(self.keys, np.nan)
        self.turn: tuple[torch.Tensor, torch.Tensor, bool] | None = None

    def metadata(self, work: Sequence[tuple[Stored, int]]) -> AttentionMetadata:
        """Gives each sequence so many new tokens."""
        for seq, num_new in work:
            seq.num_tokens += num_new
            seq.blocks += [self.free.pop() for _ in range(-(-seq.num_tokens // self.size) - len(seq.blocks))]
        tables = np.zeros((len(work), max((len(seq.blocks) for seq, _ in work), default=0)), np.int32)
        slots: list[int] = []
        for row, (seq, num_new) in zip(tables, work, strict=True):
            row[: len(seq.blocks)] = seq.blocks
            first = seq.num_tokens - num_new
            slots += [seq.blocks[p // self.size] * self.size + p % self.size for p in range(first, seq.num_tokens)]
            if self.spec.sliding_window is not None:
                row[: max(0, first - self.spec.sliding_window + 1) // self.size] = 0
        return AttentionMetadata(
            query_lens_S=np.array([n for _, n in work], np.int32),
            seq_lens_S=np.array([seq.num_tokens for seq, _ in work], np.int32),
            block_tables_SB=tables,
            slot_mapping_T=np.array(slots, np.int32),
        )

    def inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k and v as views of one merged tensor, of which a row has some more."""
        H, K, D = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_size
        merged = torch.randn(num_tokens, (H + 2 * K) * D + 3, generator=self.generator).to(self.dtype).to(self.device)
        q, k, v = (x.unflatten(1, (-1, D)) for x in merged[:, 3:].split((H * D, K * D, K * D), dim=1))
        return q, k, None if self.spec.value_size else v

    def run(self, metadata: AttentionMetadata, plan: object = None) -> tuple[np.ndarray, np.ndarray]:
        """(got, wanted), (T, H, E)."""
        q, k, v = self.inputs(len(metadata.slot_mapping_T))
        plan = self.backend.plan(metadata) if plan is None else plan
        if self.turn is None:
            out = self.backend.forward(q, k, v, self.caches[0], plan)
        else:
            assert v is not None
            positions = torch.from_numpy(positions_of(metadata))
            cos, sin, interleaved = self.turn
            on_device = (x.to(self.device) for x in (positions, cos, sin))
            out = self.backend.forward_rotary(q, k, v, *on_device, interleaved, self.caches[0], plan)
            q, k = turn(q, k, positions, self.turn)
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        return out.double().cpu().numpy(), self.wanted(metadata, q, k, v)

    def step(self, work: Sequence[tuple[Stored, int]]) -> None:
        """One step, compared."""
        got, wanted = self.run(self.metadata(work))
        assert got.shape == wanted.shape
        bound = TOLERANCE[self.backend.shape.dtype]
        np.testing.assert_allclose(got, wanted, atol=bound, rtol=bound)

    def wanted(
        self, metadata: AttentionMetadata, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
    ) -> np.ndarray:
        spec, q_THD = self.spec, q.double().cpu().numpy()
        self.keys[metadata.slot_mapping_T] = self.stored(k, 0)
        if v is not None:
            self.values[metadata.slot_mapping_T] = self.stored(v, 1)
        value_size = spec.value_size or spec.head_size
        rows, first_row = [], 0
        lens = zip(metadata.query_lens_S.tolist(), metadata.seq_lens_S.tolist(), metadata.block_tables_SB, strict=True)
        for num_queries, num_tokens, table in lens:
            for i in range(num_queries):
                position = num_tokens - num_queries + i
                low = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
                key_L = np.arange(low, position + 1)
                slots_L = table[key_L // self.size] * self.size + key_L % self.size
                heads = []
                for head in range(spec.num_heads):
                    of = head // (spec.num_heads // spec.num_kv_heads)
                    scores_L = self.keys[slots_L, of] @ q_THD[first_row + i, head] * spec.scale
                    if spec.soft_cap is not None:
                        scores_L = spec.soft_cap * np.tanh(scores_L / spec.soft_cap)
                    if spec.alibi_slopes is not None:
                        scores_L = scores_L + spec.alibi_slopes[head] * (key_L - position)
                    weights_L = np.exp(scores_L - scores_L.max())
                    heads.append(weights_L / weights_L.sum() @ self.values[slots_L, of, :value_size])
                rows.append(heads)
            first_row += num_queries
        return np.array(rows).reshape(first_row, spec.num_heads, value_size)

    def stored(self, x: torch.Tensor, plane: int) -> np.ndarray:
        """What the cache holds of keys or values, by torch's own fp8 numbers."""
        kv_dtype = self.backend.kv_dtype
        if kv_dtype == "auto":
            return x.double().cpu().numpy()
        fp8 = torch.float8_e4m3fn if "e4m3" in kv_dtype else torch.float8_e5m2
        x, largest = x.float().cpu(), torch.finfo(fp8).max
        scales = self.caches[0].scales
        if scales is None:
            scale: Any = self.kv_scales[plane]
        else:
            scale = (x.abs().amax(-1, keepdim=True) / largest).double()
        return ((x / scale).float().clamp(-largest, largest).to(fp8).double() * scale).numpy()

    kv_scales: tuple[float, float] = (1.0, 1.0)


def positions_of(metadata: AttentionMetadata) -> np.ndarray:
    pairs = zip(metadata.query_lens_S.tolist(), metadata.seq_lens_S.tolist(), strict=True)
    return np.array([p for num_new, end in pairs for p in range(end - num_new, end)], np.int64)


def turn(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin, interleaved = table
    size = cos.shape[1]
    parts = reference.rotary_embedding(q[..., :size], k[..., :size], positions, cos, sin, interleaved)
    return torch.cat((parts[0], q[..., size:]), -1), torch.cat((parts[1], k[..., size:]), -1)


@pytest.mark.parametrize("kind", CHOSEN)
def test_it_equals_the_oracle(kind: str, device: torch.device, full: bool) -> None:
    """Prompts around a block's edge; then a decode on a long context, a chunk, a decode, and a prompt, in one step."""
    trial = Trial(device, **KINDS[kind])
    trial.kv_scales = KINDS[kind].get("kv_scales") or (1.0, 1.0)
    edge = max(trial.size, 16)
    longest = 100 if full else 45
    seqs = [Stored() for _ in range(4)]
    trial.step([(seqs[0], longest), (seqs[1], 1), (seqs[2], edge - 1)])
    trial.step([(seqs[1], 1), (seqs[0], 1), (seqs[2], 3), (seqs[3], 9)])
    if full:
        trial.step([(seqs[0], 1)])
        trial.step([(seqs[2], edge + 1), (seqs[3], 1), (Stored(), edge + 1), (Stored(), edge)])
        for _ in range(edge):
            trial.step([(seq, 1) for seq in reversed(seqs)])
        trial.step([(seq, 2) for seq in seqs] + [(Stored(), 200)])


@pytest.mark.parametrize(
    ("kind", "size", "interleaved"),
    [
        ("e4m3 by token", 16, False),
        ("blocks of eight", 6, True),
        ("blocks of two", 8, False),
        ("blocks of two", 16, True),
    ],
)
def test_rotation_in_the_write_equals_the_op(kind: str, size: int, interleaved: bool, device: torch.device) -> None:
    trial = Trial(device, **KINDS[kind])
    assert isinstance(trial.backend, RotaryAttention)
    angles = torch.outer(torch.arange(64.0), 0.3 ** torch.arange(size // 2))
    angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
    trial.turn = angles.cos().to(trial.dtype), angles.sin().to(trial.dtype), interleaved
    seqs = [Stored(), Stored()]
    trial.step([(seqs[0], 3), (seqs[1], 6)])
    trial.step([(seqs[1], 1), (seqs[0], 1)])


def test_no_tokens(device: torch.device) -> None:
    trial = Trial(device, heads=(4, 2))
    got, _ = trial.run(trial.metadata([]))
    assert got.shape == (0, 4, 16)


def test_a_block_that_another_sequence_fills_in_the_same_step(device: torch.device) -> None:
    trial = Trial(device, heads=(4, 2))
    first, second = Stored(), Stored()
    metadata = trial.metadata([(first, 20)])
    second.blocks, second.num_tokens = first.blocks[:1], 16
    joined = trial.metadata([(second, 4)])
    width = metadata.block_tables_SB.shape[1]
    both = AttentionMetadata(
        query_lens_S=np.array([4, 20], np.int32),
        seq_lens_S=np.array([20, 20], np.int32),
        block_tables_SB=np.concatenate([joined.block_tables_SB[:, :width], metadata.block_tables_SB]),
        slot_mapping_T=np.concatenate([joined.slot_mapping_T, metadata.slot_mapping_T]),
    )
    got, wanted = trial.run(both)
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_strides_of_all_kinds_are_read(device: torch.device) -> None:
    """Heads before tokens, and head entries apart."""
    trial = Trial(device, heads=(4, 2))
    metadata = trial.metadata([(Stored(), 5), (Stored(), 1)])
    q, k, v = trial.inputs(6)
    assert v is not None
    across = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert apart[0].stride(-1) != 1
    wanted = trial.wanted(metadata, q, k, v)
    for inputs in (across, apart):
        got = trial.backend.forward(*inputs, trial.caches[0], trial.backend.plan(metadata))
        np.testing.assert_allclose(got.cpu().numpy(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["blocks of eight"])
def test_the_batch_does_not_show_in_the_bits(kind: str, device: torch.device) -> None:
    """The same sequence alone, and as the last of three."""
    found = []
    for others in ([], [21, 3]):
        trial = Trial(device, **KINDS[kind])
        seq, beside = Stored(), [Stored() for _ in others]
        outs = []
        for num_new in (40, 1, 2):
            work = [(other, n if num_new == 40 else 1) for other, n in zip(beside, others, strict=True)]
            metadata = trial.metadata([*work, (seq, num_new)])
            trial.generator.manual_seed(num_new)
            q, k, v = (x.clone() for x in trial.inputs(num_new) if x is not None)
            fill = trial.inputs(sum(n for _, n in work))
            packed = [torch.cat([a, b]) for a, b in zip(fill, (q, k, v), strict=True) if a is not None]
            out = trial.backend.forward(*packed, trial.caches[0], trial.backend.plan(metadata))
            outs.append(out[-num_new:])
        found.append(torch.cat(outs))
    assert torch.equal(*found)


def test_plans_may_be_made_ahead(device: torch.device) -> None:
    trial = Trial(device, heads=(4, 2))
    seqs = [Stored(), Stored()]
    steps = [trial.metadata([(seq, n) for seq in seqs]) for n in (33, 1, 1)]
    plans = [trial.backend.plan(metadata) for metadata in steps]
    for metadata, plan in zip(steps, plans, strict=True):
        got, wanted = trial.run(metadata, plan)
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_one_plans_launches_serve_another(device: torch.device) -> None:
    """As a graph does that was captured with padding alone: other words in the same place, the same arguments."""
    trial = Trial(device, heads=(4, 2))
    padding = trial.backend.plan(trial.metadata([(Stored(), 3)]))
    seqs = [Stored() for _ in range(3)]
    trial.step([(seqs[0], 40), (seqs[1], 2), (seqs[2], 16)])
    metadata = trial.metadata([(seq, 1) for seq in seqs])
    plan = trial.backend.plan(metadata)
    assert isinstance(padding, TritonPlan)
    assert isinstance(plan, TritonPlan)
    assert padding.replayable
    assert plan.replayable
    q, k, v = trial.inputs(3)
    wanted = trial.wanted(metadata, q, k, v)
    padding.load()
    plan.load()
    for name in ("num_tokens", "merge_grid", "merges_at", "decodes_at", "num_prompts"):
        assert getattr(plan, name) == getattr(padding, name), name
    trial.backend.forward(q, k, v, trial.caches[0], plan)  # writes; what it returns is not looked at
    got = trial.backend._attend(q, trial.caches[0], padding)
    np.testing.assert_allclose(got.cpu().numpy(), wanted, atol=1e-5, rtol=1e-5)


def test_a_plan_of_prompts_or_of_too_many_words_is_not_replayed(device: torch.device) -> None:
    trial = Trial(device, heads=(4, 2), tiles={**TILES, "workspace_bytes": 4096})
    seqs = [Stored() for _ in range(4)]
    prompt = trial.backend.plan(trial.metadata([(seqs[0], 70)]))
    assert isinstance(prompt, TritonPlan)
    assert not prompt.replayable
    trial.step([(seq, 70) for seq in seqs[1:]])
    trial.step([(seqs[1], 1)])
    metadata = trial.metadata([(seq, 1) for seq in seqs[1:]])
    plan = trial.backend.plan(metadata)
    assert isinstance(plan, TritonPlan)
    assert plan.replayable is (device.type != "cpu")  # three splits each: more partial results than 4096 bytes hold
    got, wanted = trial.run(metadata, plan)
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["head size 64", "latent", "e4m3 by token"])
def test_blocks_are_copied_and_swapped_whole(kind: str, device: torch.device) -> None:
    backend = make_backend(device, num_layers=2, **KINDS[kind])
    caches, host = backend.allocate(6), backend.allocate_host(4)
    tensors = [t for cache in caches for t in cache.tensors()]
    assert backend.block_bytes() == sum(t[0].nbytes for t in tensors)
    for i, tensor in enumerate(tensors):
        tensor.view(torch.uint8).copy_(torch.arange(tensor.nbytes).add(i).view(tensor.view(torch.uint8).shape) % 251)
    before = [t.clone().view(torch.uint8).cpu() for t in tensors]
    backend.copy_blocks(caches, [(0, 1), (1, 2)])
    backend.copy_to_host(caches, host, [(2, 0), (3, 1), (4, 2), (5, 3)])
    backend.copy_from_host(host, caches, [(1, 0), (2, 5), (3, 4)])
    for old, new in zip(before, tensors, strict=True):
        wanted = old[[3, 0, 0, 3, 5, 4]]
        assert torch.equal(new.view(torch.uint8).cpu(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "has no float64; it has bfloat16"),
        ({"block_size": 24}, "has no blocks of 24 tokens; it has 1, 2"),
        ({"kv_dtype": "fp4"}, "has no KV cache of fp4; it has auto, fp8_e4m3"),
        ({"tuning": {"prompt_row": 16}}, "names prompt_row, which it has not"),
        ({"tuning": {"prompt_rows": 24}}, "must be powers of two"),
        ({"tuning": {"split": 16, "decode_keys": 32}}, "split 16 must be a multiple of decode_keys 32"),
        ({"traits": DeviceTraits(shared_memory_bytes=1024)}, "needs more than 1024 bytes of shared memory"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_backend(torch.device("cpu"), **{"heads": (4, 2), **change})


def test_a_scale_below_zero_is_refused() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=16, scale=-1.0)
    shape = AttentionShape(spec=spec, num_layers=1, block_size=16, dtype="float32")
    with pytest.raises(ConfigError, match=r"scale above 0, got -1\.0"):
        TritonAttention(shape, allocator(), torch.device("cpu"))


@pytest.mark.parametrize(("kv_dtype", "fp8"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_rounds_as_torch_does(kv_dtype: str, fp8: torch.dtype, device: torch.device) -> None:
    """Values between all neighbours, their middles, what is too large, and NaN, through the write kernel."""
    backend = make_backend(device, heads=(1, 1), head_size=128, kv_dtype=kv_dtype)
    exact = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    exact = exact[exact.isfinite()].sort().values
    middles = (exact[1:] + exact[:-1]) / 2
    largest = torch.finfo(fp8).max
    x = torch.cat([exact, middles, middles.nextafter(exact[1:]), torch.tensor([2 * largest, -1e30, math.nan, 1e-30])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 128)).view(-1, 1, 128)
    caches, num_tokens = backend.allocate(4), len(x)
    metadata = AttentionMetadata(
        query_lens_S=np.array([num_tokens], np.int32),
        seq_lens_S=np.array([num_tokens], np.int32),
        block_tables_SB=np.array([[1]], np.int32),
        slot_mapping_T=np.arange(16, 16 + num_tokens, dtype=np.int32),
    )
    backend.forward(x.to(device), x.to(device), x.to(device), caches[0], backend.plan(metadata))
    got = caches[0].data[1, :, 0, :num_tokens].cpu()
    wanted = x[:, 0].clamp(-largest, largest).to(fp8).view(torch.uint8)
    for plane in got:
        is_nan = x[:, 0].isnan()
        assert torch.equal(plane[~is_nan], wanted[~is_nan])
        assert plane.view(fp8).float()[is_nan].isnan().all()
