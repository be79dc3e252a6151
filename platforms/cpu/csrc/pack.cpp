// Packing of weights, once at load; the layouts are described in matmul.h and matmul_int4.cpp.
#include "matmul.h"
#include "replay.h"

using namespace matmul;

namespace {

// The rows of the source that fill one panel; null where a column is padding.
template <class T>
struct PanelRows {
  const T* row[kPanel];

  PanelRows(const T* source, int64_t stride, int64_t out, bool pair, int64_t panel) {
    for (int i = 0; i < kPanel; i++) {
      const int64_t column = (pair ? panel / 2 : panel) * kPanel + i;
      const int64_t at = pair && panel % 2 ? out + column : column;
      row[i] = column < out ? source + at * stride : nullptr;
    }
  }
  float at(int i, int64_t k) const { return simd::to_float(row[i][k]); }
};

int64_t num_panels(int64_t out, bool pair) {
  return pair ? round_up(out, kPanel) / kPanel * 2 : round_up(out, kGroup) / kPanel;
}

// f(PanelRows, panel) for every panel of a source of either type.
template <class F>
void each_panel(const void* source, int32_t dtype, int64_t stride, int64_t out, bool pair, const F& f) {
  parallel_for(num_panels(out, pair), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      if (dtype == kF32)
        f(PanelRows<float>(static_cast<const float*>(source), stride, out, pair, panel), panel);
      else
        f(PanelRows<bf16>(static_cast<const bf16*>(source), stride, out, pair, panel), panel);
    }
  });
}

template <class T>
inline T convert(float x) {
  T t;
  simd::from_float(x, &t);
  return t;
}

// One panel, kStep inputs of an output side by side.
template <int kStep, class T, class S>
void pack_panel(const PanelRows<S>& rows, int64_t k, T* to) {
  constexpr int64_t kBlock = 64;  // a block of a source row is one or two lines; 16 rows of it stay in the cache
  const int64_t padded = round_up(k, kPadK);
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(padded * kPanel) * sizeof(T));
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t k1 = std::min(k0 + kBlock, k);
    for (int i = 0; i < kPanel; i++) {
      if (!rows.row[i]) continue;
      int64_t at = k0;
      if constexpr (std::is_same_v<T, S>) {  // whole steps at once
        for (; at + kStep <= k1; at += kStep)
          std::memcpy(to + at * kPanel + i * kStep, rows.row[i] + at, kStep * sizeof(T));
      }
      for (; at < k1; at++)
        to[at / kStep * (kStep * kPanel) + i * kStep + at % kStep] = convert<T>(rows.at(i, at));
    }
  }
}

}  // namespace

// Bytes of the packed weight, and of its scales.
FL_API int64_t fl_packed_bytes(int32_t scheme, int32_t pair, int64_t out, int64_t k) {
  const int64_t elements = num_panels(out, pair != 0) * kPanel * round_up(k, kPadK);
  const int64_t half_bytes[] = {8, 4, 2, 1};  // of an element, by scheme
  return elements * half_bytes[scheme] / 2;
}

FL_API int64_t fl_packed_columns(int32_t pair, int64_t out) { return num_panels(out, pair != 0) * kPanel; }

// source (out, k), or (2 out, k) with the gate before the up projection if pair; to: fl_packed_bytes.
FL_API void fl_pack_float(int32_t scheme, int32_t pair, const void* source, int32_t dtype, int64_t stride, int64_t out,
                          int64_t k, void* to) {
  const int64_t size = round_up(k, kPadK) * kPanel;
  each_panel(source, dtype, stride, out, pair != 0, [&](const auto& rows, int64_t panel) {
    if (scheme == kFloat32)
      pack_panel<1>(rows, k, static_cast<float*>(to) + panel * size);
    else
      pack_panel<2>(rows, k, static_cast<bf16*>(to) + panel * size);
  });
}

FL_RECORDABLE(fl_pack_float)

// Quantises to int8, symmetric, one scale per output: largest magnitude / 127. scale and sums: one per packed column.
FL_API void fl_pack_int8(int32_t pair, const void* source, int32_t dtype, int64_t stride, int64_t out, int64_t k,
                         int8_t* to, float* scale, int32_t* sums) {
  const int64_t size = round_up(k, kPadK) * kPanel;
  each_panel(source, dtype, stride, out, pair != 0, [&](const auto& rows, int64_t panel) {
    int8_t* packed = to + panel * size;
    std::memset(packed, 0, static_cast<size_t>(size));
    for (int i = 0; i < kPanel; i++) {
      float largest = 0.0f;
      int32_t sum = 0;
      if (rows.row[i])
        for (int64_t at = 0; at < k; at++) largest = std::max(largest, std::fabs(rows.at(i, at)));
      const float s = largest / 127.0f, inverse = s > 0.0f ? 1.0f / s : 0.0f;
      if (rows.row[i])
        for (int64_t at = 0; at < k; at++) {
          const float n = std::min(127.0f, std::max(-127.0f, std::nearbyint(rows.at(i, at) * inverse)));
          packed[at / 4 * (4 * kPanel) + i * 4 + at % 4] = static_cast<int8_t>(n);
          sum += static_cast<int32_t>(n);
        }
      scale[panel * kPanel + i] = s;
      sums[panel * kPanel + i] = sum;
    }
  });
}

FL_RECORDABLE(fl_pack_int8)

// Quantises to int4: in every group the value of the largest magnitude becomes -8, so all 16 numbers are used.
FL_API void fl_pack_int4(int32_t pair, const void* source, int32_t dtype, int64_t stride, int64_t out, int64_t k,
                         uint32_t* to, void* scale) {
  const int64_t padded = round_up(k, kPadK), words = padded / 8, groups = padded / kQuantGroup;
  each_panel(source, dtype, stride, out, pair != 0, [&](const auto& rows, int64_t panel) {
    uint32_t* packed = to + panel * words * kPanel;
    bf16* scales = static_cast<bf16*>(scale) + panel * groups * kPanel;
    for (int i = 0; i < kPanel; i++)
      for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = group * kQuantGroup;
        const int64_t end = rows.row[i] ? std::min(begin + kQuantGroup, k) : 0;
        float extreme = 0.0f;
        for (int64_t at = begin; at < end; at++)
          if (std::fabs(rows.at(i, at)) > std::fabs(extreme)) extreme = rows.at(i, at);
        const bf16 stored = simd::round_to_bf16(extreme / -8.0f);
        const float s = simd::to_float(stored), inverse = s != 0.0f ? 1.0f / s : 0.0f;
        scales[group * kPanel + i] = stored;
        for (int64_t word = begin / 8; word < (begin + kQuantGroup) / 8; word++) {
          uint32_t bits = 0;
          for (int n = 0; n < 8; n++) {
            const int64_t at = word * 8 + n;
            const float v = at < end ? std::nearbyint(rows.at(i, at) * inverse) : 0.0f;
            const int number = static_cast<int>(std::min(7.0f, std::max(-8.0f, v)));
            bits |= static_cast<uint32_t>(number + 8) << (16 * (n % 2) + 4 * (n / 2));
          }
          packed[word * kPanel + i] = bits;
        }
      }
  });
}

FL_RECORDABLE(fl_pack_int4)
