// Norms, rotary positions, gates and the embedding's rows. A row is summed in one order, by lane and then over the lanes,
// whatever the number of rows. Strides are in elements; results have no gaps.
#include <cmath>
#include <cstring>

#include "matmul.h"
#include "pool.h"
#include "replay.h"
#include "simd.h"
#include "vectors.h"

namespace {

using simd::Vf;
using vectors::for_rows;
using vectors::for_vectors;

inline Vf rounded(Vf x, const float*) { return x; }
inline Vf rounded(Vf x, const simd::bf16*) {
  simd::bf16 t[simd::kWidth];
  simd::store(t, x);
  return simd::load(t);
}

// In double: what a row is scaled with is as exact as a float can be, and costs nothing beside the row.
inline double sum_lanes(Vf x) {
  float lanes[simd::kWidth];
  simd::store(lanes, x);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// `total` gets x + residual where there is a residual, and is what is normed. `gemma`: times 1 + weight, rounded once.
template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const T* weight, T* out,
              T* total, int64_t num_rows, int64_t size, float eps, bool gemma) {
  for_rows(num_rows, size, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* from = x + row * x_stride;
      T* to = out + row * size;
      Vf squares = simd::zero();
      if (residual) {
        const T* add = residual + row * residual_stride;
        T* sum = total + row * size;
        for_vectors(size, [&](int64_t, auto load, auto store) {
          Vf v = rounded(load(from) + load(add), from);
          store(sum, v);
          squares = simd::fma(v, v, squares);
        });
        from = sum;
      } else {
        for_vectors(size, [&](int64_t, auto load, auto) {
          Vf v = load(from);
          squares = simd::fma(v, v, squares);
        });
      }
      const Vf scale = simd::set1(static_cast<float>(1.0 / std::sqrt(sum_lanes(squares) / static_cast<double>(size) + eps)));
      for_vectors(size, [&](int64_t, auto load, auto store) {
        Vf v = load(from) * scale;
        store(to, gemma ? v * (simd::set1(1.0f) + load(weight)) : rounded(v, from) * load(weight));
      });
    }
  });
}

template <class T>
void layer_norm(const T* x, int64_t x_stride, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t size,
                float eps) {
  for_rows(num_rows, size, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* from = x + row * x_stride;
      T* to = out + row * size;
      Vf sum = simd::zero(), squares = simd::zero();
      for_vectors(size, [&](int64_t, auto load, auto) { sum = sum + load(from); });
      const Vf mean = simd::set1(simd::reduce_add(sum) / static_cast<float>(size));
      for_vectors(size, [&](int64_t i, auto load, auto) {
        Vf v = load(from) - mean;
        if (i + simd::kWidth > size) {  // lanes beyond the row are 0, and so -mean here
          float t[simd::kWidth] = {};
          simd::store_n(t, v, static_cast<int>(size - i));
          v = simd::load(t);
        }
        squares = simd::fma(v, v, squares);
      });
      const float variance = simd::reduce_add(squares) / static_cast<float>(size);
      const Vf scale = simd::set1(1.0f) / simd::sqrt(simd::set1(variance + eps));
      for_vectors(size, [&](int64_t, auto load, auto store) {
        Vf v = (load(from) - mean) * scale;
        store(to, bias ? simd::fma(v, load(weight), load(bias)) : v * load(weight));
      });
    }
  });
}

// Each product is rounded on its own, as the reference does in float32.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, int64_t size, bool interleaved, T* out) {
  if (interleaved) {
    for (int64_t i = 0; i < size; i++) {
      float other = simd::to_float(x[i ^ 1]);
      float turned = (i % 2 ? other : -other) * simd::to_float(sin[i]);
      simd::from_float(simd::to_float(x[i]) * simd::to_float(cos[i]) + turned, out + i);
    }
    return;
  }
  const int64_t half = size / 2;
  for_vectors(half, [&](int64_t, auto load, auto store) {
    Vf first = load(x), second = load(x + half);
    store(out, first * load(cos) - second * load(sin));
    store(out + half, second * load(cos + half) + first * load(sin + half));
  });
}

template <class T>
struct Heads {
  const T* data;
  int64_t token_stride, head_stride, count;
  T* out;
};

template <class T>
void rotary(const Heads<T>& q, const Heads<T>& k, const int64_t* positions, const T* cos, const T* sin, int64_t size,
            int64_t num_tokens, bool interleaved) {
  for_rows(num_tokens, (q.count + k.count) * size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const int64_t at = positions[token] * size;
      for (const Heads<T>* heads : {&q, &k})
        for (int64_t h = 0; h < heads->count; h++)
          rotate(heads->data + token * heads->token_stride + h * heads->head_stride, cos + at, sin + at, size,
                 interleaved, heads->out + (token * heads->count + h) * size);
    }
  });
}

// activation(first half) * second half
template <class T>
void gate(const T* x, int64_t x_stride, T* out, int64_t num_rows, int64_t size, bool gelu) {
  for_rows(num_rows, 2 * size, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* first = x + row * x_stride;
      for_vectors(size, [&](int64_t, auto load, auto store) {
        Vf v = load(first);
        v = matmul::activate(gelu ? matmul::kGeluMul : matmul::kSiluMul, v);
        store(out + row * size, v * load(first + size));
      });
    }
  });
}

template <class F>
void with_dtype(int32_t is_bf16, const F& f) {
  if (is_bf16)
    f(simd::bf16{});
  else
    f(0.0f);
}

}  // namespace

FL_API void fl_rms_norm(int32_t is_bf16, int32_t gemma, const void* x, int64_t x_stride, const void* residual,
                        int64_t residual_stride, const void* weight, void* out, void* total, int64_t num_rows,
                        int64_t size, float eps) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    rms_norm(static_cast<const T*>(x), x_stride, static_cast<const T*>(residual), residual_stride,
             static_cast<const T*>(weight), static_cast<T*>(out), static_cast<T*>(total), num_rows, size, eps,
             gemma != 0);
  });
}

FL_RECORDABLE(fl_rms_norm)

FL_API void fl_layer_norm(int32_t is_bf16, const void* x, int64_t x_stride, const void* weight, const void* bias,
                          void* out, int64_t num_rows, int64_t size, float eps) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    layer_norm(static_cast<const T*>(x), x_stride, static_cast<const T*>(weight), static_cast<const T*>(bias),
               static_cast<T*>(out), num_rows, size, eps);
  });
}

FL_RECORDABLE(fl_layer_norm)

FL_API void fl_rotary(int32_t is_bf16, int32_t interleaved, const void* q, int64_t q_token, int64_t q_head,
                      int64_t num_q, const void* k, int64_t k_token, int64_t k_head, int64_t num_k,
                      const int64_t* positions, const void* cos, const void* sin, int64_t size, int64_t num_tokens,
                      void* q_out, void* k_out) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    rotary<T>({static_cast<const T*>(q), q_token, q_head, num_q, static_cast<T*>(q_out)},
              {static_cast<const T*>(k), k_token, k_head, num_k, static_cast<T*>(k_out)}, positions,
              static_cast<const T*>(cos), static_cast<const T*>(sin), size, num_tokens, interleaved != 0);
  });
}

FL_RECORDABLE(fl_rotary)

FL_API void fl_gate(int32_t is_bf16, int32_t gelu, const void* x, int64_t x_stride, void* out, int64_t num_rows,
                    int64_t size) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    gate(static_cast<const T*>(x), x_stride, static_cast<T*>(out), num_rows, size, gelu != 0);
  });
}

FL_RECORDABLE(fl_gate)

FL_API void fl_embedding(const int64_t* ids, int64_t num_ids, const void* weight, int64_t row_bytes, void* out) {
  for_rows(num_ids, row_bytes / 4, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      std::memcpy(static_cast<char*>(out) + i * row_bytes, static_cast<const char*>(weight) + ids[i] * row_bytes,
                  row_bytes);
  });
}

FL_RECORDABLE(fl_embedding)
