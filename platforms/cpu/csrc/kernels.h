// One function per weight format; see matmul.h. All calls of one function have the same format and input type, and rows.
#pragma once
#include "matmul.h"

namespace matmul {
void run_float32(const Call* calls, int64_t num_calls);
void run_bfloat16(const Call* calls, int64_t num_calls);
void run_int8(const Call* calls, int64_t num_calls);
void run_int4(const Call* calls, int64_t num_calls);

// By the format of the first.
inline void run_calls(const Call* calls, int64_t num_calls) {
  switch (calls->layer->scheme) {
    case kFloat32:
      return run_float32(calls, num_calls);
    case kBfloat16:
      return run_bfloat16(calls, num_calls);
    case kInt8:
      return run_int8(calls, num_calls);
    default:
      return run_int4(calls, num_calls);
  }
}
}  // namespace matmul
