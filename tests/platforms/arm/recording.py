"""Records the calls of the kernels' tests, what they read and what they write, for driver.cpp to replay elsewhere.

A record is one call after the other: name; arguments, each a number or a buffer; buffers, each with its contents before
the call, the places in it that hold pointers to others, how to compare it afterwards, and what it should then hold.
"""

import ctypes
import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pytest

from fairlead.ops.linear import TOLERANCE as LINEAR_TOLERANCE
from fairlead.ops.table import TOLERANCE
from fairlead_cpu import native, native_attention

DTYPES = ("float32", "bfloat16")
BYTES = (4, 2)


class Check(enum.IntEnum):
    """The same in driver.cpp: not at all, each byte, norm of the difference over that of the result, each element."""

    NONE = 0
    BYTES = 1
    NORM = 2
    ELEMENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Memory that a call reads or writes: `num_bytes` from `address` on. `pointers` are (offset, buffer behind it)."""

    address: int
    num_bytes: int
    check: Check = Check.NONE
    is_bf16: bool = False
    tolerance: float = 0.0
    rows: int = 0
    columns: int = 0
    stride: int = 0
    pointers: tuple[tuple[int, "Buffer"], ...] = ()
    is_read: bool = True

    def contents(self) -> bytes:
        """What the memory holds; of what is only written, nothing that could be taken for a result."""
        if not self.is_read:
            return b"\xff" * self.num_bytes
        return self.bytes()

    def bytes(self) -> bytes:
        """What the memory holds."""
        return ctypes.string_at(self.address, self.num_bytes) if self.num_bytes else b""


Buffers = dict[int, Buffer]  # by argument


def rows(address: int, num_rows: int, columns: int, stride: int, itemsize: int) -> Buffer:
    """Rows that a call reads."""
    return Buffer(address=address, num_bytes=((num_rows - 1) * stride + columns) * itemsize if num_rows else 0)


def result(address: int, is_bf16: int, num_rows: int, columns: int, *, norm: bool = False, stride: int = 0) -> Buffer:
    """Rows of floats that a call writes; with `norm` they are compared as the contract compares linear layers."""
    table = LINEAR_TOLERANCE["unquantized"] if norm else TOLERANCE
    return Buffer(
        address=address,
        num_bytes=((num_rows - 1) * (stride or columns) + columns) * BYTES[is_bf16] if num_rows else 0,
        check=Check.NORM if norm else Check.ELEMENTS,
        is_bf16=bool(is_bf16),
        tolerance=table[DTYPES[is_bf16]],
        rows=num_rows,
        columns=columns,
        stride=stride or columns,
        is_read=False,
    )


def exact(address: int, num_bytes: int) -> Buffer:
    """Memory that holds the same bytes everywhere."""
    return Buffer(address=address, num_bytes=num_bytes, check=Check.BYTES, is_read=False)


class Calls:
    """Which memory each function's pointers mean, from its arguments."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._plan_bytes: dict[int, int] = {}

    def fl_rms_norm(self, a: Sequence[Any]) -> Buffers:
        bf16, _, x, x_stride, residual, residual_stride, weight, out, total, num_rows, size, _ = a
        item = BYTES[bf16]
        found = {2: rows(x, num_rows, size, x_stride, item), 6: rows(weight, 1, size, size, item)}
        if residual:
            found[4] = rows(residual, num_rows, size, residual_stride, item)
            found[8] = result(total, bf16, num_rows, size)
        return found | {7: result(out, bf16, num_rows, size)}

    def fl_layer_norm(self, a: Sequence[Any]) -> Buffers:
        bf16, x, x_stride, weight, bias, out, num_rows, size, _ = a
        item = BYTES[bf16]
        found = {1: rows(x, num_rows, size, x_stride, item), 3: rows(weight, 1, size, size, item)}
        if bias:
            found[4] = rows(bias, 1, size, size, item)
        return found | {5: result(out, bf16, num_rows, size)}

    def fl_rotary(self, a: Sequence[Any]) -> Buffers:
        (bf16, _, q, q_token, q_head, num_q, k, k_token, k_head, num_k, positions, cos, sin, size, num_tokens) = a[:15]
        item, seen = BYTES[bf16], self._numbers(positions, num_tokens, ctypes.c_int64)
        table = (int(seen.max()) + 1) * size * item if num_tokens else 0
        return {
            2: rows(q, num_tokens, (num_q - 1) * q_head + size, q_token, item),
            6: rows(k, num_tokens, (num_k - 1) * k_head + size, k_token, item),
            10: rows(positions, num_tokens, 1, 1, 8),
            11: Buffer(address=cos, num_bytes=table),
            12: Buffer(address=sin, num_bytes=table),
            15: result(a[15], bf16, num_tokens, num_q * size),
            16: result(a[16], bf16, num_tokens, num_k * size),
        }

    def fl_gate(self, a: Sequence[Any]) -> Buffers:
        bf16, _, x, x_stride, out, num_rows, size = a
        return {2: rows(x, num_rows, 2 * size, x_stride, BYTES[bf16]), 4: result(out, bf16, num_rows, size)}

    def fl_embedding(self, a: Sequence[Any]) -> Buffers:
        ids, num_ids, weight, row_bytes, out = a
        most = int(self._numbers(ids, num_ids, ctypes.c_int64).max()) + 1 if num_ids else 0
        return {
            0: rows(ids, num_ids, 1, 1, 8),
            2: Buffer(address=weight, num_bytes=most * row_bytes),
            4: exact(out, num_ids * row_bytes),
        }

    def _sizes(self, scheme: int, pair: int, out: int, k: int) -> tuple[int, int, int]:
        """Bytes of a packed weight, its scales, its sums."""
        columns = self._library.fl_packed_columns(pair, ctypes.c_int64(out))
        self._library.fl_packed_bytes.restype = ctypes.c_int64
        weight = self._library.fl_packed_bytes(scheme, pair, ctypes.c_int64(out), ctypes.c_int64(k))
        return weight, {2: 4 * columns, 3: 2 * columns * (-(-k // 64) * 2)}.get(scheme, 0), 4 * columns * (scheme == 2)

    def fl_pack_float(self, a: Sequence[Any]) -> Buffers:
        scheme, pair, source, dtype, stride, out, k, to = a
        read = rows(source, out * (1 + pair), k, stride, BYTES[dtype])
        return {2: read, 7: exact(to, self._sizes(scheme, pair, out, k)[0])}

    def fl_pack_int8(self, a: Sequence[Any]) -> Buffers:
        pair, source, dtype, stride, out, k, to, scale, sums = a
        sizes = self._sizes(2, pair, out, k)
        written = {i: exact(p, n) for i, p, n in zip((6, 7, 8), (to, scale, sums), sizes, strict=True)}
        return {1: rows(source, out * (1 + pair), k, stride, BYTES[dtype])} | written

    def fl_pack_int4(self, a: Sequence[Any]) -> Buffers:
        pair, source, dtype, stride, out, k, to, scale = a
        weight, scales, _ = self._sizes(3, pair, out, k)
        read = rows(source, out * (1 + pair), k, stride, BYTES[dtype])
        return {1: read, 6: exact(to, weight), 7: exact(scale, scales)}

    def _layers(self, at: int, count: int) -> Buffer:
        """Records of linear layers, one after the other."""
        pointers, size = [], ctypes.sizeof(native.LinearLayer)
        for i in range(count):
            layer = native.LinearLayer.from_address(at + i * size)
            pair = int(1 <= layer.activation <= 3)
            sizes = self._sizes(layer.scheme, pair, layer.out, layer.k)
            for name, num_bytes in zip(("weight", "scale", "sums"), sizes, strict=True):
                if getattr(layer, name):
                    behind = Buffer(address=getattr(layer, name), num_bytes=num_bytes)
                    pointers.append((i * size + getattr(native.LinearLayer, name).offset, behind))
        return Buffer(address=at, num_bytes=count * size, pointers=tuple(pointers))

    def fl_linear(self, a: Sequence[Any]) -> Buffers:
        record, x, x_stride, num_rows, bias, residual, residual_stride, y, y_stride = a
        layer = native.LinearLayer.from_address(record)
        pair = int(1 <= layer.activation <= 3)
        found = {
            0: self._layers(record, 1),
            1: rows(x, num_rows, layer.k, x_stride, BYTES[layer.x_dtype]),
            7: result(y, layer.y_dtype, num_rows, layer.out, norm=True, stride=y_stride),
        }
        if bias:
            found[4] = rows(bias, 1 + pair, layer.out, layer.out, BYTES[layer.y_dtype])
        if residual and residual != y:
            found[5] = rows(residual, num_rows, layer.out, residual_stride, BYTES[layer.y_dtype])
        elif residual:
            found[5] = found[7] = replace(found[7], is_read=True)
        return found

    def fl_moe(self, a: Sequence[Any]) -> Buffers:
        record, x, x_stride, num_tokens, logits_are_bf16, logits, logits_stride, correction, scratch, y = a
        moe = native.MoeLayer.from_address(record)
        enter = native.LinearLayer.from_address(moe.enter)
        pointers = tuple(
            (getattr(native.MoeLayer, name).offset, self._layers(getattr(moe, name), moe.num_experts))
            for name in ("enter", "leave")
        )
        needed = self._library.fl_moe_scratch_bytes
        needed.restype, needed.argtypes = native.SIGNATURES["fl_moe_scratch_bytes"]
        found = {
            0: Buffer(address=record, num_bytes=ctypes.sizeof(moe), pointers=pointers),
            1: rows(x, num_tokens, enter.k, x_stride, BYTES[enter.x_dtype]),
            5: rows(logits, num_tokens, moe.num_experts, logits_stride, BYTES[bool(logits_are_bf16)]),
            8: Buffer(address=scratch, num_bytes=needed(record, num_tokens)),
            9: result(y, enter.x_dtype, num_tokens, enter.k, norm=True),
        }
        if correction:
            found[7] = rows(correction, 1, moe.num_experts, moe.num_experts, 4)
        return found

    def fl_draw(self, a: Sequence[Any]) -> Buffers:
        probs, stride, uniform, num_rows, size, tokens = a
        read = rows(probs, num_rows, size, stride, 4)
        return {0: read, 2: rows(uniform, num_rows, 1, 1, 8), 5: exact(tokens, 8 * num_rows)}

    def fl_draw_filtered(self, a: Sequence[Any]) -> Buffers:
        return self.fl_draw(a) | {2: rows(a[2], 4, a[3], a[3], 8)}

    def fl_token_bitmask(self, a: Sequence[Any]) -> Buffers:
        bf16, logits, stride, words, words_stride, out, num_rows, size = a
        return {
            1: rows(logits, num_rows, size, stride, BYTES[bf16]),
            3: rows(words, num_rows, -(-size // 32), words_stride, 4),
            5: exact(out, num_rows * size * BYTES[bf16]),
        }

    def fl_penalties(self, a: Sequence[Any]) -> Buffers:
        logits, index, *_, count = a
        most = int(self._numbers(index, count, ctypes.c_int64).max()) + 1 if count else 0
        penalties = {i: rows(a[i], count, 1, 1, 4) for i in (2, 3, 4)}
        written = replace(exact(logits, 4 * most), is_read=True)
        return {0: written, 1: rows(index, count, 1, 1, 8)} | penalties

    def _adapters(self, at: int, adapter: int, num_rows: int, num_bytes: int) -> tuple[Buffer, Buffer]:
        """The matrices up to the last that a row has, and the adapters of the rows."""
        most = int(self._numbers(adapter, num_rows, ctypes.c_int64).max()) + 1 if num_rows else 0
        return Buffer(address=at, num_bytes=most * num_bytes), rows(adapter, num_rows, 1, 1, 8)

    def fl_lora_shrink(self, a: Sequence[Any]) -> Buffers:
        bf16, x, x_stride, matrix, adapter, out, num_rows, rank, size = a
        matrices, adapters = self._adapters(matrix, adapter, num_rows, rank * size * BYTES[bf16])
        read = rows(x, num_rows, size, x_stride, BYTES[bf16])
        return {1: read, 3: matrices, 4: adapters, 5: result(out, 0, num_rows, rank)}

    def fl_lora_expand(self, a: Sequence[Any]) -> Buffers:
        bf16, y, y_stride, h, h_stride, matrix, adapter, out, num_rows, size, rank = a
        matrices, adapters = self._adapters(matrix, adapter, num_rows, rank * size * BYTES[bf16])
        return {
            1: rows(y, num_rows, size, y_stride, BYTES[bf16]),
            3: rows(h, num_rows, rank, h_stride, 4),
            5: matrices,
            6: adapters,
            7: result(out, bf16, num_rows, size),
        }

    def _shape(self, address: int) -> Buffer:
        shape = native_attention._Shape.from_address(address)
        slopes = ctypes.cast(shape.alibi_slopes, ctypes.c_void_p).value
        pointers = ()
        if slopes:
            offset = native_attention._Shape.alibi_slopes.offset
            pointers = ((offset, Buffer(address=slopes, num_bytes=4 * shape.num_heads)),)
        return Buffer(address=address, num_bytes=ctypes.sizeof(shape), pointers=pointers)

    def fl_attention_plan(self, a: Sequence[Any]) -> Buffers:
        shape, num_sequences, query_lens, seq_lens, tables, table_stride, slots, num_tokens, out, capacity = a
        function = self._library.fl_attention_plan
        function.restype, function.argtypes = native.SIGNATURES["fl_attention_plan"]
        needed = function(*a[:9], 0)
        table = rows(tables, num_sequences, table_stride, table_stride, 4)
        slot = rows(slots, num_tokens, 1, 1, 4)
        found = {
            0: self._shape(shape),
            2: rows(query_lens, num_sequences, 1, 1, 4),
            3: rows(seq_lens, num_sequences, 1, 1, 4),
            4: table,
            6: slot,
        }
        if needed <= capacity:
            self._plan_bytes[out] = needed
            plan = Buffer(address=out, num_bytes=needed, check=Check.BYTES, pointers=((0, table), (8, slot)))
            found[8] = replace(plan, is_read=False)
        return found

    def fl_attention(self, a: Sequence[Any]) -> Buffers:
        shape_at, plan_at, q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, cache, out, partials = a
        shape = native_attention._Shape.from_address(shape_at)
        words = self._numbers(plan_at, 5, ctypes.c_int64)
        tables_at, slots_at, table_stride, num_tokens, num_sequences = map(int, words)
        table = self._numbers(tables_at, table_stride * num_sequences, ctypes.c_int32)
        slots = self._numbers(slots_at, num_tokens, ctypes.c_int32)
        num_blocks = max([0, *table, *(slots // shape.block_size)]) + 1
        self._library.fl_attention_block_bytes.restype = ctypes.c_int64
        self._library.fl_attention_scratch_bytes.restype = ctypes.c_int64
        block_bytes = self._library.fl_attention_block_bytes(ctypes.c_void_p(shape_at))
        scratch = self._library.fl_attention_scratch_bytes(ctypes.c_void_p(shape_at), ctypes.c_void_p(plan_at))
        item, num_queries = BYTES[shape.is_bf16], num_tokens if num_sequences else 0  # else it only writes the cache
        pointers = ((0, rows(tables_at, 1, len(table), 0, 4)), (8, rows(slots_at, 1, len(slots), 0, 4)))

        def heads(at: int, token: int, head: int, count: int) -> Buffer:
            return rows(at, num_tokens, (count - 1) * head + shape.head_size, token, item)

        return {
            0: self._shape(shape_at),
            1: Buffer(address=plan_at, num_bytes=self._plan_bytes[plan_at], pointers=pointers),
            2: heads(q, q_token, q_head, shape.num_heads),
            5: heads(k, k_token, k_head, shape.num_kv_heads),
            8: heads(v, v_token, v_head, shape.num_kv_heads),
            11: replace(exact(cache, int(num_blocks) * block_bytes), is_read=True),
            12: result(out, shape.is_bf16, num_queries, shape.num_heads * shape.value_size),
            13: Buffer(address=partials, num_bytes=scratch),
        }

    @staticmethod
    def _numbers(address: int, count: int, kind: Any) -> np.ndarray[Any, Any]:
        return np.ctypeslib.as_array((kind * count).from_address(address)) if count else np.zeros(0, np.int64)


class Recorder:
    """Writes calls into a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def record(self, name: str, arguments: Sequence[Any], kinds: Sequence[type], named: Buffers, call: Callable) -> Any:
        """Makes the call and writes it down."""
        every: dict[tuple[int, int], Buffer] = {}

        def add(buffer: Buffer) -> None:
            known = every.get((buffer.address, buffer.num_bytes))
            if known is None or known.check is Check.NONE:
                every[buffer.address, buffer.num_bytes] = buffer
            for _, other in buffer.pointers:
                add(other)

        for buffer in named.values():
            add(buffer)
        index = {key: i for i, key in enumerate(every)}
        before = [buffer.contents() for buffer in every.values()]
        returned = call(*arguments)
        parts = [struct.pack("<I", len(name)), name.encode(), struct.pack("<I", len(arguments))]
        for i, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
            if i in named:
                parts.append(struct.pack("<IQ", 1, index[named[i].address, named[i].num_bytes]))
            elif kind is ctypes.c_float:
                parts.append(struct.pack("<If4x", 0, argument))
            else:
                is_pointer = kind is ctypes.c_void_p
                assert not (is_pointer and argument), f"{name}: argument {i} has no buffer"
                parts.append(struct.pack("<Iq", 0, 0 if is_pointer else int(argument)))
        parts.append(struct.pack("<I", len(every)))
        for buffer, contents in zip(every.values(), before, strict=True):
            parts.append(struct.pack("<QI", buffer.num_bytes, len(buffer.pointers)))
            parts += [struct.pack("<QI", offset, index[b.address, b.num_bytes]) for offset, b in buffer.pointers]
            compare = (buffer.check, buffer.is_bf16, buffer.tolerance, buffer.rows, buffer.columns, buffer.stride)
            parts += [struct.pack("<IIdqqq", *compare), contents]
            if buffer.check is not Check.NONE:
                parts.append(buffer.bytes())
        self._file.write(b"".join(parts))
        return returned


def install(isa: str, path: str) -> None:
    """From now on this process has the kernels of one instruction set, and each of their calls is written to a file."""
    plain, recorder = native.Function, Recorder(open(path, "wb"))  # noqa: SIM115  # open until the process ends
    descriptions: dict[int, Calls] = {}

    def make(name: str, function: Any, kernels: native.Kernels) -> Any:
        if not hasattr(Calls, name):
            return plain(name, function, kernels)
        calls = descriptions.setdefault(id(kernels), Calls(kernels.library))
        kinds = native.SIGNATURES[name][1]

        def call(*arguments: Any) -> Any:
            return recorder.record(name, arguments, kinds, getattr(calls, name)(arguments), function)

        return call

    patch = pytest.MonkeyPatch()  # for as long as the process lives
    patch.setattr(native, "Function", make)
    patch.setattr(native, "usable", lambda: (isa,))
