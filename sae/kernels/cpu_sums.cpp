// Sparse sums for `cpp_backend.py`: decoding, its errors and dot products, gradients of the weights.
//
// An output is summed by one thread, in an order that does not depend on the number of threads.
#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t BLOCK = 4096;         // sources in a tile
constexpr int64_t SLICE = 4 * LANES;    // columns in a tile, which is 1 MiB: half a usual L2 cache
constexpr int64_t AHEAD = 8;            // segments between an output's prefetch and its use
constexpr int64_t STREAMED = 16 << 20;  // bytes of output above which it is written past the caches

struct Entry {
  int32_t source;  // within its block
  float weight;
};

struct Shape {
  int64_t segments, sources, d;
  int64_t blocks() const { return std::max<int64_t>(1, (sources + BLOCK - 1) / BLOCK); }
  int64_t slices() const { return (d + SLICE - 1) / SLICE; }
};

// Copy columns [column, column + SLICE) of a block into a tile, zeros beyond d.
void pack(const float* rows, const Shape& shape, int64_t block, int64_t column, float* tile) {
  const int64_t width = std::min(SLICE, shape.d - column);
  const int64_t first = block * BLOCK, last = std::min(first + BLOCK, shape.sources);
  for (int64_t row = first; row < last; row++, tile += SLICE) {
    const float* from = rows + row * shape.d + column;
    if (width == SLICE) {
      for (int64_t j = 0; j < SLICE; j += LANES) lanes(tile + j) = lanes(from + j);
    } else {
      std::memset(tile, 0, SLICE * sizeof(float));
      std::memcpy(tile, from, width * sizeof(float));
    }
  }
}

void put(float* at, const Lanes (&sum)[4], int64_t width, [[maybe_unused]] bool stream) {
#ifdef __AVX512F__
  if (stream) {
    for (int q = 0; q < 4; q++) _mm512_stream_ps(at + q * LANES, (__m512)sum[q].part[0]);
    return;
  }
#endif
  if (width == SLICE) {
    for (int q = 0; q < 4; q++) lanes(at + q * LANES) = sum[q];
  } else {
    std::memcpy(at, sum, width * sizeof(float));
  }
}

// One slice of columns of the output, for segments [first, last).
void sum_slice(const int32_t* start, const Entry* entries, const float* rows, const Shape& shape,
               int64_t column, int64_t first, int64_t last, bool stream, float* tile, float* out) {
  const int64_t width = std::min(SLICE, shape.d - column);
  for (int64_t block = 0; block < shape.blocks(); block++) {
    pack(rows, shape, block, column, tile);
    const int32_t* bounds = start + block * shape.segments;
    for (int64_t segment = first; segment < last; segment++) {
      const int64_t begin = bounds[segment], end = bounds[segment + 1];
      if (block && begin == end) continue;
      float* at = out + segment * shape.d + column;
      if (!stream && segment + AHEAD < last)
        for (int q = 0; q < 4; q++) __builtin_prefetch(at + AHEAD * shape.d + q * LANES, 1);
      Lanes sum[4] = {};
      if (block) std::memcpy(sum, at, width * sizeof(float));
      for (int64_t e = begin; e < end; e++) {
        const float* row = tile + entries[e].source * SLICE;
        const float weight = entries[e].weight;
        for (int q = 0; q < 4; q++) sum[q] += weight * lanes(row + q * LANES);
      }
      put(at, sum, width, stream);
    }
  }
#ifdef __AVX512F__
  if (stream) _mm_sfence();
#endif
}

// The row at which a thread's share starts, by entries.
int64_t share(const int64_t* row_ptr, int64_t batch, int64_t piece, int64_t pieces) {
  if (piece == pieces) return batch;
  return std::lower_bound(row_ptr, row_ptr + batch, row_ptr[batch] * piece / pieces) - row_ptr;
}

// sum [d] += value times row of W over entries [begin, end): four at a time, the next four fetched.
void add_rows(const int64_t* index, const float* value, int64_t begin, int64_t end, int64_t total,
              const float* W, int64_t d, float* sum) {
  int64_t e = begin;
  for (; e + 4 <= end; e += 4) {
    const float *rows[4], *next[4];
    for (int i = 0; i < 4; i++) {
      rows[i] = W + index[e + i] * d;
      next[i] = W + index[std::min(e + i + 4, total - 1)] * d;
    }
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      Lanes piece = lanes(sum + j);
      for (int i = 0; i < 4; i++) {
        __builtin_prefetch(next[i] + j);
        piece += value[e + i] * lanes(rows[i] + j);
      }
      lanes(sum + j) = piece;
    }
    for (; j < d; j++)
      for (int i = 0; i < 4; i++) sum[j] += value[e + i] * rows[i][j];
  }
  for (; e < end; e++) {
    const float* row = W + index[e] * d;
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) lanes(sum + j) += value[e] * lanes(row + j);
    for (; j < d; j++) sum[j] += value[e] * row[j];
  }
}

// dots[i] = <head, W[index[i]]> for N entries.
template <int N>
void dots_of(const int64_t* index, const float* head, const float* W, int64_t d, float* dots) {
  Lanes sum[N] = {};
  float rest[N] = {};
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES)
    for (int i = 0; i < N; i++) sum[i] += lanes(head + j) * lanes(W + index[i] * d + j);
  for (; j < d; j++)
    for (int i = 0; i < N; i++) rest[i] += head[j] * W[index[i] * d + j];
  for (int i = 0; i < N; i++) dots[i] = sum_of(sum[i]) + rest[i];
}

void dots_of_row(const int64_t* index, int64_t begin, int64_t end, const float* head,
                 const float* W, int64_t d, float* dots) {
  int64_t e = begin;
  for (; e + 8 <= end; e += 8) dots_of<8>(index + e, head, W, d, dots + e);
  for (; e < end; e++) dots_of<1>(index + e, head, W, d, dots + e);
}

// error [d] += b - target; its squared norm.
float finish_error(const float* b, const float* target, int64_t d, float* error) {
  Lanes squares = {};
  float rest = 0;
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES) {
    const Lanes here = lanes(error + j) + lanes(b + j) - lanes(target + j);
    lanes(error + j) = here;
    squares += here * here;
  }
  for (; j < d; j++) {
    error[j] += b[j] - target[j];
    rest += error[j] * error[j];
  }
  return sum_of(squares) + rest;
}

}  // namespace

// Sources in a block, and floats of work that `saescope_segment_sum` needs a thread.
EXPORT int64_t saescope_block() { return BLOCK; }
EXPORT int64_t saescope_tile() { return BLOCK * SLICE; }

// Sort entries by (block of their source, segment), for `segment_sum`; otherwise in their order.
//
// by_row: segments are the rows and sources the features (decode), or else the other way round
// (weights' gradient). start int32 [blocks * segments + 1]; entries [n]; counts for work, int32
// [threads, blocks * segments].
EXPORT void saescope_deal(const int64_t* row_ptr, const int64_t* index, const float* value,
                          int64_t batch, int64_t d_sae, int64_t by_row, int32_t* start, Entry* entries,
                          int32_t* counts, int64_t threads) {
  const int64_t segments = by_row ? batch : d_sae;
  const int64_t keys = Shape{segments, by_row ? d_sae : batch, 1}.blocks() * segments;
  const auto key_of = [=](int64_t row, int64_t feature) {
    return by_row ? feature / BLOCK * segments + row : row / BLOCK * segments + feature;
  };
  for_each(threads, threads, 1, [&](int64_t piece, int64_t) {
    int32_t* mine = counts + piece * keys;
    std::memset(mine, 0, keys * sizeof(int32_t));
    const int64_t last = share(row_ptr, batch, piece + 1, threads);
    for (int64_t row = share(row_ptr, batch, piece, threads); row < last; row++)
      for (int64_t e = row_ptr[row]; e < row_ptr[row + 1]; e++) mine[key_of(row, index[e])]++;
  });
  int32_t total = 0;
  for (int64_t key = 0; key < keys; key++) {
    start[key] = total;
    for (int64_t piece = 0; piece < threads; piece++) {
      const int32_t count = counts[piece * keys + key];
      counts[piece * keys + key] = total;
      total += count;
    }
  }
  start[keys] = total;
  for_each(threads, threads, 1, [&](int64_t piece, int64_t) {
    int32_t* next = counts + piece * keys;
    const int64_t last = share(row_ptr, batch, piece + 1, threads);
    for (int64_t row = share(row_ptr, batch, piece, threads); row < last; row++)
      for (int64_t e = row_ptr[row]; e < row_ptr[row + 1]; e++) {
        const int64_t source = by_row ? index[e] : row;
        entries[next[key_of(row, index[e])]++] = {static_cast<int32_t>(source % BLOCK), value[e]};
      }
  });
}

// out [segments, d] = for each segment the sum of weight times source row, from dealt entries.
//
// Taken segment by segment the sources would come from memory again and again. So the sum is done
// for a slice of columns of one block of sources at a time: such a tile stays in the second-level
// cache, and the sources are read once. tiles: for work, [threads, saescope_tile()].
EXPORT void saescope_segment_sum(const int32_t* start, const Entry* entries, const float* rows,
                                 int64_t segments, int64_t sources, int64_t d, float* tiles,
                                 float* out, int64_t threads) {
  const Shape shape{segments, sources, d};
  const int64_t slices = shape.slices();
  // pieces enough for every thread, but no more: a tile is packed anew for each
  const bool whole = threads == 1 || slices >= 4 * threads;
  const int64_t pieces = whole ? 1 : (4 * threads + slices - 1) / slices;
  const bool aligned = d % SLICE == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Lanes) == 0;
  const bool large = segments * d * static_cast<int64_t>(sizeof(float)) >= STREAMED;
  const bool stream = aligned && large && shape.blocks() == 1;
  for_each(slices * pieces, threads, 1, [&](int64_t task, int64_t thread) {
    const int64_t piece = task % pieces;
    sum_slice(start, entries, rows, shape, task / pieces * SLICE, segments * piece / pieces,
              segments * (piece + 1) / pieces, stream, tiles + thread * BLOCK * SLICE, out);
  });
}

// out [batch, d] = for each row the sum of value times row of W, row by row.
EXPORT void saescope_decode(const int64_t* row_ptr, const int64_t* index, const float* value,
                            const float* W, int64_t batch, int64_t d, float* out, int64_t threads) {
  for_each(batch, threads, 8, [&](int64_t row, int64_t) {
    float* sum = out + row * d;
    std::memset(sum, 0, d * sizeof(float));
    add_rows(index, value, row_ptr[row], row_ptr[row + 1], row_ptr[batch], W, d, sum);
  });
}

// dots [n] = for each entry the dot product of its row and its feature's row of W.
EXPORT void saescope_entry_dots(const int64_t* row_ptr, const int64_t* index, const float* rows,
                                const float* W, int64_t batch, int64_t d, float* dots,
                                int64_t threads) {
  for_each(batch, threads, 8, [&](int64_t row, int64_t) {
    dots_of_row(index, row_ptr[row], row_ptr[row + 1], rows + row * d, W, d, dots);
  });
}

// error [batch, d] = decode + b - target; squared [batch] its norms; dots [n] as in `entry_dots`,
// with the error for the rows. A row's features are still in the cache for its dots.
EXPORT void saescope_decode_error(const int64_t* row_ptr, const int64_t* index, const float* value,
                                  const float* W, const float* b, const float* target,
                                  int64_t batch, int64_t d, float* error, float* squared,
                                  float* dots, int64_t threads) {
  for_each(batch, threads, 8, [&](int64_t row, int64_t) {
    float* sum = error + row * d;
    const int64_t begin = row_ptr[row], end = row_ptr[row + 1];
    std::memset(sum, 0, d * sizeof(float));
    add_rows(index, value, begin, end, row_ptr[batch], W, d, sum);
    squared[row] = finish_error(b, target + row * d, d, sum);
    dots_of_row(index, begin, end, sum, W, d, dots);
  });
}

// sums [d_sae] += for each feature its values, in their order.
EXPORT void saescope_feature_sums(const int64_t* index, const float* value, int64_t n,
                                  float* sums) {
  for (int64_t e = 0; e < n; e++) sums[index[e]] += value[e];
}
