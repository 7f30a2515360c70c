// Rows of a synthetic world for `sae/synthetic/cpp_drawing.py`; `sae/synthetic/drawing.py` says what
// is drawn, and draws the same in torch's operators.
//
// A row depends on the key and its number alone. Features without a parent are looked at in tiles of
// 64 for several rows at once; a feature in a tree only where its parent fires.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "threads.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

struct Task {
  const int32_t* top;        // [slots] features without a parent
  const float* top_slope;    // [rank, slots]
  const float* top_offset;   // [slots]
  const float* slope;        // [features, stride], zeros beyond rank
  const float* offset;       // [features]
  const float* mean;         // [features]
  const float* deviation;    // [features]
  const int32_t* first_child;  // [features]
  const int32_t* children;     // [features]
  const float* directions;     // [features, d]
  const float* bias;           // [d]
  int64_t slots, rank, stride, d, depth, exclusive, scaled;
  int64_t key, first, rows;
  int64_t room;     // entries of index and value for each row
  int64_t threads;
  float* x;         // [rows, d]
  int64_t* counts;  // [rows], or null, as the next two
  int64_t* index;   // [rows, room]
  float* value;     // [rows, room]
};

enum Purpose : uint32_t { CAUSES, TOPS, AMOUNTS, CHILDREN };

constexpr int ROWS = 8;        // drawn together by a thread
constexpr int TILE = 64;       // slots, served by as many words of BLOCKS counters
constexpr int BLOCKS = 16;
constexpr int ROUNDS = 10;
constexpr uint32_t MULTIPLIER[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t STEP[2] = {0x9E3779B9u, 0xBB67AE85u};

// Philox 4x32-10 of N counters (row, block, purpose) that lie side by side.
template <int N>
struct Words {
  uint32_t word[4][N];

  Words(uint64_t row, uint32_t block, Purpose purpose, uint64_t key, uint32_t more = 0) {
    uint32_t(&a)[N] = word[0], (&b)[N] = word[1], (&c)[N] = word[2], (&d)[N] = word[3];
    for (int i = 0; i < N; i++) {
      a[i] = static_cast<uint32_t>(row);
      b[i] = static_cast<uint32_t>(row >> 32);
      c[i] = block + i;
      d[i] = purpose + more;
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < ROUNDS; round++) {
      for (int i = 0; i < N; i++) {
        const uint64_t left = static_cast<uint64_t>(a[i]) * MULTIPLIER[0];
        const uint64_t right = static_cast<uint64_t>(c[i]) * MULTIPLIER[1];
        a[i] = static_cast<uint32_t>(right >> 32) ^ b[i] ^ k0;
        c[i] = static_cast<uint32_t>(left >> 32) ^ d[i] ^ k1;
        b[i] = static_cast<uint32_t>(right);
        d[i] = static_cast<uint32_t>(left);
      }
      k0 += STEP[0];
      k1 += STEP[1];
    }
  }
};

inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

struct Pair {
  double first, second;
};

// Two standard normal numbers (Box and Muller 1958).
inline Pair normals(uint32_t word, uint32_t other) {
  const double radius = std::sqrt(-2 * std::log(uniform(word)));
  const double angle = 2 * M_PI * uniform(other);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

// Phi in a table, to decide at a glance what is not close.
class Chances {
 public:
  Chances() {
    for (int i = 0; i <= COUNT; i++) table_[i] = exact(i / PER_UNIT - EDGE);
  }

  static double exact(double level) { return 0.5 * std::erfc(-level * M_SQRT1_2); }

  bool fires(uint32_t word, float level) const {
    const double u = uniform(word);
    const double at = (std::min(std::max(static_cast<double>(level), -EDGE), EDGE) + EDGE) * PER_UNIT;
    const int i = std::min(static_cast<int>(at), COUNT - 1);
    const double near = table_[i] + (at - i) * (table_[i + 1] - table_[i]);
    if (std::abs(u - near) > MARGIN) return u < near;
    return u < exact(level);
  }

 private:
  static constexpr double EDGE = 8, PER_UNIT = 64;
  static constexpr int COUNT = 1024;
  static constexpr double MARGIN = 1e-5;  // the line between two entries is within 7.5e-6 of Phi
  double table_[COUNT + 1];
};

const Chances chances;
// A word of at least RARE_WORD fires only where the level is above RARE_LEVEL: Phi of it is less.
constexpr float RARE_LEVEL = -2.33f;
const uint32_t RARE_WORD = static_cast<uint32_t>(std::ceil(Chances::exact(RARE_LEVEL) * 0x1p32));

struct Entry {
  int32_t feature;
  double amount;
};

class Drawer {
 public:
  explicit Drawer(const Task& task)
      : task_(task), causes_(ROWS * task.stride), key_(static_cast<uint64_t>(task.key)) {}

  // Rows [start, start + rows) of the task, at most ROWS.
  void draw(int64_t start, int rows) {
    for (int r = 0; r < rows; r++) {
      tops_[r].clear();
      draw_causes(number(start + r), causes_.data() + r * task_.stride);
    }
    for (int64_t tile = 0; tile < task_.slots; tile += TILE) draw_tile(start, rows, tile);
    for (int r = 0; r < rows; r++) {
      entries_.clear();
      const float* causes = causes_.data() + r * task_.stride;
      for (int32_t feature : tops_[r]) add(number(start + r), causes, feature);
      std::sort(entries_.begin(), entries_.end(),
                [](const Entry& a, const Entry& b) { return a.feature < b.feature; });
      write(start + r);
    }
  }

 private:
  uint64_t number(int64_t row) const { return static_cast<uint64_t>(task_.first + row); }

  void draw_causes(uint64_t row, float* causes) const {
    for (int64_t k = 0; k < task_.rank; k += 4) {
      const Words<1> words(row, static_cast<uint32_t>(k / 4), CAUSES, key_);
      const Pair a = normals(words.word[0][0], words.word[1][0]);
      const Pair b = normals(words.word[2][0], words.word[3][0]);
      const double four[4] = {a.first, a.second, b.first, b.second};
      for (int64_t i = 0; i < 4 && k + i < task_.rank; i++) causes[k + i] = static_cast<float>(four[i]);
    }
  }

  // The features of one tile that fire on each row, before amounts.
  void draw_tile(int64_t start, int rows, int64_t tile) {
    float level[ROWS][TILE];
    for (int64_t column = tile; column < tile + TILE; column += LANES) {
      Lanes sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = lanes(task_.top_offset + column);
      for (int64_t k = 0; k < task_.rank; k++) {
        const Lanes slope = lanes(task_.top_slope + k * task_.slots + column);
        for (int r = 0; r < ROWS; r++) sum[r] += causes_[r * task_.stride + k] * slope;
      }
      for (int r = 0; r < ROWS; r++) lanes(level[r] + column - tile) = sum[r];
    }
    for (int r = 0; r < rows; r++) {
      const Words<BLOCKS> words(number(start + r), static_cast<uint32_t>(tile / 4), TOPS, key_);
      const uint32_t* word = words.word[0];
      uint8_t look[TILE];
      for (int i = 0; i < TILE; i++) look[i] = (word[i] < RARE_WORD) | (level[r][i] > RARE_LEVEL);
      for (int part = 0; part < TILE; part += 8) {
        uint64_t any;
        std::memcpy(&any, look + part, 8);
        if (!any) continue;
        for (int i = part; i < part + 8; i++)
          if (look[i] && chances.fires(word[i], level[r][i])) tops_[r].push_back(task_.top[tile + i]);
      }
    }
  }

  struct Amount {
    double amount;
    uint32_t score;
  };

  Amount amount(uint64_t row, int32_t feature) const {
    const Words<1> words(row, static_cast<uint32_t>(feature), AMOUNTS, key_);
    const double normal = normals(words.word[0][0], words.word[1][0]).first;
    const double value = task_.mean[feature] + static_cast<double>(task_.deviation[feature]) * normal;
    return {std::max(0.0, value), words.word[2][0]};
  }

  // A feature without a parent, if its amount is above 0, and what fires below it.
  void add(uint64_t row, const float* causes, int32_t feature) {
    const double value = amount(row, feature).amount;
    if (value <= 0) return;
    size_t next = entries_.size();
    entries_.push_back({feature, value});
    for (; next < entries_.size(); next++) add_children(row, causes, entries_[next]);
  }

  void add_children(uint64_t row, const float* causes, const Entry parent) {
    const int32_t first = task_.first_child[parent.feature];
    const int32_t count = task_.children[parent.feature];
    const double factor = task_.scaled ? parent.amount / task_.mean[parent.feature] : 1;
    Amount best = {0, 0};
    int32_t winner = -1;
    for (int32_t block = 0; block < count; block += 4) {
      const Words<1> words(row, static_cast<uint32_t>(parent.feature), CHILDREN, key_, block / 4);
      for (int32_t i = 0; i < 4 && block + i < count; i++) {
        const int32_t child = first + block + i;
        if (!chances.fires(words.word[i][0], level_of(causes, child))) continue;
        const Amount found = amount(row, child);
        if (found.amount <= 0) continue;
        if (!task_.exclusive) {
          entries_.push_back({child, found.amount * factor});
        } else if (winner < 0 || found.score > best.score) {
          best = found;
          winner = child;
        }
      }
    }
    if (winner >= 0) entries_.push_back({winner, best.amount * factor});
  }

  float level_of(const float* causes, int32_t feature) const {
    const float* slope = task_.slope + feature * task_.stride;
    Lanes sum = {};
    for (int64_t k = 0; k < task_.stride; k += LANES) sum += lanes(causes + k) * lanes(slope + k);
    return sum_of(sum) + task_.offset[feature];
  }

  void write(int64_t row) const {
    const int64_t count = static_cast<int64_t>(entries_.size());
    if (task_.counts != nullptr) {
      task_.counts[row] = count;
      for (int64_t i = 0; i < std::min(count, task_.room); i++) {
        task_.index[row * task_.room + i] = entries_[i].feature;
        task_.value[row * task_.room + i] = static_cast<float>(entries_[i].amount);
      }
    }
    float* x = task_.x + row * task_.d;
    std::memcpy(x, task_.bias, task_.d * sizeof(float));
    for (const Entry& entry : entries_) {
      const float amount = static_cast<float>(entry.amount);
      const float* direction = task_.directions + entry.feature * task_.d;
      for (int64_t j = 0; j < task_.d; j++) x[j] += amount * direction[j];
    }
  }

  const Task& task_;
  std::vector<float> causes_;  // [ROWS, stride]
  std::vector<int32_t> tops_[ROWS];
  std::vector<Entry> entries_;
  const uint64_t key_;
};

}  // namespace

EXPORT void saescope_draw_synthetic(const Task* task) {
  Tasks tasks((task->rows + ROWS - 1) / ROWS);
  in_parallel(task->threads, [&](int64_t, int64_t) {
    Drawer drawer(*task);
    tasks.each([&](int64_t i) {
      const int64_t start = i * ROWS;
      drawer.draw(start, static_cast<int>(std::min<int64_t>(ROWS, task->rows - start)));
    });
  });
}
