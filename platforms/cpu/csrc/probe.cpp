// The machine's limits, for benchmarks: the rate of the multiplying instruction that each format uses, and reading.
#include "amx.h"
#include "kernels.h"

#include <atomic>

using namespace matmul;

namespace {

constexpr int kChains = 12;  // independent sums: enough to hide the instruction's latency

#if defined(__AMX_TILE__)
int64_t amx_loop(int64_t n, bool is_int8) {
  amx::Config config;
  for (int i = 0; i < 8; i++) {
    config.rows[i] = 16;
    config.row_bytes[i] = 64;
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < n; i++) {
    if (is_int8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return n * 4 * 2 * 16 * 16 * (is_int8 ? 64 : 32);
}
#endif

int64_t fma_loop(int64_t n) {
  Vf sum[kChains];
  for (int i = 0; i < kChains; i++) sum[i] = simd::set1(static_cast<float>(i));
  Vf x = simd::set1(1.0f), y = simd::set1(1e-9f);
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k++) {
#if defined(FL_SIMD_AVX512)
    asm volatile("" : "+v"(x.v), "+v"(y.v));
#endif
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) sum[i] = simd::fma(x, y, sum[i]);
  }
  volatile float keep = 0;
  for (int i = 0; i < kChains; i++) keep = keep + simd::reduce_add(sum[i]);
  return n * kChains * 2 * simd::kWidth;
}

#if defined(__AVX512VNNI__)
int64_t dot_loop(int64_t n, bool is_int8) {
  __m512i sum[kChains];
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_epi32(i);
  __m512i x = _mm512_set1_epi32(0x3f803f80), y = _mm512_set1_epi32(1);
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k++) {
    asm volatile("" : "+v"(x), "+v"(y));
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++)
#if defined(__AVX512BF16__)
      if (!is_int8)
        sum[i] = _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum[i]), reinterpret_cast<__m512bh>(x),
                                                      reinterpret_cast<__m512bh>(y)));
      else
#endif
        sum[i] = _mm512_dpbusd_epi32(sum[i], x, y);
  }
  volatile int keep = 0;
  for (int i = 0; i < kChains; i++) keep = keep + _mm512_reduce_add_epi32(sum[i]);
  return n * kChains * 2 * (is_int8 ? 64 : 32);
}
#endif

int64_t multiply(int32_t scheme, int64_t n) {
#if defined(__AMX_TILE__)
  if (scheme != kFloat32) return amx_loop(n, scheme == kInt8);
#elif defined(__AVX512BF16__)
  if (scheme != kFloat32) return dot_loop(n, scheme == kInt8);
#elif defined(__AVX512VNNI__)
  if (scheme == kInt8) return dot_loop(n, true);
#else
  (void)scheme;
#endif
  return fma_loop(n);
}

}  // namespace

// Runs the instruction n times (by a small factor) on every thread at once; the operations done, all threads together.
// Without an instruction of its own a format counts as float32.
FL_API int64_t fl_probe_multiply(int32_t scheme, int64_t n) {
  const int threads = fl_pool_num_threads();
  std::atomic<int64_t> total{0};
  parallel_for(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) total += multiply(scheme, n);
  });
  return total;
}

// Reads all of the memory once, on all threads.
FL_API float fl_probe_read(const float* p, int64_t bytes) {
  constexpr int64_t kBlock = 1 << 14;  // floats
  std::atomic<int32_t> odd{0};
  parallel_for(bytes / 4 / kBlock, [&](int64_t begin, int64_t end) {
    Vf sum[8];
    for (int i = 0; i < 8; i++) sum[i] = simd::zero();
    for (const float* at = p + begin * kBlock; at < p + end * kBlock; at += 8 * simd::kWidth)
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sum[i] = simd::max(sum[i], simd::load(at + i * simd::kWidth));
    for (int i = 1; i < 8; i++) sum[0] = simd::max(sum[0], sum[i]);
    if (simd::reduce_max(sum[0]) > 1e30f) odd++;
  });
  return static_cast<float>(odd);
}
