// Every access to memory: bounds, alignment, races, counters.
#include "state.h"

#include <cstring>

namespace msl {

// All threads of a threadgroup get the same storage for one declaration, poisoned with NaN.
char* threadgroup_array(int line, size_t bytes) {
  Group* g = group();
  for (auto& array : g->arrays)
    if (array.line == line) return g->arena + array.offset;
  size_t offset = (g->arena_used + 15) / 16 * 16;
  if (offset + bytes > kThreadgroupLimit)
    fail("threadgroup memory: " + std::to_string(offset + bytes) + " of " +
         std::to_string(kThreadgroupLimit) + " bytes");
  g->arena_used = offset + bytes;
  g->count.threadgroup_memory = std::max<uint64_t>(g->count.threadgroup_memory, g->arena_used);
  std::memset(g->arena + offset, 0xFF, bytes);
  g->arrays.push_back({line, offset, bytes});
  return g->arena + offset;
}

namespace {

std::string who(int thread) {
  return thread < kWhole ? "thread " + std::to_string(thread)
                         : "a matrix operation of SIMD group " + std::to_string(thread - kWhole);
}

// Two accesses of which one writes must have a barrier between them, unless one thread did both.
bool ordered(int other, int me, uint32_t epoch, uint32_t simd_epoch) {
  Group* g = group();
  if (other < 0 || epoch != g->epoch || (other == me && me < kWhole)) return true;
  return simd_of(other) == simd_of(me) && simd_epoch != own_simd().epoch;
}

void touch_threadgroup(size_t offset, size_t bytes, bool writes) {
  Group* g = group();
  const SimdGroup& simd = own_simd();
  int me = simd.whole ? kWhole + g->current / kSimd : g->current;
  g->count.threadgroup_bytes += bytes;
  Shadow* end = &g->shadow[(offset + bytes + kUnit - 1) / kUnit];
  for (Shadow* p = &g->shadow[offset / kUnit]; p < end; ++p) {
    Shadow& s = *p;
    if (s.write_epoch == g->epoch && !ordered(s.writer, me, s.write_epoch, s.write_simd_epoch))
      fail(std::string("race in threadgroup memory: ") + (writes ? "write" : "read") +
           " without a barrier after " + who(s.writer) + " wrote");
    if (writes) {
      bool others = s.many_readers && s.read_epoch == g->epoch;
      if (others || !ordered(s.reader, me, s.read_epoch, s.read_simd_epoch))
        fail("race in threadgroup memory: write without a barrier after " + who(s.reader) + " read");
      s.writer = (int16_t)me;
      s.write_epoch = g->epoch;
      s.write_simd_epoch = simd.epoch;
    } else {
      bool same = s.read_epoch == g->epoch && s.reader >= 0;
      // Readers of several SIMD groups are remembered as "many": only a threadgroup barrier
      // orders a later write after all of them.
      if (!same)
        s.many_readers = false;
      else if (simd_of(s.reader) != simd_of(me))
        s.many_readers = true;
      s.reader = (int16_t)me;
      s.read_epoch = g->epoch;
      s.read_simd_epoch = simd.epoch;
    }
  }
}

void touch_device(int buffer, size_t offset, size_t bytes, bool writes) {
  Group* g = group();
  (writes ? g->count.device_written : g->count.device_read) += bytes;
  if (!g->launch->trace) return;
  Buffer& b = g->launch->buffers[buffer];
  uint32_t me = g->index + 1;
  for (size_t i = offset / kUnit; i < (offset + bytes + kUnit - 1) / kUnit; ++i) {
    uint32_t writer = b.writer[i], reader = b.reader[i];
    if ((writer && writer != me) || (writes && reader && reader != me))
      fail("race in device memory: threadgroups " + std::to_string(writer ? writer - 1 : reader - 1) +
           " and " + std::to_string(g->index) + " touch byte " + std::to_string(i * kUnit) +
           " of buffer " + std::to_string(buffer) + " in one launch, and one of them writes");
    if (writes) {
      if (!writer) g->count.device_written_distinct += kUnit;
      b.writer[i] = me;
    } else {
      if (!reader) g->count.device_read_distinct += kUnit;
      // With two readers no threadgroup may write any more: one that cannot be equal stands
      // for both.
      b.reader[i] = reader && reader != me ? 0xFFFFFFFFu : me;
    }
  }
}

}  // namespace

void access(Space space, const void* place, size_t bytes, size_t align, bool writes, const char* begin,
            const char* end, int buffer) {
  const char* at = (const char*)place;
  const char* what = space == kDevice ? "device" : "threadgroup";
  if (at < begin || at + bytes > end)
    fail(std::string(what) + (writes ? " write" : " read") + " out of bounds: byte " +
         std::to_string(at - begin) + " of " + std::to_string(end - begin) +
         (space == kDevice ? " of buffer " + std::to_string(buffer) : std::string()));
  if ((uintptr_t)at % align)
    fail(std::string(what) + " access is not aligned to " + std::to_string(align) + " bytes");
  if (space == kThreadgroup)
    touch_threadgroup(at - group()->arena, bytes, writes);
  else
    touch_device(buffer, at - group()->launch->buffers[buffer].data, bytes, writes);
}

}  // namespace msl
