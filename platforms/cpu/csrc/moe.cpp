// Mixture of experts: each token to its best experts, all of an expert's rows through its weights at once, and the
// results back in one sum per token.
//
// A token's experts are added in the order of their numbers, and a matmul's element is one chain whatever the rows
// beside it (matmul.h): a token has the same bits alone and in any batch.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "replay.h"
#include "vectors.h"

using namespace matmul;

// One layer, made at load. The routing is fairlead.interface's MoeSpec.
struct FlMoe {
  int32_t num_experts, top_k, num_groups, top_groups, group_top, sigmoid, normalize;
  float scale;
  const FlLinear* enter;  // of each expert, with its gated activation; y of x's type
  const FlLinear* leave;  // y in float
};

namespace {

constexpr int64_t kLine = 64;

// Where things lie in the caller's scratch memory; N rows of experts, of all tokens together.
struct Scratch {
  int64_t experts, weights, tokens, places, counts, calls, inner, outer, bytes;

  Scratch(const FlMoe& moe, int64_t num_tokens) {
    const int64_t rows = num_tokens * moe.top_k;
    int64_t at = 0;
    auto take = [&](int64_t size) {
      const int64_t begin = at;
      at += round_up(size, kLine);
      return begin;
    };
    experts = take(rows * 4);
    weights = take(rows * 4);
    tokens = take(rows * 4);  // of each row, in the order of experts
    places = take(rows * 4);  // the row of each of a token's experts
    counts = take((moe.num_experts + 1) * 4);
    calls = take(moe.num_experts * static_cast<int64_t>(sizeof(Call)));
    inner = take(rows * moe.enter->out * (moe.enter->y_dtype == kBf16 ? 2 : 4));
    outer = take(rows * moe.leave->out * 4);
    bytes = at + kLine;
  }
};

// The `count` largest of n values, the first of equal ones; NaN is no larger than anything. f(which, value).
template <class F>
void each_largest(const float* values, int32_t n, int32_t count, uint8_t* taken, const F& f) {
  std::memset(taken, 0, static_cast<size_t>(n));
  for (int32_t i = 0; i < count; i++) {
    int32_t best = -1;
    for (int32_t j = 0; j < n; j++)
      if (!taken[j] && (best < 0 || values[j] > values[best])) best = j;
    taken[best] = 1;
    f(best, values[best]);
  }
}

struct Routing {
  const FlMoe& moe;
  float *scores, *choice, *groups;
  uint8_t* taken;

  explicit Routing(const FlMoe& moe) : moe(moe) {
    const int64_t n = moe.num_experts;
    scores = static_cast<float*>(scratch<kRouting>(n * 4 * 3 + n));
    choice = scores + n;
    groups = choice + n;
    taken = reinterpret_cast<uint8_t*>(groups + n);
  }

  template <class T>
  void score(const T* logits) {
    const int32_t n = moe.num_experts;
    if (moe.sigmoid) {
      for (int32_t i = 0; i < n; i++) scores[i] = 1.0f / (1.0f + std::exp(-simd::to_float(logits[i])));
      return;
    }
    float largest = simd::to_float(logits[0]);
    for (int32_t i = 1; i < n; i++) largest = std::max(largest, simd::to_float(logits[i]));
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
      scores[i] = std::exp(simd::to_float(logits[i]) - largest);
      sum += static_cast<double>(scores[i]);
    }
    for (int32_t i = 0; i < n; i++) scores[i] = static_cast<float>(static_cast<double>(scores[i]) / sum);
  }

  // Experts outside the best groups are no choice.
  void keep_groups() {
    const int32_t size = moe.num_experts / moe.num_groups;
    for (int32_t g = 0; g < moe.num_groups; g++) {
      groups[g] = 0;
      each_largest(choice + g * size, size, moe.group_top, taken, [&](int32_t, float value) { groups[g] += value; });
    }
    each_largest(groups, moe.num_groups, moe.top_groups, taken, [](int32_t, float) {});
    for (int32_t g = 0; g < moe.num_groups; g++)
      if (!taken[g]) std::fill(choice + g * size, choice + (g + 1) * size, -HUGE_VALF);
  }

  template <class T>
  void route(const T* logits, const float* correction, int32_t* experts, float* weights) {
    score(logits);
    for (int32_t i = 0; i < moe.num_experts; i++) choice[i] = correction ? scores[i] + correction[i] : scores[i];
    if (moe.top_groups < moe.num_groups) keep_groups();
    int32_t count = 0;
    float sum = 0;
    each_largest(choice, moe.num_experts, moe.top_k, taken, [&](int32_t expert, float) {
      sum += scores[expert];
      int32_t at = count++;  // kept in the order of experts
      for (; at > 0 && experts[at - 1] > expert; at--) experts[at] = experts[at - 1];
      experts[at] = expert;
    });
    for (int32_t i = 0; i < moe.top_k; i++) {
      const float score = scores[experts[i]];
      weights[i] = (moe.normalize ? score / (sum + 1e-20f) : score) * moe.scale;
    }
  }
};

// Sorts the rows by expert: whose token each is, and where each token's rows went. counts[e] is e's first row.
void sort_rows(const int32_t* experts, int64_t num_rows, int32_t top_k, int32_t num_experts, int32_t* counts,
               int32_t* tokens, int32_t* places) {
  std::fill(counts, counts + num_experts + 1, 0);
  for (int64_t i = 0; i < num_rows; i++) counts[experts[i] + 1]++;
  for (int32_t e = 0; e < num_experts; e++) counts[e + 1] += counts[e];
  for (int64_t i = 0; i < num_rows; i++) {
    places[i] = counts[experts[i]]++;
    tokens[places[i]] = static_cast<int32_t>(i / top_k);
  }
  for (int32_t e = num_experts; e > 0; e--) counts[e] = counts[e - 1];
  counts[0] = 0;
}

template <class T>
void sum_experts(const float* outer, const float* weights, const int32_t* places, int64_t num_tokens, int32_t top_k,
                 int64_t size, T* out) {
  vectors::for_rows(num_tokens, size * top_k, [=](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++)
      vectors::for_vectors(size, [&](int64_t, auto load, auto store) {
        Vf sum = simd::zero();
        for (int32_t i = 0; i < top_k; i++) {
          const int64_t at = token * top_k + i;
          sum = sum + load(outer + places[at] * size) * simd::set1(weights[at]);
        }
        store(out + token * size, sum);
      });
  });
}

}  // namespace

FL_API int64_t fl_moe_scratch_bytes(const FlMoe* moe, int64_t num_tokens) { return Scratch(*moe, num_tokens).bytes; }

// y(num_tokens, out) = the weighted sum of each token's experts. Strides are in elements; y has no gaps and must not
// overlap x. logits are bfloat16 or float; correction (float, one per expert) may be null.
FL_API void fl_moe(const FlMoe* moe, const void* x, int64_t x_stride, int64_t num_tokens, int32_t logits_are_bf16,
                   const void* logits, int64_t logits_stride, const float* correction, void* scratch_memory, void* y) {
  if (num_tokens <= 0) return;
  const Scratch at(*moe, num_tokens);
  char* base = static_cast<char*>(scratch_memory);
  base += (kLine - reinterpret_cast<uintptr_t>(base) % kLine) % kLine;
  auto* experts = reinterpret_cast<int32_t*>(base + at.experts);
  auto* weights = reinterpret_cast<float*>(base + at.weights);
  auto* tokens = reinterpret_cast<int32_t*>(base + at.tokens);
  auto* places = reinterpret_cast<int32_t*>(base + at.places);
  auto* counts = reinterpret_cast<int32_t*>(base + at.counts);
  auto* calls = reinterpret_cast<Call*>(base + at.calls);
  auto* outer = reinterpret_cast<float*>(base + at.outer);
  char* inner = base + at.inner;
  const int32_t top_k = moe->top_k, num_experts = moe->num_experts;

  vectors::for_rows(num_tokens, 16 * num_experts, [&](int64_t begin, int64_t end) {
    Routing routing(*moe);
    for (int64_t token = begin; token < end; token++) {
      auto route = [&](const auto* all) {
        routing.route(all + token * logits_stride, correction, experts + token * top_k, weights + token * top_k);
      };
      if (logits_are_bf16)
        route(static_cast<const bf16*>(logits));
      else
        route(static_cast<const float*>(logits));
    }
  });
  sort_rows(experts, num_tokens * top_k, top_k, num_experts, counts, tokens, places);

  const int64_t width = moe->enter->out, out = moe->leave->out;
  const int64_t row_bytes = width * (moe->enter->y_dtype == kBf16 ? 2 : 4);
  auto run_experts = [&](auto make) {
    int64_t num_calls = 0;
    for (int32_t e = 0; e < num_experts; e++)
      if (counts[e + 1] > counts[e]) new (calls + num_calls++) Call(make(e, counts[e], counts[e + 1] - counts[e]));
    run_calls(calls, num_calls);
  };
  run_experts([&](int32_t e, int64_t first, int64_t rows) {
    return Call{moe->enter + e, x, x_stride, rows, nullptr, nullptr, 0, inner + first * row_bytes, width, tokens + first};
  });
  run_experts([&](int32_t e, int64_t first, int64_t rows) {
    return Call{moe->leave + e, inner + first * row_bytes, width, rows, nullptr, nullptr, 0, outer + first * out, out};
  });
  if (moe->enter->x_dtype == kBf16)
    sum_experts(outer, weights, places, num_tokens, top_k, out, static_cast<bf16*>(y));
  else
    sum_experts(outer, weights, places, num_tokens, top_k, out, static_cast<float*>(y));
}

FL_RECORDABLE(fl_moe)
