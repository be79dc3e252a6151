// The entry points: packing weights and multiplying by them.
#include "kernels.h"
#include "replay.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace matmul;

// y(num_rows, out) = activation(x W^T + bias) + residual. Strides are in elements; rows are contiguous. y may be the
// residual itself, and must not overlap x.
FL_API void fl_linear(const FlLinear* layer, const void* x, int64_t x_stride, int64_t num_rows, const void* bias,
                      const void* residual, int64_t residual_stride, void* y, int64_t y_stride) {
  if (num_rows <= 0 || layer->out <= 0) return;
  const Call call{layer, x, x_stride, num_rows, bias, residual, residual_stride, y, y_stride};
  switch (layer->scheme) {
    case kFloat32:
      return run_float32(call);
    case kBfloat16:
      return run_bfloat16(call);
    case kInt8:
      return run_int8(call);
    default:
      return run_int4(call);
  }
}

FL_RECORDABLE(fl_linear)

// Asks for huge pages under [p, p + bytes). Call it before the memory is first written.
FL_API void fl_advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: smaller pages
#else
  (void)p;
  (void)bytes;
#endif
}
