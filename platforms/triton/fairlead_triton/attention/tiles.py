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


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraits:
    """What the choice depends on. `shared_memory_bytes` are those of one program at most.

    `matrix_rows` are the rows from which a tile is multiplied with the device's widest instructions. `async_copies`:
    loads go to shared memory without registers, and a loop of `stages` keeps so many tiles there; elsewhere the next
    tile waits in registers. `native_fp8`: the device converts OCP fp8 (both formats) itself.
    """

    shared_memory_bytes: int = 64 * 1024
    num_processors: int = 64
    async_copies: bool = False
    native_fp8: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Rows and keys of a tile, warps, loop stages, by kernel; `split` in tokens; merges take `merge_chunk` splits at once.

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
    programs_per_processor: int = 4
    split: int = 512
    merge_chunk: int = 8
    max_decode_rows: int = 64
    """Rows of a sequence (new tokens times heads of a kv-head) that the decode kernel takes at most."""
    write_heads: int = 8
    workspace_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        sizes = [getattr(self, f.name) for f in fields(self) if f.name.endswith(("_rows", "_keys", "_chunk", "split"))]
        if any(n <= 0 or n & (n - 1) for n in (*sizes, self.write_heads)):
            raise ConfigError(f"tile sizes of the Triton attention must be powers of two, got {self!r}")
        if self.split % self.decode_keys:
            raise ConfigError(f"split {self.split} must be a multiple of decode_keys {self.decode_keys}")


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

    group = spec.num_heads // spec.num_kv_heads
    prompt = next((c for c in _PROMPT if _suits(c, d0, item_bytes) and fits(c[0], c[1], c[3])), None)
    decode_rows = min(power_of_two(group), 64 if d0 <= 256 else 32 if traits.async_copies else 16)
    decode = next((c for c in _DECODE if _suits((decode_rows, *c), d0, item_bytes) and fits(decode_rows, c[0], c[2])), None)
    if prompt is None or decode is None:
        raise ConfigError(
            f"the Triton attention needs more than {traits.shared_memory_bytes} bytes of shared memory for heads of "
            f"{spec.head_size} in {item_bytes}-byte numbers; take another attention backend"
        )
    tiles = Tiles(
        prompt_rows=prompt[0], prompt_keys=prompt[1], prompt_warps=prompt[2], prompt_stages=prompt[3],
        decode_rows=decode_rows, decode_keys=decode[0], decode_warps=decode[1], decode_stages=decode[2],
        max_decode_rows=max(64, decode_rows), split=512 if planes == 2 else 1024,
    )  # fmt: skip
    unknown = set(tuning) - {f.name for f in fields(Tiles)}
    if unknown:
        raise ConfigError(f"the tuning of the Triton attention names {', '.join(sorted(unknown))}, which it has not")
    return replace(tiles, **dict(tuning))


# (rows, keys, warps, stages)
_PROMPT = (
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (32, 16, 4, 2),
    (16, 16, 4, 1),
)
# (keys, warps, stages)
_DECODE = ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (16, 4, 2), (16, 4, 1))


def _suits(candidate: tuple[int, int, int, int], d0: int, item_bytes: int) -> bool:
    """Whether the results and scores of a tile stay in registers: at most 128 of the 255 that a thread has."""
    rows, keys, warps, _ = candidate
    words = rows * (d0 + keys * (1 + item_bytes / 4))
    return words / (warps * 32) <= 160
