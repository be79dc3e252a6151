"""Sizes of tiles: what fits a device's shared memory, the best first; a tuning table's values go before these.

The lists were made for what the compilers report (tests/platforms/triton/test_attention_aot.py holds them to it:
shared memory within the limit, no spilled registers) and for the arithmetic of the two kernels: a prompt wants large
tiles, so that keys are loaded once for many rows; a decode wants many bytes on their way, and several programs on each
processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from fairlead.errors import ConfigError
from fairlead.interface import AttentionSpec
from fairlead_triton.tuning import Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraits:
    """What the choice depends on; the defaults suit a device that nobody knows.

    `shared_memory_bytes` are those of one program at most. `async_copies`: loads go to shared memory without registers,
    so that a loop keeps a tile more there. `native_fp8`: the device converts OCP fp8 (both formats) itself.
    """

    shared_memory_bytes: int = 64 * 1024
    num_processors: int = 64
    warp_size: int = 32
    async_copies: bool = False
    native_fp8: bool = False

    @property
    def wide_matrix(self) -> bool:
        """Whether matrix instructions read their operands from shared memory: where it is that large, they do."""
        return self.async_copies and self.shared_memory_bytes > 200 * 1024

    def tile_registers(self, warps: int) -> int:
        """Words of a tile's results, scores and operands that a thread may hold before the compilers spill registers.

        With `wide_matrix` instructions, operands do not count. CDNA 4 has shared memory for tiles that its compiler has
        no registers for, once two warps share a processor's quarter.
        """
        if self.async_copies:
            return 160
        if self.warp_size == 64:
            return 72 if self.shared_memory_bytes > 128 * 1024 and warps > 4 else 100
        return 64

    @property
    def conversion_registers(self) -> int:
        """Words for each number of a tile that is being converted from 8 bits."""
        return 1 if self.async_copies else 2 if self.native_fp8 else 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Rows and keys of a tile, warps, loop stages, by kernel; `split` in tokens; a merge adds `merge_chunk` at once.

    `programs_per_processor` is how many programs share the decode kernel's list on each processor.
    """

    prompt_rows: int
    prompt_keys: int
    prompt_warps: int
    prompt_stages: int
    decode_rows: int
    decode_keys: int
    decode_warps: int
    decode_stages: int
    programs_per_processor: int
    split: int
    merge_chunk: int = 8
    max_decode_rows: int = 64
    """Rows of a sequence (new tokens times heads of a kv-head) that the decode kernel takes at most."""
    write_rows: int = 8
    workspace_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        sizes = [getattr(self, f.name) for f in fields(self) if f.name.endswith(("_rows", "_keys", "_chunk", "split"))]
        if any(n <= 0 or n & (n - 1) for n in sizes):
            raise ConfigError(f"tile sizes of the Triton attention must be powers of two, got {self!r}")
        if self.split % self.decode_keys:
            raise ConfigError(f"split {self.split} must be a multiple of decode_keys {self.decode_keys}")


def tuned(device: str) -> Mapping[str, int]:
    """What the tuning table says of a device's tiles, for `choose_tiles`."""
    return {name: value for name, value in Tuning(device).of("attention").items() if value}


def traits_of(target: str, *, num_processors: int) -> DeviceTraits:
    """What is known of a compiler's target ("sm_90", "gfx942"); of others the defaults, which fit wherever Triton runs.

    Sources: CUDA C++ Programming Guide, "Technical specifications per compute capability"; AMD's CDNA 3, CDNA 4 and
    RDNA 3 instruction set guides, LDS and VGPRs.
    """
    if target.startswith("sm_"):
        generation = int(target.removeprefix("sm_").rstrip("af"))
        large = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
        return DeviceTraits(
            shared_memory_bytes=large.get(generation, 99 if generation >= 80 else 64) * 1024,
            num_processors=num_processors,
            async_copies=generation >= 80,
            native_fp8=generation >= 89,
        )
    if target.startswith("gfx9"):
        return DeviceTraits(
            shared_memory_bytes=(160 if target == "gfx950" else 64) * 1024,
            num_processors=num_processors,
            warp_size=64,
            native_fp8=target == "gfx950",
        )
    return DeviceTraits(num_processors=num_processors)


def power_of_two(n: int) -> int:
    """The least one that is not below n, and 16 at least: what a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())


def padded_sizes(spec: AttentionSpec) -> tuple[int, int]:
    """(D0, D1): a head, or where keys hold the values these and the rest of the keys, each padded."""
    if spec.value_size is None:
        return power_of_two(spec.head_size), 0
    rest = spec.head_size - spec.value_size
    return power_of_two(spec.value_size), power_of_two(rest) if rest else 0


def choose_tiles(
    spec: AttentionSpec, *, item_bytes: int, kv_item_bytes: int, traits: DeviceTraits, tuning: Mapping[str, int]
) -> Tiles:
    """The first of the lists that fits, changed by what `tuning` says (names of Tiles).

    Raises ConfigError on a name that is none, or where nothing fits.
    """
    d0, d1 = padded_sizes(spec)
    planes = 1 if spec.value_size is not None else 2
    key_bytes = (d0 * planes + d1) * kv_item_bytes
    if kv_item_bytes < item_bytes:
        key_bytes += d0 * planes * item_bytes // 2  # a converted tile goes through shared memory again

    def fits(rows: int, keys: int, stages: int) -> bool:
        copies = stages if traits.async_copies else max(stages - 1, 1)
        scores = rows * keys * item_bytes
        queries = rows * (d0 + d1) * item_bytes
        return copies * keys * key_bytes + max(queries, scores) <= traits.shared_memory_bytes

    def suits(rows: int, keys: int, warps: int) -> bool:
        items = item_bytes / 4
        words = rows * (d0 + d1 + keys * (1 + items))
        if not (traits.wide_matrix and rows >= 64 and item_bytes == 2):
            words += rows * d0 * items + keys * (planes * d0 + d1) * items
            if spec.alibi_slopes is not None:
                words += 2 * rows * keys  # distances, and what they add
        if planes == 1 and not traits.async_copies:
            words += keys * d0 * items  # held as keys and as values
        if kv_item_bytes < item_bytes and (rows > 16 or not (traits.async_copies or traits.warp_size == 64)):
            words += keys * d0 * traits.conversion_registers
        if item_bytes == 4:
            words *= 3  # multiplied without matrix instructions, each thread with operands of its own
        return words <= traits.tile_registers(warps) * warps * traits.warp_size

    prompts = [c for c in _PROMPT if fits(c[0], c[1], c[3])]
    prompt = next((c for c in prompts if suits(*c[:3])), prompts[-1] if prompts else None)
    rows = min(power_of_two(spec.num_heads // spec.num_kv_heads), 64)
    decodes = [(r, *c) for r in (64, 32, 16) if r <= rows for c in _DECODE if fits(r, c[0], c[2])]
    decode = next((c for c in decodes if suits(*c[:3])), decodes[-1] if decodes else None)
    if prompt is None or decode is None:
        raise ConfigError(
            f"the Triton attention needs more than {traits.shared_memory_bytes} bytes of shared memory for heads of "
            f"{spec.head_size} in {item_bytes}-byte numbers; take another attention backend"
        )
    tiles = Tiles(
        prompt_rows=prompt[0], prompt_keys=prompt[1], prompt_warps=prompt[2], prompt_stages=prompt[3],
        decode_rows=decode[0], decode_keys=decode[1], decode_warps=decode[2], decode_stages=decode[3],
        programs_per_processor=3 if traits.shared_memory_bytes > 128 * 1024 and traits.async_copies else 2,
        split=256 if planes == 2 else 1024,
    )  # fmt: skip
    unknown = set(tuning) - {f.name for f in fields(Tiles)}
    if unknown:
        raise ConfigError(f"the tuning of the Triton attention names {', '.join(sorted(unknown))}, which it has not")
    return replace(tiles, **dict(tuning))


# (rows, keys, warps, stages)
_PROMPT = (
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 32, 8, 2),
    (32, 32, 4, 2),
    (32, 32, 8, 2),
    (16, 32, 4, 2),
    (16, 32, 8, 2),
    (16, 16, 4, 2),
    (16, 16, 8, 1),
)
# (keys, warps, stages)
_DECODE = ((64, 4, 3), (64, 4, 2), (64, 8, 2), (32, 4, 3), (32, 4, 2), (32, 8, 2), (16, 4, 2), (16, 8, 2), (16, 8, 1))
