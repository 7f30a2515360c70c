// Passes over the activations of a feature, for the summaries of a store that is being built.
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// At how many of some positions [n] each feature is active: added to counts [features].
// other: the features of all positions in turn; those of position p from start[p] on.
EXPORT void count_together(const int64_t* position, int64_t n, const int64_t* start,
                           const int32_t* other, int64_t* counts) {
  constexpr int64_t AHEAD = 16;
  for (int64_t i = 0; i < n; i++) {
    if (i + 2 * AHEAD < n) __builtin_prefetch(start + position[i + 2 * AHEAD]);
    if (i + AHEAD < n) {
      const char* next = reinterpret_cast<const char*>(other + start[position[i + AHEAD]]);
      __builtin_prefetch(next);
      __builtin_prefetch(next + 64);
    }
    const int64_t end = start[position[i] + 1];
    for (int64_t j = start[position[i]]; j < end; j++) counts[other[j]]++;
  }
}

// The rows of positions [n] that lie in marked sequences (marked[sequence] >= 0), in order; how
// many. rows: room for n.
EXPORT int64_t rows_in_marked(const int64_t* position, int64_t n, int64_t context,
                              const int32_t* marked, int64_t* rows) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i++) {
    rows[found] = i;
    found += marked[position[i] / context] >= 0;
  }
  return found;
}

// How many of positions [n] lie in each bin, by the bin of each index in a sequence [context]:
// added to counts [bins].
EXPORT void count_bins(const int64_t* position, int64_t n, int64_t context, const int64_t* bin_of,
                       int64_t* counts) {
  for (int64_t i = 0; i < n; i++) counts[bin_of[position[i] % context]]++;
}

// Marks the documents in which positions [n] lie; document numbers begin with `lowest`.
EXPORT void mark_documents(const int64_t* position, int64_t n, const int32_t* document,
                           int64_t lowest, bool* seen) {
  for (int64_t i = 0; i < n; i++) seen[document[position[i]] - lowest] = true;
}
