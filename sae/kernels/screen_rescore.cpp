// Exact values of candidates: products of rows of x with rows of W, those that are wanted alone.
//
// A row of x is wanted by hundreds of features, a row of W by some rows of x. Feature by feature,
// and a slice of columns at a time, both are at hand: the slices of all rows of x stay in the
// second-level cache, and those of W are read once.
#include <algorithm>
#include <cstring>

#include "screen.h"

namespace screen {
namespace {

constexpr int64_t SLICE = 4 * LANES;  // columns
constexpr int64_t GROUP = 4;          // pairs of a feature, whose slice is loaded once for them
constexpr int64_t AT_ONCE = 16;       // products that are added up together
constexpr int64_t AHEAD = 8 * AT_ONCE;  // pairs
constexpr int64_t MOST_ROWS = 4096, MOST_PAIRS = 1 << 20;

// The products of a slice, added up to sixteen sums.
INLINE Lanes products(const float* x, const Lanes& w0, const Lanes& w1, const Lanes& w2,
                      const Lanes& w3) {
  Lanes sum{};  // so that there is one way alone to fuse additions with products
  sum += lanes(x) * w0;
  sum += lanes(x + LANES) * w1;
  sum += lanes(x + 2 * LANES) * w2;
  sum += lanes(x + 3 * LANES) * w3;
  return sum;
}

// Where slice j of a row of d columns is read: the last ends with the row, and so may begin in the
// one before, whose columns are zeros in x then.
int64_t begin_of(int64_t j, int64_t d) { return std::max<int64_t>(0, std::min(j, d - SLICE)); }

void take_slice(const float* x, int64_t j, int64_t d, float* slice) {
  const int64_t done = j - begin_of(j, d), width = std::min(SLICE, d - j);
  std::fill_n(slice, SLICE, 0.0f);
  std::memcpy(slice + done, x + j, width * sizeof(float));
}

#ifdef __AVX512F__
// Partial sums of two vectors, HALF and HALF of each side by side, to sums of half as many.
template <int HALF>
INLINE Lanes fold(const Lanes& a, const Lanes& b) {
  Whole low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i / HALF % 2 * LANES + i / HALF / 2 * 2 * HALF + i % HALF;
    high[i] = low[i] + HALF;
  }
  const auto taken = [&](const Whole& at) __attribute__((always_inline)) {
    return _mm512_permutex2var_ps((__m512)a.part[0], (__m512i)at, (__m512)b.part[0]);
  };
  return {(Vector)(taken(low) + taken(high))};
}

// The sums of sixteen vectors given by number; each is added up as `sum_of` does.
template <int HALF = 1>
INLINE Lanes sums_of(const Lanes (&given)[AT_ONCE], int number = 0) {
  if constexpr (HALF == LANES) {
    return given[number];
  } else {
    return fold<HALF>(sums_of<2 * HALF>(given, number), sums_of<2 * HALF>(given, number + HALF));
  }
}
#else
// The sums of eight lanes each, and of four, of sixteen: as `sum_of` adds them up.
INLINE Four fours_of(const Lanes& given) {
#ifdef __AVX2__
  const __m256 half = (__m256)(given.part[0] + given.part[1]);
  return (Four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  return (Four)((given.part[0] + given.part[2]) + (given.part[1] + given.part[3]));
#endif
}

INLINE Lanes sums_of(const Lanes (&given)[AT_ONCE]) {
  Lanes out;
  UNROLL for (int i = 0; i < AT_ONCE; i += 4) {
    const Four a = fours_of(given[i]), b = fours_of(given[i + 1]), c = fours_of(given[i + 2]),
               d = fours_of(given[i + 3]);
    const Four ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
    const Four cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
    const Four sums = SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
    std::memcpy(reinterpret_cast<float*>(&out) + i, &sums, sizeof sums);
  }
  return out;
}
#endif

}  // namespace

float dot(const float* x, const float* w, int64_t d) {
  const auto slice = [](const float* of_x, const float* of_w) {
    return sum_of(products(of_x, lanes(of_w), lanes(of_w + LANES), lanes(of_w + 2 * LANES),
                           lanes(of_w + 3 * LANES)));
  };
  float sum = 0;
  int64_t j = 0;
  for (; j + SLICE <= d; j += SLICE) sum += slice(x + j, w + j);
  if (j == d) return sum;
  float of_x[SLICE], of_w[SLICE];
  take_slice(x, j, d, of_x);
  if (d < SLICE) take_slice(w, j, d, of_w);
  return sum + slice(of_x, d < SLICE ? of_w : w + begin_of(j, d));
}

void Pool::clear() {
  row.clear();
  bar.clear();
  overflown.clear();
  feature.clear();
  start.assign(1, 0);
}

bool Pool::full() const {
  return static_cast<int64_t>(row.size()) >= MOST_ROWS || start.back() >= MOST_PAIRS;
}

void Pool::add(const Row& list, int64_t at) {
  row.push_back(at);
  bar.push_back(list.bar);
  overflown.push_back(list.overflown);
  if (!list.overflown) feature.insert(feature.end(), list.feature, list.feature + list.count);
  start.push_back(static_cast<int64_t>(feature.size()));
}

void Pool::rescore(const Job& job) {
  deal(job.features);
  const auto rows = static_cast<int64_t>(row.size());
  float* x = tile_.of(rows * SLICE + LANES);
  x += (LANES - reinterpret_cast<uintptr_t>(x) / sizeof(float) % LANES) % LANES;
  std::vector<float> padded;  // W, if its rows are shorter than a slice
  if (job.d < SLICE) {
    padded.resize(job.features * SLICE);
    for (int64_t f = 0; f < job.features; f++)
      take_slice(job.W + f * job.d, 0, job.d, padded.data() + f * SLICE);
  }
  float* sum = sum_.of(places_);
  std::fill_n(sum, places_, 0.0f);
  for (int64_t j = 0; j < job.d; j += SLICE) {
    for (int64_t r = 0; r < rows; r++) take_slice(job.x + row[r] * job.d, j, job.d, x + r * SLICE);
    if (job.d < SLICE) {
      add_slice(x, padded.data(), SLICE);
    } else {
      add_slice(x, job.W + begin_of(j, job.d), job.d);
    }
  }
  float* exact = value_.of(static_cast<int64_t>(feature.size()));
  const int32_t* source = source_.of(places_);
  std::vector<int64_t> next(start.begin(), start.end() - 1);  // a row's features rise
  for (int64_t f = 0; f < job.features; f++) {
    const float bias = job.b ? job.b[f] : 0.0f;
    for (int32_t i = first_[f]; i < last_[f]; i++)
      exact[next[source[i]]++] = job.b ? sum[i] + bias : sum[i];
  }
  value = exact;
}

// Adds the products of a slice to the sums: rows of x [rows, SLICE] with rows of W, each
// `distance` from the one before.
void Pool::add_slice(const float* x, const float* W, int64_t distance) {
  const int32_t *source = source_.of(places_), *of = feature_of_.of(places_ / GROUP);
  float* sum = sum_.of(places_);
  for (int64_t i = 0; i < places_; i += AT_ONCE) {
    const float* later = W + of[std::min(i + AHEAD, places_ - 1) / GROUP] * distance;
    for (int64_t c = 0; c < SLICE; c += LANES) __builtin_prefetch(later + c);
    Lanes piece[AT_ONCE];
    UNROLL for (int64_t g = 0; g < AT_ONCE; g += GROUP) {
      const float* w = W + of[(i + g) / GROUP] * distance;
      const Lanes w0 = lanes(w), w1 = lanes(w + LANES), w2 = lanes(w + 2 * LANES),
                  w3 = lanes(w + 3 * LANES);
      UNROLL for (int64_t n = g; n < g + GROUP; n++)
        piece[n] = products(x + source[i + n] * SLICE, w0, w1, w2, w3);
    }
    lanes(sum + i) += sums_of(piece);
  }
}

// Rows and features of the pairs, feature by feature: each begins a group.
void Pool::deal(int64_t features) {
  last_.assign(features, 0);
  for (const int32_t f : feature) last_[f]++;
  const int64_t most = static_cast<int64_t>(feature.size()) + features * (GROUP - 1) + AT_ONCE;
  int32_t *source = source_.of(most), *of = feature_of_.of(most / GROUP);
  first_.resize(features);
  int64_t at = 0;
  for (int64_t f = 0; f < features; f++) {
    const int64_t end = at + last_[f], groups = (last_[f] + GROUP - 1) / GROUP;
    first_[f] = last_[f] = static_cast<int32_t>(at);
    std::fill_n(of + at / GROUP, groups, static_cast<int32_t>(f));
    at += groups * GROUP;
    for (int64_t i = end; i < at; i++) source[i] = 0;
  }
  for (; at % AT_ONCE; at += GROUP) {
    std::fill_n(source + at, GROUP, 0);
    of[at / GROUP] = 0;
  }
  places_ = at;
  for (size_t r = 0; r < row.size(); r++) {
    for (int64_t i = start[r]; i < start[r + 1]; i++)
      source[last_[feature[i]]++] = static_cast<int32_t>(r);
  }
}

}  // namespace screen
