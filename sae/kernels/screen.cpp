// Exact encoding through an approximate product: lists of candidates, exact values, selection.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "screen.h"
#include "threads.h"

namespace screen {

namespace {

constexpr float ROUNDING = 1.0f / (1 << 20);  // a few float operations, relative
constexpr float NEVER = std::numeric_limits<float>::quiet_NaN();

// Reused from block to block by one thread.
struct Scratch {
  std::vector<float> ranks, best, dense;
};

struct Entries {
  std::vector<int64_t> index;
  std::vector<float> value;
};

float exact(const Job& job, const float* x, int64_t feature) {
  const float product = dot(x, job.W + feature * job.d, job.d);
  return job.b ? product + job.b[feature] : product;
}

float rank(const Job& job, float value) { return job.by_magnitude ? std::fabs(value) : value; }

int64_t count_from(const float* u, int64_t n, float cut) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; i++) count += u[i] >= cut;
  return count;
}

// A value that at least k of n reach, and not many more.
float cut_for(const float* u, int64_t n, int64_t k) {
  float low = u[0], high = u[0];
  int64_t i = 0;
  if (n >= LANES) {
    Lanes lows = lanes(u), highs = lows;
    for (; i + LANES <= n; i += LANES) {
      const Lanes& now = lanes(u + i);
      lows = smaller(now, lows);
      highs = larger(now, highs);
    }
    for (int64_t lane = 0; lane < LANES; lane++) {
      low = std::min(low, lows[lane]);
      high = std::max(high, highs[lane]);
    }
  }
  for (; i < n; i++) {
    low = std::min(low, u[i]);
    high = std::max(high, u[i]);
  }
  for (int step = 0; step < 30; step++) {
    const float middle = low + (high - low) / 2;
    if (!(middle > low && middle < high)) break;
    const int64_t count = count_from(u, n, middle);
    if (count < k) {
      high = middle;
      continue;
    }
    low = middle;
    if (count <= k + k / 16) break;
  }
  return low;
}

// Raises a row's bar to what its k-th largest value surely reaches, but for very few rows: the
// errors of rounding add up like those of independent coordinates, to about 1 / sqrt(d) of their
// bound, so less than the whole bound is kept in reserve below it.
void tighten(const Job& job, const Features& features, Lists& lists, Row& row) {
  if (row.count < job.k) return;
  const auto share = static_cast<float>(1 + job.deviations / std::sqrt(job.d));
  const float stored = job.half ? 2 * HALF_ROUNDING : 0;
  const float on_a = share * row.a, on_b = share * row.b;
  const float *a = features.a.data(), *b = features.b.data(), *u = row.u;
  const int32_t* feature = row.feature;
  const int32_t n = row.count;
  float* sure = lists.sure.data();
  for (int32_t i = 0; i < n; i++) {
    const int32_t f = feature[i];
    sure[i] = u[i] - (on_a * a[f] + on_b * b[f]) - stored * std::fabs(u[i]);
  }
  const float bar = cut_for(sure, n, job.k);
  if (bar <= row.bar) return;
  row.bar = bar;
  row.tau = bar - ROUNDING * std::fabs(bar);
  row.count = sieve(row.u, row.feature, row.count, row.tau, row.u, row.feature);
}

// The k largest of n values, ties to the lower index. False if the k-th is below the bar.
bool choose(const Job& job, const float* value, const int32_t* feature, int64_t n, float bar,
            int64_t row, Scratch& scratch) {
  if (n < job.k) return false;
  auto &ranks = scratch.ranks, &best = scratch.best;
  ranks.resize(n);
  best.resize(n + 1);
  for (int64_t i = 0; i < n; i++) ranks[i] = rank(job, value[i]);
  const float cut = cut_for(ranks.data(), n, job.k);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    best[kept] = ranks[i];
    kept += ranks[i] >= cut;
  }
  std::nth_element(best.begin(), best.begin() + (job.k - 1), best.begin() + kept,
                   std::greater<float>());
  const float last = best[job.k - 1];
  if (!(last >= bar)) return false;
  int64_t ties = job.k, out = row * job.k;
  for (int64_t i = 0; i < kept; i++) ties -= best[i] > last;
  for (int64_t i = 0; i < n; i++) {
    if (!(ranks[i] > last || (ranks[i] == last && ties-- > 0))) continue;
    job.index[out] = feature ? feature[i] : i;
    job.value[out++] = value[i];
  }
  return true;
}

void keep_above(const Job& job, const float* value, const int32_t* feature, int64_t n, int64_t row,
                Entries& entries) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t f = feature ? feature[i] : i;
    if (!(value[i] > job.threshold[f])) continue;
    entries.index.push_back(f);
    entries.value.push_back(value[i]);
    kept++;
  }
  job.row_ptr[row + 1] = kept;
}

// Exact values of what is in the pool, and what is kept of them: of row r in the entries of its
// block. Returns the products computed; the pool is empty then.
int64_t settle(const Job& job, Pool& pool, Scratch& scratch, std::vector<Entries>& entries,
               int64_t block) {
  pool.rescore(job);
  int64_t computed = 0;
  for (size_t r = 0; r < pool.row.size(); r++) {
    const int64_t at = pool.row[r], n = pool.start[r + 1] - pool.start[r];
    const float* value = pool.value + pool.start[r];
    const int32_t* feature = pool.feature.data() + pool.start[r];
    if (!pool.overflown[r]) {
      computed += n;
      if (job.k == 0) {
        keep_above(job, value, feature, n, at, entries[at / block]);
        continue;
      }
      if (choose(job, value, feature, n, pool.bar[r], at, scratch)) continue;
    }
    computed += job.features;
    scratch.dense.resize(job.features);
    for (int64_t f = 0; f < job.features; f++) {
      scratch.dense[f] = exact(job, job.x + at * job.d, f);
    }
    if (job.k == 0) {
      keep_above(job, scratch.dense.data(), nullptr, job.features, at, entries[at / block]);
    } else {
      choose(job, scratch.dense.data(), nullptr, job.features, -FLT_MAX, at, scratch);
    }
  }
  pool.clear();
  return computed;
}

// Whether a sample of rows has few enough candidates. The same for any number of threads.
Status trial(const Job& job, const Collect& collect) {
  const int64_t sample = std::min(job.rows, std::clamp<int64_t>(job.rows / 32, 24, 96));
  const int64_t step = job.rows / sample;
  const int64_t pieces = std::min<int64_t>(job.threads, sample);
  std::atomic<int64_t> candidates{0};
  std::atomic<bool> good{true};
  for_each(pieces, job.threads, 1, [&](int64_t piece, int64_t) {
    const int64_t from = sample * piece / pieces, rows = sample * (piece + 1) / pieces - from;
    Lists lists(job, rows);
    if (!collect(lists, from * step, step, rows)) good = false;
    int64_t found = 0;
    for (const Row& row : lists.rows) found += row.overflown ? job.features : row.count;
    candidates += found;
  });
  if (!good) return UNFIT;
  const double allowed = job.limit * static_cast<double>(sample);
  return static_cast<double>(candidates) <= allowed ? DONE : TOO_MANY;
}

}  // namespace

Lists::Lists(const Job& job, int64_t n) : rows(n) {
  const int64_t length = job.k ? std::max<int64_t>(4096, 16 * job.k) : job.features / 8 + 1024;
  capacity = std::min(job.features, length) + STRIP + 2 * SPARE;
  u.reset(new float[n * capacity]);
  feature.reset(new int32_t[n * capacity]);
  sure.resize(capacity);
}

void Lists::reset(const Job& job) {
  for (size_t r = 0; r < rows.size(); r++) {
    const float bar = job.k ? -FLT_MAX : 0.0f;
    rows[r] = Row{};
    rows[r].bar = rows[r].tau = bar;
    rows[r].watermark = static_cast<int32_t>(std::max<int64_t>(256, 4 * job.k));
    rows[r].u = u.get() + r * capacity;
    rows[r].feature = feature.get() + r * capacity;
  }
}

void look(const Job& job, const Features& features, Lists& lists, int64_t rows, bool last) {
  for (int64_t r = 0; r < rows; r++) {
    Row& row = lists.rows[r];
    if (row.overflown) continue;
    const bool full = row.count > lists.capacity - STRIP - SPARE;
    if (job.k && (last || full || row.count >= row.watermark)) {
      tighten(job, features, lists, row);
      row.watermark = std::max(row.watermark, 3 * row.count);
    }
    if (!last && row.count > lists.capacity - STRIP - SPARE) {
      row.overflown = true;
      row.tau = NEVER;
    }
  }
}

bool make_base(const Job& job, Features& features, int64_t padded) {
  features.base.assign(padded, 0.0f);
  for (int64_t f = 0; f < job.features; f++) {
    float base = job.b ? job.b[f] : 0.0f;
    if (!std::isfinite(base)) return false;
    if (job.k == 0) {
      const float threshold = job.threshold[f];
      base -= threshold;
      base += ROUNDING * std::fabs(base);
      if (!std::isfinite(threshold)) base = threshold < 0 ? INFINITY : -INFINITY;
    }
    features.base[f] = base;
  }
  return true;
}

void run(Job& job, int64_t block, const Collect& collect) {
  job.status = job.limit > 0 ? trial(job, collect) : DONE;
  if (job.status != DONE) return;
  const int64_t blocks = (job.rows + block - 1) / block;
  auto entries = std::make_unique<std::vector<Entries>>(job.k ? 0 : blocks);
  std::atomic<int64_t> computed{0};
  std::atomic<bool> good{true};
  Tasks pieces(blocks);
  in_parallel(job.threads, [&](int64_t, int64_t) {
    Scratch scratch;
    Pool pool;
    Lists lists(job, std::min(block, job.rows));
    pieces.each([&](int64_t piece) {
      const int64_t first = piece * block, rows = std::min(block, job.rows - first);
      if (!good) return;
      if (!collect(lists, first, 1, rows)) {
        good = false;
        return;
      }
      if (job.upper) {
        for (int64_t r = 0; r < rows; r++) {
          const Row& row = lists.rows[r];
          float* out = job.upper + (first + r) * job.features;
          for (int32_t i = 0; i < row.count; i++) out[row.feature[i]] = row.u[i];
        }
        return;
      }
      for (int64_t r = 0; r < rows; r++) pool.add(lists.rows[r], first + r);
      if (pool.full()) computed += settle(job, pool, scratch, *entries, block);
    });
    computed += settle(job, pool, scratch, *entries, block);
  });
  if (!good) {
    job.status = UNFIT;
    return;
  }
  job.candidates += computed;
  if (job.k == 0) {
    job.row_ptr[0] = 0;
    for (int64_t r = 0; r < job.rows; r++) job.row_ptr[r + 1] += job.row_ptr[r];
    job.entries = entries.release();
  }
}

}  // namespace screen

// The entries that a call with k = 0 found, in order; once.
EXPORT void screen_take(void* found, int64_t* index, float* value) {
  std::unique_ptr<std::vector<screen::Entries>> entries(
      static_cast<std::vector<screen::Entries>*>(found));
  for (const auto& piece : *entries) {
    index = std::copy(piece.index.begin(), piece.index.end(), index);
    value = std::copy(piece.value.begin(), piece.value.end(), value);
  }
}
