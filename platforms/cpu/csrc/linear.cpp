// The entry points: packing weights and multiplying by them.
#include "kernels.h"
#include "replay.h"

using namespace matmul;

// y(num_rows, out) = activation(x W^T + bias) + residual. Strides are in elements; rows are contiguous. y may be the
// residual itself, and must not overlap x.
FL_API void fl_linear(const FlLinear* layer, const void* x, int64_t x_stride, int64_t num_rows, const void* bias,
                      const void* residual, int64_t residual_stride, void* y, int64_t y_stride) {
  if (num_rows <= 0 || layer->out <= 0) return;
  const Call call{layer, x, x_stride, num_rows, bias, residual, residual_stride, y, y_stride};
  run_calls(&call, 1);
}

FL_RECORDABLE(fl_linear)

FL_API void fl_advise_huge_pages(void* p, int64_t bytes) { advise_huge_pages(p, bytes); }
