"""Step 3: attention, norms and matmuls as shares of the ceilings.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, N rows, I input features, O output features.
"""

from collections.abc import Callable, Iterator
from functools import partial

from fairlead.interface import UNQUANTIZED, AttentionShape, AttentionSpec, LinearShape
from fairlead.ops.table import choose_providers
from gpubench import synthetic
from gpubench.harness import Card, Case, Settings
from gpubench.models import config_of, linear_shapes

GROUPS = ("attention", "norms", "matmul")

DECODES = {"64 x 4096": (64, 4096), "1 x 8192": (1, 8192), "8 x 8192": (8, 8192), "256 x 512": (256, 512)}
PREFILLS = {"8192": 8192, "2048": 2048}
ROTATED_BYTES = 256 << 20  # of one matrix's copies, so that none is left in a cache from the call before

Cases = Iterator[tuple[str, Callable[[], Case]]]


def cases(settings: Settings, group: str) -> Cases:
    """Of one group."""
    card = Card(settings)
    if group == "attention":
        for head_size in settings.pick((128, 64), (16,)):
            for name, (num_seqs, context) in settings.pick(DECODES, {"64 x 4096": (3, 70)}).items():
                run = partial(attention, card, head_size, num_seqs, 1, context)
                yield f"decode attention {name}, D {settings.pick(head_size, 128)}", run
            for name, context in settings.pick(PREFILLS, {"8192": 64}).items():
                run = partial(attention, card, head_size, 1, context, context)
                yield f"prefill attention {name}, D {settings.pick(head_size, 128)}", run
    elif group == "norms":
        for num_rows in settings.pick((64, 8192, 65_536), (3,)):
            for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul"):
                yield f"{name} {num_rows} x {_width(settings)}", partial(elementwise, card, name, num_rows)
    else:
        table = choose_providers(card.platform, dtype=settings.dtype)[1]
        for scheme in table.schemes:
            for layer in linear_shapes(config_of("llama8b", is_tiny=settings.is_tiny)):
                for num_rows in settings.pick((1, 8, 64, 256, 8192), (1, 3)):
                    yield f"{scheme} {layer}, {num_rows} rows", partial(matmul, card, scheme, layer, num_rows)


def _width(settings: Settings) -> int:
    return int(config_of("llama8b", is_tiny=settings.is_tiny).hidden_size)


def attention(card: Card, head_size: int, num_seqs: int, num_new: int, context: int) -> Case:
    """One layer of 32 query heads on 8, through the platform's preferred backend, its plan made before.

    A decode's share is that of the copy bandwidth, over keys and values read; a prefill's that of the matmul rate.
    """
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=head_size, scale=head_size**-0.5)
    dtype, block_size = card.settings.torch_dtype, card.platform.defaults.block_size
    shape = AttentionShape(spec=spec, num_layers=2, block_size=block_size, dtype=card.settings.dtype)
    name = card.platform.attention_backends()[0]
    backend = card.platform.attention(name, shape)
    num_blocks = synthetic.blocks_needed(num_seqs, context, block_size)
    layers = backend.allocate(num_blocks)
    synthetic.fill_cache(backend, layers, spec, num_blocks, block_size, device=card.device, dtype=dtype)
    tables_SB = synthetic.tables(num_seqs, context, block_size)
    plan = backend.plan(synthetic.metadata_of(tables_SB, num_new, context, block_size))
    q_THD = card.randn(num_seqs * num_new, spec.num_heads, head_size)
    k_TKD, v_TKD = (card.randn(num_seqs * num_new, spec.num_kv_heads, head_size) for _ in range(2))
    timing = card.time(lambda i: backend.forward(q_THD, k_TKD, v_TKD, layers[i % 2], plan))
    found = {**timing.as_case(), "backend": name}
    if num_new == 1:
        num_bytes = 2 * num_seqs * context * spec.num_kv_heads * head_size * dtype.itemsize
        rate = num_bytes / timing.median_s
        return {**found, "bytes_per_s": rate, "share": rate / card.copy_bytes_per_s, "of": "copy bandwidth"}
    ops = 4 * spec.num_heads * head_size * num_seqs * num_new * (context - (num_new - 1) / 2)
    rate = ops / timing.median_s
    return {**found, "ops_per_s": rate, "share": rate / card.matmul_ops_per_s, "of": "matmul rate"}


def elementwise(card: Card, name: str, num_rows: int) -> Case:
    """Share of the copy bandwidth over what is read and written. Copies rotate: small ones would stay in a cache."""
    ops, _, chosen = choose_providers(card.platform, dtype=card.settings.dtype)
    width = _width(card.settings)
    columns = 2 * width if name == "silu_and_mul" else width
    itemsize = card.settings.torch_dtype.itemsize
    num_copies = card.settings.pick(min(max(ROTATED_BYTES // (num_rows * columns * itemsize), 1), 32), 1)
    inputs = [card.randn(num_rows, columns) for _ in range(num_copies)]
    others = [card.randn(num_rows, columns) for _ in range(num_copies if "add" in name else 1)]
    weight = card.randn(width)

    def work(i: int) -> object:
        x, residual = inputs[i % num_copies], others[i % len(others)]
        if name == "rms_norm":
            return ops.rms_norm(x, weight, 1e-5)
        return ops.fused_add_rms_norm(x, residual, weight, 1e-5) if "add" in name else ops.silu_and_mul(x)

    timing = card.time(work)
    moved = num_rows * itemsize * width * {"rms_norm": 2, "fused_add_rms_norm": 4, "silu_and_mul": 3}[name]
    rate = moved / timing.median_s
    share = rate / card.copy_bytes_per_s
    provider = chosen[name]
    return {**timing.as_case(), "provider": provider, "bytes_per_s": rate, "share": share, "of": "copy bandwidth"}


def matmul(card: Card, scheme: str, layer: str, num_rows: int) -> Case:
    """Share of the limit: its arithmetic at the rate of the run's dtype, or its bytes at the copy bandwidth, whichever
    takes longer. (Schemes whose arithmetic is in 8 bits can be above 1 where arithmetic is the limit.)"""
    num_in, num_out = linear_shapes(config_of("llama8b", is_tiny=card.settings.is_tiny))[layer]
    shape = LinearShape(in_features=num_in, out_features=num_out, dtype=card.settings.dtype)
    table = choose_providers(card.platform, dtype=card.settings.dtype)[1]
    method = table.choose(scheme, shape)
    own = {m.name for m in card.platform.linear_methods().get(scheme, ())}
    if scheme != UNQUANTIZED and method.name not in own:
        return {"skipped": "the platform has no method of its own for this scheme"}
    weight_bytes = method.packed_bytes(shape)
    num_copies = card.settings.pick(max(-(-ROTATED_BYTES // weight_bytes), 1), 1)
    packed = [method.pack({"weight": card.randn(num_out, num_in)}) for _ in range(num_copies)]
    x_NI = card.randn(num_rows, num_in)
    timing = card.time(lambda i: method.apply(x_NI, packed[i % num_copies], None))
    ops = 2 * num_rows * num_in * num_out
    moved = weight_bytes + num_rows * (num_in + num_out) * card.settings.torch_dtype.itemsize
    arithmetic_s, memory_s = ops / card.matmul_ops_per_s, moved / card.copy_bytes_per_s
    return {
        **timing.as_case(),
        "method_name": method.name,
        "ops_per_s": ops / timing.median_s,
        "bytes_per_s": moved / timing.median_s,
        "share": max(arithmetic_s, memory_s) / timing.median_s,
        "of": "matmul rate" if arithmetic_s > memory_s else "copy bandwidth",
    }
