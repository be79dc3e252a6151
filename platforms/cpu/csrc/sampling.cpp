// Drawing tokens, and what edits logits before. A row's token does not depend on the other rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "pool.h"
#include "replay.h"
#include "simd.h"

namespace {

constexpr int64_t kBlock = 256;  // probabilities that are looked at together
constexpr int64_t kMinParallel = 32 * 1024;

template <class F>
void for_rows(int64_t num_rows, int64_t row_size, const F& f) {
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) f(row);
  };
  if (num_rows * row_size < kMinParallel)
    run(0, num_rows);
  else
    parallel_for(num_rows, run);
}

double sum_of(const float* p, int64_t size) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] += static_cast<double>(p[i + j]);
  for (; i < size; i++) lanes[0] += static_cast<double>(p[i]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// The first token whose cumulative probability exceeds uniform times the sum: blocks first, then within the one. Sums of
// blocks may round otherwise than sums of single ones, so the last tokens of a block may fall short of it; then it is
// the next token with a probability, or the last one that has any.
int64_t draw_row(const float* p, int64_t size, double uniform, std::vector<double>& blocks) {
  const int64_t num_blocks = (size + kBlock - 1) / kBlock;
  blocks.resize(static_cast<size_t>(num_blocks));
  double total = 0;
  for (int64_t b = 0; b < num_blocks; b++) {
    blocks[static_cast<size_t>(b)] = sum_of(p + b * kBlock, std::min(kBlock, size - b * kBlock));
    total += blocks[static_cast<size_t>(b)];
  }
  const double threshold = uniform * total;
  double before = 0;
  int64_t block = 0;
  for (; block + 1 < num_blocks; block++) {
    const double after = before + blocks[static_cast<size_t>(block)];
    if (after > threshold) break;
    before = after;
  }
  for (int64_t i = block * kBlock; i < size; i++) {
    const double after = before + static_cast<double>(p[i]);
    if (after > threshold && p[i] > 0) return i;
    before = after;
  }
  for (int64_t i = size - 1; i > 0; i--)
    if (p[i] > 0) return i;
  return 0;
}

uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Settings {
  double top_k, top_p, min_p, uniform;
};

// Tokens of one row, best first, as few as the settings need. A key orders by probability (positive floats order as
// their bits do), then by token.
class Filter {
 public:
  int64_t draw(const float* p, int64_t size, const Settings& s) {
    look(p, size);
    const bool has_top_k = s.top_k > 0 && s.top_k < static_cast<double>(size);
    const int64_t top_k = has_top_k ? static_cast<int64_t>(std::ceil(s.top_k)) : size;
    const float least = static_cast<float>(s.min_p * static_cast<double>(best_));  // may round up: one step below it
    const float cut = std::nextafter(least, 0.0f);
    // Rounds look further down; most rows need one. The last takes every token.
    for (float fraction : {1.0f / 16, 1.0f / 256, 1.0f / 4096, 1.0f / 65536, 0.0f}) {
      float from = s.top_p == 1 && !has_top_k ? cut : best_ * fraction;
      const bool is_last = from == 0.0f || (!has_top_k && from <= cut);
      if (is_last) from = has_top_k ? 0.0f : std::max(cut, 0.0f);
      collect(p, size, from);
      if (static_cast<int64_t>(keys_.size()) < top_k && has_top_k && from > 0.0f) continue;
      const bool is_whole = sort(top_k);
      const int64_t place = choose(s, has_top_k, is_whole && !is_last && !has_top_k);
      if (place >= 0) return static_cast<int64_t>(keys_[static_cast<size_t>(place)] & 0xffffffffu);
    }
    return 0;  // no number in the row
  }

 private:
  float best_ = 0;
  std::vector<float> largest_;  // by block
  std::vector<uint64_t> keys_;  // ~probability, token

  void look(const float* p, int64_t size) {
    const int64_t num_blocks = (size + kBlock - 1) / kBlock;
    largest_.resize(static_cast<size_t>(num_blocks));
    best_ = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
      const float *at = p + b * kBlock, *end = p + std::min(size, (b + 1) * kBlock);
      simd::Vf most = simd::zero();
      for (; at + simd::kWidth <= end; at += simd::kWidth) most = simd::max(simd::load(at), most);
      if (at < end) most = simd::max(simd::load_n(at, static_cast<int>(end - at)), most);
      largest_[static_cast<size_t>(b)] = simd::reduce_max(most);
      best_ = std::max(best_, largest_[static_cast<size_t>(b)]);
    }
  }

  void collect(const float* p, int64_t size, float from) {
    keys_.clear();
    for (size_t b = 0; b < largest_.size(); b++) {
      if (largest_[b] < from) continue;
      const int64_t begin = static_cast<int64_t>(b) * kBlock, end = std::min(size, begin + kBlock);
      for (int64_t i = begin; i < end; i++)
        if (p[i] >= from) keys_.push_back(uint64_t{~bits_of(p[i] + 0.0f)} << 32 | static_cast<uint32_t>(i));
    }
  }

  // Leaves the `most` best, sorted; whether all of the tokens that were collected are among them.
  bool sort(int64_t most) {
    const bool is_whole = static_cast<int64_t>(keys_.size()) <= most;
    if (!is_whole) {
      std::nth_element(keys_.begin(), keys_.begin() + most, keys_.end());
      keys_.resize(static_cast<size_t>(most));
    }
    std::sort(keys_.begin(), keys_.end());
    return is_whole;
  }

  double probability(size_t i) const { return static_cast<double>(from_bits(~static_cast<uint32_t>(keys_[i] >> 32))); }

  // The place that is drawn; -1 where there is none, or `may_go_on` and all of these tokens are kept.
  int64_t choose(const Settings& s, bool has_top_k, bool may_go_on) const {
    if (keys_.empty()) return -1;
    double mass = 1.0;
    if (has_top_k) {
      mass = 0;
      for (size_t i = 0; i < keys_.size(); i++) mass += probability(i);
    }
    const double best = probability(0);
    size_t kept = 0;
    double sum = 0, total = 0;
    for (; kept < keys_.size(); kept++) {
      const double x = probability(kept);
      sum += x;
      const bool keeps = (sum - x < s.top_p * mass || s.top_p == 1) && x >= s.min_p * best;
      if (!keeps && kept > 0) break;
      total += x;
    }
    if (kept == keys_.size() && may_go_on) return -1;
    const double threshold = s.uniform * total;
    double cumulative = 0;
    for (size_t i = 0; i < kept; i++) {
      cumulative += probability(i);
      if (cumulative > threshold) return static_cast<int64_t>(i);
    }
    return static_cast<int64_t>(kept) - 1;
  }
};

template <class T>
void mask(const T* logits, int64_t stride, const int32_t* words, int64_t words_stride, T* out, int64_t num_rows,
          int64_t size, T none) {
  for_rows(num_rows, size, [=](int64_t row) {
    const T* from = logits + row * stride;
    const uint32_t* allowed = reinterpret_cast<const uint32_t*>(words + row * words_stride);
    T* to = out + row * size;
    for (int64_t i = 0; i < size; i++) to[i] = allowed[i / 32] >> i % 32 & 1 ? from[i] : none;
  });
}

}  // namespace

FL_API void fl_draw(const float* probs, int64_t stride, const double* uniform, int64_t num_rows, int64_t size,
                    int64_t* tokens) {
  for_rows(num_rows, size, [=](int64_t row) {
    static thread_local std::vector<double> blocks;
    tokens[row] = draw_row(probs + row * stride, size, uniform[row], blocks);
  });
}

FL_RECORDABLE(fl_draw)

// settings (4, num_rows): top_k, top_p, min_p, uniform; their meaning is that of the op draw_filtered.
FL_API void fl_draw_filtered(const float* probs, int64_t stride, const double* settings, int64_t num_rows, int64_t size,
                             int64_t* tokens) {
  for_rows(num_rows, size, [=](int64_t row) {
    static thread_local Filter filter;
    const double* at = settings + row;
    tokens[row] = filter.draw(probs + row * stride, size, {at[0], at[num_rows], at[2 * num_rows], at[3 * num_rows]});
  });
}

FL_RECORDABLE(fl_draw_filtered)

FL_API void fl_token_bitmask(int32_t is_bf16, const void* logits, int64_t stride, const int32_t* words,
                             int64_t words_stride, void* out, int64_t num_rows, int64_t size) {
  if (is_bf16)
    mask(static_cast<const uint16_t*>(logits), stride, words, words_stride, static_cast<uint16_t*>(out), num_rows, size,
         uint16_t{0xff80});
  else
    mask(static_cast<const float*>(logits), stride, words, words_stride, static_cast<float*>(out), num_rows, size,
         -std::numeric_limits<float>::infinity());
}

FL_RECORDABLE(fl_token_bitmask)

FL_API void fl_penalties(float* logits, const int64_t* index, const float* repetition, const float* frequency,
                         const float* presence, int64_t count) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < count; i++) {
    float* at = logits + index[i];
    if (!std::isfinite(*at)) continue;
    float x = *at > 0 ? *at / repetition[i] : *at * repetition[i];
    x = x - frequency[i] - presence[i];
    if (!std::isnan(x)) x = std::min(kMost, std::max(-kMost, x));
    *at = x;
  }
}

FL_RECORDABLE(fl_penalties)
