// Stable counting sort of the (token, expert) pairs by expert, in one launch.
//
// One SIMD group for each bucket 0..E; bucket E takes the ids that no expert has. It counts the
// ids below its own (that is where its rows begin), then goes through all ids again and writes
// the places of its own in order: no atomics, no second launch, the same bits on every run.

namespace moec {

constant int SORT_CHUNK = 1024;  // ids staged at a time for the 8 SIMD groups of a threadgroup

inline void stage_buckets(threadgroup int* staged, const device int* ids, int start, int count, int experts,
                          int tid) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the chunk before has been read
  for (int i = tid; i < count; i += 256) {
    int e = ids[start + i];
    staged[i] = e >= 0 && e < experts ? e : experts;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ids [total] -> row_order [total], offsets [experts + 1]; grid ((experts + 1 + 7) / 8).
inline void sort_pairs(const device int* ids, device int* row_order, device int* offsets, int experts,
                       int total, threadgroup float4* scratch, int bx, int tid) {
  threadgroup int* staged = (threadgroup int*)scratch;
  int lane = tid % 32, bucket = bx * 8 + tid / 32, below = 0;
  for (int start = 0; start < total; start += SORT_CHUNK) {
    int count = min(SORT_CHUNK, total - start);
    stage_buckets(staged, ids, start, count, experts, tid);
    for (int i = lane; i < count; i += 32) {
      int other = staged[i];
      below += other < bucket ? 1 : 0;
    }
  }
  int place = simd_sum(below);
  if (lane == 0 && bucket <= experts) offsets[bucket] = place;
  for (int start = 0; start < total; start += SORT_CHUNK) {
    int count = min(SORT_CHUNK, total - start);
    stage_buckets(staged, ids, start, count, experts, tid);
    for (int base = 0; base < count; base += 32) {
      int mine = 0;
      if (base + lane < count) {
        int other = staged[base + lane];
        mine = other == bucket ? 1 : 0;
      }
      int earlier = simd_prefix_exclusive_sum(mine);
      if (mine != 0) row_order[place + earlier] = start + base + lane;
      place += simd_sum(mine);
    }
  }
}

}  // namespace moec
