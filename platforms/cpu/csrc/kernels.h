// One function per weight format; see matmul.h.
#pragma once
#include "matmul.h"

namespace matmul {
void run_float32(const Call& call);
void run_bfloat16(const Call& call);
void run_int8(const Call& call);
void run_int4(const Call& call);
}  // namespace matmul
