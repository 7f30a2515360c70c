// Selection for `cpp_backend.py`: which pre-activations of a chunk of rows are kept.
//
// `pre` is x W^T [rows, width], contiguous; the bias b [width] (or null) is added on the way.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t STRIP = 4 * LANES;  // columns that are looked at together
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

enum class Keep { NOT_BELOW, ABOVE };  // NaN is not below anything, and above nothing

// What the rows of a chunk are.
struct Row {
  const float *pre, *b;
  int64_t width;
  bool magnitude;  // compare without the sign

  float value(int64_t j) const { return b ? pre[j] + b[j] : pre[j]; }
  float compared(int64_t j) const { return magnitude ? __builtin_fabsf(value(j)) : value(j); }
  void load(int64_t j, Lanes& to) const {
    to = lanes(pre + j);
    if (b) to += lanes(b + j);
    if (magnitude) to = magnitude_of(to);
  }
};

template <Keep KEEP>
bool kept(float value, float bar) {
  return KEEP == Keep::ABOVE ? value > bar : !(value < bar);
}

// A bit for each of the STRIP columns from j on: whether it is kept against its bar.
template <Keep KEEP>
uint64_t kept_of_strip(const Row& row, int64_t j, const Lanes (&bars)[4]) {
  uint64_t bits = 0;
#ifdef __AVX512F__
  constexpr int TEST = KEEP == Keep::ABOVE ? _CMP_GT_OQ : _CMP_NLT_UQ;
  UNROLL for (int q = 0; q < 4; q++) {
    Lanes here;
    row.load(j + q * LANES, here);
    const auto test = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(here.part[0]),
                                         reinterpret_cast<__m512>(bars[q].part[0]), TEST);
    bits |= static_cast<uint64_t>(test) << (q * LANES);
  }
#else
  Whole test[4 * VECTORS], any = {};
  UNROLL for (int q = 0; q < 4; q++) {
    Lanes here;
    row.load(j + q * LANES, here);
    EACH_PART {
      const Vector mine = here.part[v], bar = bars[q].part[v];
      Whole& passed = test[q * VECTORS + v];
      passed = KEEP == Keep::ABOVE ? mine > bar : ~(mine < bar);
      any |= passed;
    }
  }
  if (!bits_of(any)) return 0;  // most strips have none
  UNROLL for (int i = 0; i < 4 * VECTORS; i++)
    bits |= static_cast<uint64_t>(bits_of(test[i])) << (i * WIDTH);
#endif
  return bits;
}

// Call take(j) for each column that is kept, in rising order. bars: one for all if `one`.
template <Keep KEEP, class Take>
void each_kept(const Row& row, const float* bars, bool one, Take take) {
  Lanes against[4] = {};
  if (one)
    for (Lanes& bar : against) bar = bar + bars[0];  // 0 + bar
  int64_t j = 0;
  for (; j + STRIP <= row.width; j += STRIP) {
    if (!one)
      for (int q = 0; q < 4; q++) against[q] = lanes(bars + j + q * LANES);
    for (uint64_t bits = kept_of_strip<KEEP>(row, j, against); bits; bits &= bits - 1)
      take(j + __builtin_ctzll(bits));
  }
  for (; j < row.width; j++)
    if (kept<KEEP>(row.compared(j), bars[one ? 0 : j])) take(j);
}

// The k-th largest of the maxima of `groups` groups of strided columns (`groups` a multiple of
// LANES, k <= groups <= width): at least k columns reach it. NaN is left out.
float bar_of(const Row& row, int64_t k, int64_t groups, float* maxima) {
  std::fill(maxima, maxima + groups, LOWEST);
  int64_t j = 0;
  for (; j + groups <= row.width; j += groups)
    for (int64_t i = 0; i < groups; i += LANES) {
      Lanes here;
      row.load(j + i, here);
      lanes(maxima + i) = larger(here, lanes(maxima + i));
    }
  for (int64_t i = 0; j < row.width; i++, j++)
    if (row.compared(j) > maxima[i]) maxima[i] = row.compared(j);
  std::nth_element(maxima, maxima + k - 1, maxima + groups, std::greater<float>());
  return maxima[k - 1];
}

// A column's rank: the larger value first, NaN before all, then the smaller index.
uint64_t rank_of(float compared, int64_t j) {
  compared += 0.0f;  // -0 is no less than 0
  uint32_t bits;
  std::memcpy(&bits, &compared, sizeof bits);
  if (compared != compared) {
    bits = ~0u;
  } else {
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(bits) << 32 | (~static_cast<uint32_t>(j));
}

}  // namespace

// index, value [rows, k]: the k largest of each row (in magnitude, if signed), in rising order of
// index; of equal ones those with the smallest index. NaN counts as the largest.
//
// Two passes: a bar that at least k columns reach, then the choice among the few that do.
// work: uint64 [threads, 2 * width + groups].
EXPORT void saescope_top_of_rows(const float* pre, const float* b, int64_t rows, int64_t width,
                                 int64_t k, int64_t with_sign, int64_t groups, int64_t* index,
                                 float* value, uint64_t* work, int64_t threads) {
  for_each(rows, threads, 4, [&](int64_t r, int64_t thread) {
    uint64_t* ranks = work + thread * (2 * width + groups);
    uint64_t* sorted = ranks + width;
    float* maxima = reinterpret_cast<float*>(sorted + width);
    const Row row{pre + r * width, b, width, with_sign != 0};
    const float bar = groups ? bar_of(row, k, groups, maxima) : LOWEST;
    int64_t count = 0;
    each_kept<Keep::NOT_BELOW>(row, &bar, true, [&](int64_t j) {
      ranks[count++] = rank_of(row.compared(j), j);
    });
    std::copy(ranks, ranks + count, sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + count, std::greater<uint64_t>());
    const uint64_t last = sorted[k - 1];
    int64_t at = r * k;
    for (int64_t i = 0; i < count; i++) {
      if (ranks[i] < last) continue;
      index[at] = static_cast<int64_t>(~static_cast<uint32_t>(ranks[i]));
      value[at] = row.value(index[at]);
      at++;
    }
  });
}

// counts [rows]: how many columns of each row are above their threshold [width].
EXPORT void saescope_count_above(const float* pre, const float* b, const float* threshold,
                                 int64_t rows, int64_t width, int64_t* counts, int64_t threads) {
  for_each(rows, threads, 4, [&](int64_t r, int64_t) {
    int64_t count = 0;
    each_kept<Keep::ABOVE>(Row{pre + r * width, b, width, false}, threshold, false,
                           [&](int64_t) { count++; });
    counts[r] = count;
  });
}

// index, value: those columns, row r's from begins[r] on, in rising order.
EXPORT void saescope_fill_above(const float* pre, const float* b, const float* threshold,
                                int64_t rows, int64_t width, const int64_t* begins,
                                int64_t* index, float* value, int64_t threads) {
  for_each(rows, threads, 4, [&](int64_t r, int64_t) {
    const Row row{pre + r * width, b, width, false};
    int64_t at = begins[r];
    each_kept<Keep::ABOVE>(row, threshold, false, [&](int64_t j) {
      index[at] = j;
      value[at++] = row.value(j);
    });
  });
}

// What is wrong with codes [batch, d_sae] of n entries: 0 nothing, 1 row_ptr, 2 an index.
EXPORT int64_t saescope_check_codes(const int64_t* row_ptr, const int64_t* index, int64_t batch,
                                int64_t n, int64_t d_sae) {
  bool rising = row_ptr[0] == 0 && row_ptr[batch] == n;
  for (int64_t r = 0; r < batch; r++) rising &= row_ptr[r] <= row_ptr[r + 1];
  uint64_t highest = 0;  // a negative index is a very high one
  for (int64_t e = 0; e < n; e++) highest = std::max(highest, static_cast<uint64_t>(index[e]));
  if (!rising) return 1;
  return n && highest >= static_cast<uint64_t>(d_sae) ? 2 : 0;
}
