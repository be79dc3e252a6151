"""AttentionBackend on the Triton kernels, for any device that Triton and torch both know.

A step is one launch that writes keys and values (with the rotary embedding of q and k in it, where the model has one),
one for decodes, one that merges the splits of long contexts, and one for prompts; those without work are left out of a
step that is not replayable. `plan.py` says how graphs go with it.

Results are batch invariant: whatever else is in a step, and in whichever order, a sequence's results have the same
bits. They are not chunk invariant: how many tokens a step hands a sequence decides which of its kernels runs.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, E head size of the values, R rotated dimensions.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead_triton.attention.cache import PagedCache, PagedCacheOwner
from fairlead_triton.attention.kernels import FORMATS, decode_kernel, merge_kernel, prompt_kernel
from fairlead_triton.attention.kv_write import kv_write_kernel, rotary_kv_write_kernel
from fairlead_triton.attention.plan import Planner, PlanSizes, StepMemory, TritonPlan
from fairlead_triton.attention.tiles import DeviceTraits, Tiles, choose_tiles, padded_sizes, power_of_two

DTYPES = ("bfloat16", "float16", "float32")
BLOCK_SIZES = (16, 32, 64, 128, 1, 2, 4, 8)
_MIN_WORDS = 2**16
_MAX_WORDS = 2**21  # 8 MiB: 256 sequences of 8000 blocks


class TritonAttention(PagedCacheOwner):
    """Paged attention of one group of layers; also RotaryAttention."""

    name = "triton"

    def __init__(
        self,
        shape: AttentionShape,
        allocator: MemoryAllocator,
        torch_device: torch.device,
        *,
        kv_dtype: str = "auto",
        kv_scales: tuple[float, float] | None = (1.0, 1.0),
        traits: DeviceTraits | None = None,
        tuning: Mapping[str, int] = MappingProxyType({}),
        pin_memory: bool | None = None,
    ) -> None:
        """`kv_scales` multiply stored fp8 keys and values; None stores a scale for each token and kv-head.

        Raises ConfigError where the kernels cannot serve the shape, or `tuning` names what is not in Tiles.
        """
        _check(shape, kv_dtype)
        self.spec = spec = shape.spec
        self._model_dtype: torch.dtype = getattr(torch, shape.dtype)
        pin = torch_device.type != "cpu" and torch.accelerator.is_available() if pin_memory is None else pin_memory
        is_fp8 = kv_dtype != "auto"
        has_scales = is_fp8 and kv_scales is None
        stored = torch.uint8 if is_fp8 else self._model_dtype
        super().__init__(shape, allocator, stored, has_scales=has_scales, pin_memory=pin)
        self.kv_dtype, self._device = kv_dtype, torch_device
        traits = traits or DeviceTraits()
        self.tiles = choose_tiles(
            spec,
            item_bytes=self._model_dtype.itemsize,
            kv_item_bytes=stored.itemsize,
            traits=traits,
            tuning=tuning,
        )
        self._value_size = spec.value_size or spec.head_size
        k_scale, v_scale = kv_scales if is_fp8 and kv_scales is not None else (1.0, 1.0)
        if spec.value_size is not None:
            v_scale = k_scale
        self._scales = (_score_scale(spec.scale * k_scale, spec.soft_cap), v_scale)
        self._inverse_scales = (1 / k_scale, 1 / v_scale)
        self._slopes = torch.tensor(spec.alibi_slopes or (0.0,), dtype=torch.float32, device=torch_device)
        self._programs = traits.num_processors * self.tiles.programs_per_processor
        self._options = _Options(shape, self.tiles, kv_dtype, has_scales=has_scales, native_fp8=traits.native_fp8)
        self._planner: Planner | None = None

    def plan(self, metadata: AttentionMetadata) -> object:
        """Lays the step out on the host; `TritonPlan.load` brings it to the device."""
        if self._planner is None:
            self._planner = self._make_planner()
        return self._planner.plan(metadata)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes, then attends."""
        assert isinstance(plan, TritonPlan)
        assert isinstance(kv_cache, PagedCache)
        plan.load()
        q_THD, k_TKD = _rows(q_THD), _rows(k_TKD)
        v_TKD = k_TKD if v_TKD is None else _rows(v_TKD)
        if plan.num_tokens:
            parts = -(-plan.num_tokens * self.spec.num_kv_heads // self.tiles.write_rows)
            kv_write_kernel[(parts,)](
                k_TKD, v_TKD, kv_cache.data, self._scales_of(kv_cache), plan.words, plan.num_tokens, *_strides(k_TKD),
                *_strides(v_TKD), *self._inverse_scales, **self._options.write,
            )  # fmt: skip
        return self._attend(q_THD, kv_cache, plan)

    def forward_rotary(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_PR: torch.Tensor,
        sin_PR: torch.Tensor,
        interleaved: bool,
        kv_cache: KVCache,
        plan: object,
    ) -> torch.Tensor:
        """Rotates q and k and writes k and v in one pass, then attends."""
        assert isinstance(plan, TritonPlan)
        assert isinstance(kv_cache, PagedCache)
        plan.load()
        q_THD, k_TKD, v_TKD = _rows(q_THD), _rows(k_TKD), _rows(v_TKD)
        turned_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if plan.num_tokens:
            heads, rows = (self.spec.num_heads, self.spec.num_kv_heads), self.tiles.write_rows
            parts = sum(-(-plan.num_tokens * n // rows) for n in heads)
            rotary_kv_write_kernel[(parts,)](
                q_THD, k_TKD, v_TKD, turned_THD, cos_PR, sin_PR, positions_T, kv_cache.data,
                self._scales_of(kv_cache), plan.words, plan.num_tokens, *_strides(q_THD), *_strides(k_TKD),
                *_strides(v_TKD), *self._inverse_scales, R=cos_PR.shape[1], INTERLEAVED=interleaved,
                **self._options.rotary_write,
            )  # fmt: skip
        return self._attend(turned_THD, kv_cache, plan)

    def _attend(self, q_THD: torch.Tensor, kv_cache: PagedCache, plan: TritonPlan) -> torch.Tensor:
        spec, options = self.spec, self._options
        out_THE = torch.empty((*q_THD.shape[:2], self._value_size), dtype=q_THD.dtype, device=q_THD.device)
        inputs = (q_THD, kv_cache.data, self._scales_of(kv_cache), self._slopes, plan.words)
        if plan.num_prompts:
            prompt_kernel[(plan.num_prompts, spec.num_kv_heads)](
                out_THE, *inputs, plan.prompts_at, *_strides(q_THD), *self._scales, **options.prompt
            )
        if plan.num_decodes:
            decode_kernel[(self._programs,)](
                out_THE, plan.partials, plan.partial_ml, *inputs, plan.decodes_at, *_strides(q_THD), *self._scales,
                **options.decode,
            )  # fmt: skip
        if plan.merge_grid:
            merge_kernel[(plan.merge_grid, spec.num_heads)](
                out_THE, plan.partials, plan.partial_ml, plan.words, plan.merges_at, **options.merge
            )
        return out_THE

    def _scales_of(self, kv_cache: PagedCache) -> torch.Tensor:
        """The cache's scales; any tensor where the kernels read none."""
        return self._slopes if kv_cache.scales is None else kv_cache.scales

    def _make_planner(self) -> Planner:
        """With the memory that steps keep: made with the first plan, for nothing is allocated before that."""
        spec, tiles = self.spec, self.tiles
        partial_shape = (spec.num_kv_heads, tiles.decode_rows, self._value_size)
        sizes = PlanSizes(
            block_size=self.shape.block_size,
            decode_tile=tiles.decode_rows,
            prompt_tile=tiles.prompt_rows,
            max_decode_rows=tiles.max_decode_rows,
            split=tiles.split,
            max_words=_MAX_WORDS if self._device.type != "cpu" else _MIN_WORDS,
            max_partials=max(tiles.workspace_bytes // (4 * math.prod(partial_shape)), 1),
        )
        memory = StepMemory(sizes, partial_shape, self._device)
        return Planner(spec, sizes, memory, pin_memory=self._pin_memory)


class _Options:
    """The constants of every launch, by kernel: made once, since a launch is short."""

    def __init__(
        self, shape: AttentionShape, tiles: Tiles, kv_dtype: str, *, has_scales: bool, native_fp8: bool
    ) -> None:
        spec = shape.spec
        d0, d1 = padded_sizes(spec)
        value_size = spec.value_size or spec.head_size
        heads = {"G": spec.num_heads // spec.num_kv_heads, "K": spec.num_kv_heads}
        stored = {"BLOCK_SIZE": shape.block_size, "FORMAT": FORMATS[kv_dtype], "TOKEN_SCALES": has_scales}
        common: dict[str, Any] = dict(
            **heads, **stored, D=spec.head_size, E=value_size, D0=d0, D1=d1, LATENT=spec.value_size is not None,
            WINDOW=spec.sliding_window or 0, SOFT_CAP=spec.soft_cap or 0.0, ALIBI=spec.alibi_slopes is not None,
            NATIVE=native_fp8,
        )  # fmt: skip
        self.prompt = dict(
            **common, BLOCK_M=tiles.prompt_rows, BLOCK_N=tiles.prompt_keys, STAGES=tiles.prompt_stages,
            num_warps=tiles.prompt_warps,
        )  # fmt: skip
        self.decode = dict(
            **common, BLOCK_M=tiles.decode_rows, BLOCK_N=tiles.decode_keys, STAGES=tiles.decode_stages,
            SPLIT=tiles.split, num_warps=tiles.decode_warps,
        )  # fmt: skip
        self.merge = dict(**heads, E=value_size, D0=d0, BLOCK_M=tiles.decode_rows, CHUNK=tiles.merge_chunk)
        self.write = dict(
            **stored, K=spec.num_kv_heads, D=spec.head_size, D_PADDED=power_of_two(spec.head_size),
            LATENT=spec.value_size is not None, ROWS=tiles.write_rows,
        )  # fmt: skip
        self.rotary_write = {**self.write, "H": spec.num_heads}
        del self.rotary_write["LATENT"]


def _check(shape: AttentionShape, kv_dtype: str) -> None:
    """Raises ConfigError where the kernels cannot serve."""
    if shape.dtype not in DTYPES:
        raise ConfigError(f"the Triton attention has no {shape.dtype}; it has {', '.join(DTYPES)}")
    if shape.block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, sorted(BLOCK_SIZES)))
        raise ConfigError(f"the Triton attention has no blocks of {shape.block_size} tokens; it has {known}")
    if kv_dtype not in FORMATS:
        raise ConfigError(f"the Triton attention has no KV cache of {kv_dtype}; it has {', '.join(FORMATS)}")
    if shape.spec.scale <= 0:
        raise ConfigError(f"the Triton attention needs a scale above 0, got {shape.spec.scale}")


def _score_scale(scale: float, soft_cap: float | None) -> float:
    """What scores are multiplied by, so that the exponential is a power of two; with a cap see attend_tiles."""
    log2_e = math.log2(math.e)
    return scale * log2_e if soft_cap is None else 2 * scale / soft_cap * log2_e


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With the entries of a head side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)
