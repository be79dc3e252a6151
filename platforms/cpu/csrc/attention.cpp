// Paged attention: writes a step's keys and values, then runs its plan. See attention.h.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "attention_cache.h"
#include "attention_kernels.h"
#include "attention_tiles.h"
#include "pool.h"
#include "replay.h"

namespace attention {
namespace {

// Kept by a thread from call to call; grows, aligned to a cache line.
struct Scratch {
  uint32_t* units = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(units); }
  uint32_t* take(size_t wanted) {
    if (wanted > size) {
      std::free(units);
      size = (wanted + 15) / 16 * 16;
      units = static_cast<uint32_t*>(std::aligned_alloc(64, size * 4));
      if (!units) throw std::bad_alloc();
      std::memset(units, 0, size * 4);
    }
    return units;
  }
};
thread_local Scratch scratch;

// Up to so many rows a unit waits for memory, so it asks for a tile ahead.
constexpr int kFewRows = 16;

// What a row has so far: its largest score (in log2), the sum of its weights, the weighted sum of values.
struct Partial {
  float best, total;
  float* values;
};

// into = into + part, each brought to the larger of the two scores.
template <class Kv>
void merge(Partial* into, const Partial& part, int columns) {
  float best = part.best > into->best ? part.best : into->best;
  Vf shift = simd::set1(best == -kInfinity ? 0.0f : best);
  Vf old = exp2<Kv::kExact>(simd::set1(into->best) - shift), now = exp2<Kv::kExact>(simd::set1(part.best) - shift);
  for (int i = 0; i < columns; i += simd::kWidth) {
    Vf sum = simd::load(into->values + i) * old;
    simd::store(into->values + i, simd::fma(simd::load(part.values + i), now, sum));
  }
  float t[simd::kWidth];
  simd::store(t, simd::fma(simd::set1(part.total), now, simd::set1(into->total) * old));
  into->total = t[0];
  into->best = best;
}

// One call: a layer's attention over a planned step.
template <class Kv>
struct Layer {
  using A = typename Kv::A;
  using Element = typename Kv::Element;

  const Shape& shape;
  const Plan& plan;
  Rows<Element> queries;
  const void* cache;
  Element* out;
  float* partials;
  const int columns = shape.value_columns();
  const int query_stride = shape.key_units() * Kv::kStep;
  const bool is_linear = shape.soft_cap == 0 && !shape.alibi_slopes;  // the scores, in the dot products
#if defined(__AMX_BF16__)
  const TileConfig tiles{tile_depth(shape.key_units()), Tile<Kv>::grain(shape) / Kv::kPair};
#endif

  static constexpr int kWeightStride = kTile * Kv::kStep / Kv::kPair;

  struct Row {
    int position, low, high;  // it sees keys [low, high)
    float slope;
    Element* out;     // where its result goes, or
    float* partials;  // that of its first span
  };

  // A thread's memory while it works on a unit.
  struct Buffers {
    Row* rows;
    A* queries;
    A* weights;
    float *scores, *total, *values, *merged;
    float *wide_queries, *wide_weights;  // of few rows, where the kernels take floats too
    RowSums sums;
    uint32_t* tile;
  };

  size_t buffer_units(int rows) const {
    size_t per_row = query_stride + kWeightStride + kScoreStride + 3 + simd::kWidth + 2 * columns + sizeof(Row) / 4;
    const size_t wide = kFewRows * (2 * query_stride + kTile);
    return rows * per_row + wide + kTileSegments * shape.segment_units() + 14 * 16;
  }

  Buffers buffers() const {
    size_t n = shape.max_rows();
    uint32_t* next = scratch.take(buffer_units(shape.max_rows()));
    auto take = [&next](size_t units) {
      uint32_t* at = next;
      next += (units + 15) / 16 * 16;
      return at;
    };
    Buffers b;
    b.tile = take(kTileSegments * shape.segment_units());
    b.rows = reinterpret_cast<Row*>(take(n * sizeof(Row) / 4));
    b.queries = reinterpret_cast<A*>(take(n * query_stride));
    b.weights = reinterpret_cast<A*>(take(n * kWeightStride));
    auto floats = [&take](size_t count) { return reinterpret_cast<float*>(take(count)); };
    b.scores = floats(n * kScoreStride);
    b.total = floats(n);
    b.sums.best = floats(n);
    b.sums.factor = floats(n);
    b.sums.lanes = floats(n * simd::kWidth);
    b.wide_queries = floats(kFewRows * 2 * query_stride);
    b.wide_weights = floats(kFewRows * kTile);
    b.values = floats(n * columns);
    b.merged = floats(n * columns);
    return b;
  }

  Element* out_row(int64_t token, int head) const {
    return out + (token * shape.num_heads + head) * shape.value_size;
  }
  int64_t partial_stride() const { return columns + kSegment; }
  float* partial(int kv_head, int64_t index) const {
    return partials + (kv_head * plan.num_partials + index) * partial_stride();
  }

  void gather_rows(const Unit& unit, int kv_head, const Buffers& b) const {
    int n = 0;
    for (int i = 0; i < unit.num_runs; i++) {
      const Run& run = plan.runs()[unit.first_run + i];
      const Sequence& s = plan.sequences()[run.sequence];
      for (int r = run.first_row; r < run.first_row + run.num_rows; r++, n++) {
        int head = kv_head * shape.group() + r % shape.group();
        int64_t token = s.first_token + r / shape.group();
        int position = s.seq_len - s.query_len + r / shape.group();
        Kv::pack(queries.row(token, head), shape.head_size, b.queries + n * query_stride);
        float* first = nullptr;
        if (unit.is_partial)
          first = partial(kv_head, s.first_partial + int64_t{r} * s.num_spans + unit.first_span - s.first_span);
        float slope = shape.alibi_slopes ? shape.alibi_slopes[head] : 0.0f;
        b.rows[n] = {position, shape.first_seen(position), position + 1, slope, out_row(token, head), first};
      }
    }
  }

  // The tile's scores, [begin, end) of them, of all rows.
  template <bool Ahead>
  void scores(int num_rows, int begin, int end, const Tile<Kv>& tile, const Tile<Kv>& next, const Buffers& b) const {
    const int first = begin / kSegment, count = (end - begin) / kSegment;
    const KeyUnits keys{tile.keys + first, next.keys + first, kSegment};
    if constexpr (Kv::kTiled) {
#if defined(__AMX_BF16__)
      const int depth = tile_depth(shape.key_units());
      if (num_rows <= kVectorRows)
        return vector_product<false>(num_rows, count, b.wide_queries, 2 * shape.key_units(), keys,
                                     shape.key_units() / depth, depth, b.scores + begin, kScoreStride);
      tile_product<ScoreTiles, Ahead>((num_rows + kTileRows - 1) / kTileRows, count, b.queries, query_stride, keys,
                                      shape.key_units() / depth, depth, b.scores + begin, kScoreStride);
#endif
    } else {
      product<Kv, Ahead>(num_rows, count, b.queries, query_stride, keys, shape.key_units(), b.scores + begin,
                         kScoreStride, nullptr);
    }
  }

  // values = values * factor + weights * the tile's values, over its keys [begin, end).
  template <bool Ahead>
  void add_values(int num_rows, int begin, int end, const Tile<Kv>& tile, const Tile<Kv>& next, const Buffers& b) const {
    const int first = begin / kSegment, grain = Tile<Kv>::grain(shape);
    const ValueUnits values{tile.values + first, next.values + first, columns, grain / Kv::kPair, grain / kSegment};
    const A* weights = b.weights + begin / Kv::kPair * Kv::kStep;
    if constexpr (Kv::kTiled) {
#if defined(__AMX_BF16__)
      for (int r = 0; r < num_rows; r++) {
        if (b.sums.factor[r] == 1.0f) continue;
        float* row = b.values + r * columns;
        for (int i = 0; i < columns; i += simd::kWidth)
          simd::store(row + i, simd::load(row + i) * simd::set1(b.sums.factor[r]));
      }
      if (num_rows <= kVectorRows) {
        widen_rows(num_rows, (end - begin) / Kv::kPair, weights, kWeightStride, b.wide_weights, kTile);
        return vector_product<true>(num_rows, columns / kSegment, b.wide_weights, kTile, values, (end - begin) / grain,
                                    grain / Kv::kPair, b.values, columns);
      }
      tile_product<ValueTiles, Ahead>((num_rows + kTileRows - 1) / kTileRows, columns / kSegment, weights,
                                      kWeightStride, values, (end - begin) / grain, grain / Kv::kPair, b.values,
                                      columns);
#endif
    } else {
      product<Kv, Ahead>(num_rows, columns / kSegment, weights, kWeightStride, values, (end - begin) / Kv::kPair,
                         b.values, columns, b.sums.factor);
    }
  }

  // Of the tile at `start`, the keys [low, high) that a row sees. `next` is the tile to ask for, or this one.
  template <bool Ahead>
  void run_tile(int num_rows, const Tile<Kv>& tile, const Tile<Kv>& next, int start, int low, int high,
                const Buffers& b) const {
    const int grain = Tile<Kv>::grain(shape), begin = low / grain * grain, end = (high + grain - 1) / grain * grain;
    scores<Ahead>(num_rows, begin, end, tile, next, b);
    for (int r = 0; r < num_rows; r++) {
      const Row& row = b.rows[r];
      float* scores = b.scores + r * kScoreStride;
      if (!is_linear) transform_scores(shape, scores, begin, end, start - row.position, row.slope);
      if (row.low > start + begin || row.high < start + end)
        hide_scores(scores, begin, end, row.low - start, row.high - start);
    }
    const float scale = is_linear ? shape.scale * kLog2E : 1.0f;
    A* weights = b.weights + begin / Kv::kPair * Kv::kStep;
    if (end - begin == kTile)
      softmax_tile<Kv, kTile / simd::kWidth>(num_rows, b.scores, 0, scale, b.sums, weights, kWeightStride);
    else
      softmax_tile<Kv, 0>(num_rows, b.scores + begin, (end - begin) / simd::kWidth, scale, b.sums, weights, kWeightStride);
    add_values<Ahead>(num_rows, begin, end, tile, next, b);
  }

  void run_span(const Unit& unit, int span, int kv_head, int low, int high, const Buffers& b) const {
    const int32_t* table = plan.tables + plan.runs()[unit.first_run].sequence * plan.table_stride;
    std::fill(b.sums.best, b.sums.best + shape.max_rows(), -kInfinity);
    std::memset(b.sums.lanes, 0, sizeof(float) * unit.num_rows * simd::kWidth);
    std::memset(b.values, 0, sizeof(float) * unit.num_rows * columns);
    const bool is_ahead = unit.num_rows <= kFewRows && shape.is_packed() && !shape.stored;
    for (int start = span * kSpan; start < (span + 1) * kSpan; start += kTile) {
      int from = std::max(low - start, 0), to = std::min(high - start, kTile);
      if (from >= to) continue;
      Tile<Kv> tile;
      tile.load(shape, cache, table, kv_head, start, from, to, b.tile);
      if (!is_ahead) {
        run_tile<false>(unit.num_rows, tile, tile, start, from, to, b);
        continue;
      }
      Tile<Kv> next = tile;
      to = std::min(high - start - kTile, kTile);
      if (to > 0) next.find(shape, cache, table, kv_head, start + kTile, 0, to);
      run_tile<true>(unit.num_rows, tile, next, start, from, std::min(high - start, kTile), b);
    }
    for (int r = 0; r < unit.num_rows; r++) b.total[r] = simd::reduce_add(simd::load(b.sums.lanes + r * simd::kWidth));
  }

  void put_out(Element* to, const Partial& p) const {
    Vf inverse = simd::set1(1.0f / p.total);
    int i = 0;
    for (; i + simd::kWidth <= shape.value_size; i += simd::kWidth)
      simd::store(to + i, simd::load(p.values + i) * inverse);
    if (i < shape.value_size) simd::store_n(to + i, simd::load(p.values + i) * inverse, shape.value_size - i);
  }

  void run_unit(const Unit& unit, int kv_head) const {
    const Buffers b = buffers();
    gather_rows(unit, kv_head, b);
#if defined(__AMX_BF16__)
    const FlushSubnormals flush;
    const bool is_tiled = Kv::kTiled && unit.num_rows > kVectorRows;
    if constexpr (Kv::kTiled) {
      if (is_tiled)
        _tile_loadconfig(&tiles);
      else
        widen_rows(unit.num_rows, shape.key_units(), b.queries, query_stride, b.wide_queries, 2 * shape.key_units());
    }
#endif
    int low = b.rows[0].low, high = b.rows[0].high;
    for (int r = 1; r < unit.num_rows; r++) {
      low = std::min(low, b.rows[r].low);
      high = std::max(high, b.rows[r].high);
    }
    float merged_best[Shape::kMaxRows], merged_total[Shape::kMaxRows];
    std::fill(merged_best, merged_best + unit.num_rows, -kInfinity);
    std::fill(merged_total, merged_total + unit.num_rows, 0.0f);
    if (!unit.is_partial) std::memset(b.merged, 0, sizeof(float) * unit.num_rows * columns);
    for (int i = 0; i < unit.num_spans; i++) {
      run_span(unit, unit.first_span + i, kv_head, low, high, b);
      for (int r = 0; r < unit.num_rows; r++) {
        Partial part{b.sums.best[r], b.total[r], b.values + r * columns};
        if (unit.is_partial) {
          float* to = b.rows[r].partials;
          to[0] = part.best;
          to[1] = part.total;
          std::memcpy(to + kSegment, part.values, sizeof(float) * columns);
        } else {
          Partial sum{merged_best[r], merged_total[r], b.merged + r * columns};
          merge<Kv>(&sum, part, columns);
          merged_best[r] = sum.best;
          merged_total[r] = sum.total;
        }
      }
    }
#if defined(__AMX_BF16__)
    if (is_tiled) _tile_release();  // no thread sleeps with live tiles
#endif
    if (unit.is_partial) return;
    for (int r = 0; r < unit.num_rows; r++)
      put_out(b.rows[r].out, {merged_best[r], merged_total[r], b.merged + r * columns});
  }

  // The rows of a sequence whose spans were units of their own.
  void merge_sequence(const Sequence& s, int kv_head) const {
#if defined(__AMX_BF16__)
    const FlushSubnormals flush;
#endif
    float* values = buffers().merged;
    for (int r = 0; r < s.query_len * shape.group(); r++) {
      Partial sum{-kInfinity, 0.0f, values};
      std::memset(values, 0, sizeof(float) * columns);
      for (int i = 0; i < s.num_spans; i++) {
        float* from = partial(kv_head, s.first_partial + int64_t{r} * s.num_spans + i);
        merge<Kv>(&sum, {from[0], from[1], from + kSegment}, columns);
      }
      put_out(out_row(s.first_token + r / shape.group(), kv_head * shape.group() + r % shape.group()), sum);
    }
  }

  // Long units head by head, whose keys then stay in cache from unit to unit; short ones all heads of a block together.
  void run_item(int64_t item) const {
    int64_t num_long = plan.num_long * shape.num_kv_heads;
    if (item < num_long)
      return run_unit(plan.units()[item % plan.num_long], static_cast<int>(item / plan.num_long));
    item -= num_long;
    run_unit(plan.units()[plan.num_long + item / shape.num_kv_heads], static_cast<int>(item % shape.num_kv_heads));
  }
};

constexpr int64_t kMinParallelUnits = 16 * 1024;  // of 4 bytes, written or read: below, one thread is faster

template <class F>
void maybe_parallel(int64_t n, int64_t num_units, const F& f) {
  if (num_units < kMinParallelUnits)
    f(0, n);
  else
    parallel_for(n, f);
}

template <class Kv>
void forward(const Shape& shape, const Plan& plan, const Rows<typename Kv::Element>& queries,
             const Rows<typename Kv::Element>& keys, const Rows<typename Kv::Element>& values, void* cache, void* out,
             float* partials) {
  int64_t row_units = int64_t{shape.num_kv_heads} * shape.segment_units() / kSegment;
  maybe_parallel(plan.num_tokens, plan.num_tokens * row_units, [&](int64_t begin, int64_t end) {
    write_tokens<Kv>(shape, plan.slots, begin, end, keys, values, cache);
  });
  Layer<Kv> layer{shape, plan, queries, cache, static_cast<typename Kv::Element*>(out), partials};
  int64_t num_items = (plan.num_long + plan.num_short) * shape.num_kv_heads;
  maybe_parallel(num_items, plan.num_keys * row_units, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) layer.run_item(i);
  });
  int64_t num_merges = plan.num_merged * shape.num_kv_heads;
  maybe_parallel(num_merges, plan.num_partials * layer.partial_stride() * shape.num_kv_heads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; i++)
                     layer.merge_sequence(plan.sequences()[plan.merged()[i / shape.num_kv_heads]],
                                          static_cast<int>(i % shape.num_kv_heads));
                 });
}

template <class Kv>
Rows<typename Kv::Element> rows(const void* data, int64_t token_stride, int64_t head_stride) {
  return {static_cast<const typename Kv::Element*>(data), token_stride, head_stride};
}

}  // namespace
}  // namespace attention

// One layer's step: writes keys and values, then attends. q (T, H, D), k and v (T, K, D), of the shape's dtype, with
// strides in elements (v is not read of a latent shape); out is (T, H, value size), without gaps.
FL_API void fl_attention(const attention::Shape* shape, const attention::Plan* plan, const void* q, int64_t q_token,
                         int64_t q_head, const void* k, int64_t k_token, int64_t k_head, const void* v,
                         int64_t v_token, int64_t v_head, void* cache, void* out, float* partials) {
  using namespace attention;
  auto run = [&](auto kv) {
    using Kv = decltype(kv);
    forward<Kv>(*shape, *plan, rows<Kv>(q, q_token, q_head), rows<Kv>(k, k_token, k_head),
                rows<Kv>(v, v_token, v_head), cache, out, partials);
  };
  if (shape->is_bf16)
    run(Bfloat16{});
  else
    run(Float32{});
}

FL_RECORDABLE(fl_attention)
