"""The tuning table: what a device gets, and what is refused when the data is read."""

from dataclasses import fields

import pytest

from fairlead.errors import ConfigError
from fairlead.interface import AttentionSpec
from fairlead_triton.attention import tiles
from fairlead_triton.tuning import Tuning, read_table

KERNEL = """
[k.default]
block = 64
num_warps = 4
max_rows = 3
[k.gfx]
block = 32
[k.gfx942]
num_warps = 8
"""


def test_a_device_overrides_its_family_and_that_the_default() -> None:
    table = read_table({"a.toml": KERNEL})
    assert dict(Tuning("sm_90", table).of("k")) == {"block": 64, "num_warps": 4, "max_rows": 3}
    assert dict(Tuning("gfx90a", table).of("k")) == {"block": 32, "num_warps": 4, "max_rows": 3}
    assert dict(Tuning("gfx942", table).of("k")) == {"block": 32, "num_warps": 8, "max_rows": 3}


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_120", "gfx90a", "gfx942", "gfx1100", "xpu"])
def test_the_packages_own_data_holds_for_every_device(device: str) -> None:
    tuning = Tuning(device)
    assert {"norm", "draw", "matmul_skinny", "moe_matmul"} <= set(tuning)
    assert all(tuning.of(kernel) for kernel in tuning)


@pytest.mark.parametrize("device", ["", "cpu", "cuda:0", "sm_90 "])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="no device is called"):
        Tuning(device)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[k", "a.toml is not TOML"),
        ("k = 1", "a.toml: k has no section 'default'"),
        ("[k.sm_90]\nblock = 1", "a.toml: k has no section 'default'"),
        ("[k.default]\nblock = 48", "a.toml: k.default.block must be a power of two, found 48"),
        ("[k.default]\nblock_m = 0", "a.toml: k.default.block_m must be a power of two, found 0"),
        ("[k.default]\nblock = 16.0", "a whole number from 0 on, found 16.0"),
        ("[k.default]\nmax_rows = -1", "a whole number from 0 on, found -1"),
        ("[k.default]\nmax_rows = true", "a whole number from 0 on, found True"),
        ("[k.default]\nnum_warps = 64", "at most 32, found 64"),
        ("[k.default]\nblock = 16\n[k.sm_90]\nblok = 16", "k.sm_90.blok is not set by 'default', which has block"),
        ("[k.default]\nblock = 16\n[k.h100]\nblock = 16", "k.h100 is no device"),
        ("k.default = {block = 16}\nk.sm_90 = 3", "k.sm_90 must be a section, found 3"),
    ],
)
def test_data_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        read_table({"a.toml": text})
    assert message in str(found.value)


def test_a_kernel_is_in_one_file() -> None:
    with pytest.raises(ConfigError, match=r"b\.toml: kernel 'k' is in another file too"):
        read_table({"a.toml": KERNEL, "b.toml": KERNEL})


def test_the_tiles_of_the_attention_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {field.name for field in fields(tiles.Tiles)}
    assert set(Tuning("sm_90").of("attention")) == names
    assert tiles.tuned("sm_90") == {}, "0 leaves it to the lists"
    table = {"attention": {"default": {"decode_keys": 0, "split": 0}, "sm_90": {"decode_keys": 32}}}
    monkeypatch.setattr(tiles, "Tuning", lambda device: Tuning(device, table))
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=0.1)
    chosen = {
        target: tiles.choose_tiles(
            spec,
            item_bytes=2,
            kv_item_bytes=2,
            traits=tiles.traits_of(target, num_processors=100),
            tuning=tiles.tuned(target),
        )
        for target in ("sm_90", "sm_100")
    }
    assert (chosen["sm_90"].decode_keys, chosen["sm_100"].decode_keys) == (32, 64)
