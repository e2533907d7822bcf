// Where threads meet: barriers, SIMD-group functions, matrix operations.
#include "state.h"

#include <cstring>

namespace msl {

int lane_id() { return group()->current % kSimd; }
void fail(const char* message) { fail(std::string(message)); }

void fail(const std::string& message) {
  Group* g = group();
  if (g->error.empty()) {
    auto& id = self().id;
    g->error = message + " (thread " + std::to_string(id.x) + "," + std::to_string(id.y) + "," +
               std::to_string(id.z) + ")";
  }
  g->dead = true;
  for (;;) to_main();
}

// ---------------------------------------------------------------- barriers and rendezvous
void threadgroup_barrier(int line, bool orders_threadgroup) {
  Group* g = group();
  Lane& lane = self();
  lane.wait = kBarrier;
  lane.line = line;
  g->orders_threadgroup = orders_threadgroup;
  ++g->at_barrier;
  to_main();
}

// All threads of a SIMD group are here: each must have come to the same operations.
void met(Group* g, int simd) {
  SimdGroup& s = g->simds[simd];
  for (int i = simd * kSimd; i < simd * kSimd + s.size; ++i) {
    if (g->lanes[i].said != s.log.size()) {
      g->error = std::string("SIMD-group divergence: not all threads came to ") + s.log[g->lanes[i].said].op;
      return;
    }
    g->lanes[i].said = 0;
  }
  s.log.clear();
}

namespace {

// The entry of the operation that this thread has come to.
Said& say(const char* op, const void* at, size_t stride) {
  SimdGroup& simd = own_simd();
  Lane& lane = self();
  if (simd.size != kSimd) fail(std::string(op) + " in a partial SIMD group");
  if (lane.said == simd.log.size()) {
    simd.log.push_back({op, at, stride, 0, false});
  } else {
    const Said& first = simd.log[lane.said];
    if (first.op != op && std::strcmp(first.op, op))
      fail(std::string("SIMD-group divergence: ") + op + " meets " + first.op);
    if (first.at != at || first.stride != stride)
      fail(std::string(op) + (at ? ": pointer or stride differs" : ": source differs") + " between lanes");
  }
  return simd.log[lane.said++];
}

}  // namespace

bool matrix_begin(const char* op, const void* at, size_t stride) {
  say(op, at, stride);
  if (lane_id() != 0) return false;
  own_simd().whole = true;
  return true;
}

void matrix_end() { own_simd().whole = false; }

void matrix_product(float* d, const float* a, const float* b, const float* c) {
  typedef float Row __attribute__((vector_size(32), aligned(4)));
  Row sums[8];
  for (int r = 0; r < 8; ++r) {
    Row sum = *(const Row*)(c + r * 8);
    for (int t = 0; t < 8; ++t) sum += a[r * 8 + t] * *(const Row*)(b + t * 8);
    sums[r] = sum;
  }
  std::memcpy(d, sums, sizeof sums);
  ++group()->count.mma;
}

uint64_t broadcast(uint64_t value, int source) {
  Group* g = group();
  if (source < 0 || source >= kSimd)
    fail("simd_broadcast: lane " + std::to_string(source) + " is outside the SIMD group");
  Said* said = &say("simd_broadcast", nullptr, source);
  size_t number = self().said - 1;
  int base = g->current / kSimd * kSimd;
  if (g->current - base == source) {
    said->value = value;
    said->known = true;
    for (int i = base; i < base + kSimd; ++i)
      if (g->lanes[i].wait == kValue) g->lanes[i].wait = kReady;
    return value;
  }
  while (!own_simd().log[number].known) {
    self().op = "simd_broadcast";
    self().wait = kValue;
    to_main();
  }
  return own_simd().log[number].value;
}

// Meet all other threads of the SIMD group; the last one runs `f` on everybody's argument.
void rendezvous(const char* op, void* arg, Meeting f, void* context) {
  Group* g = group();
  int current = g->current, base = current / kSimd * kSimd;
  SimdGroup& simd = g->simds[current / kSimd];
  Lane& lane = self();
  lane.op = op;
  lane.arg = arg;
  simd.args[current % kSimd] = arg;
  if (++simd.arrived < simd.size) {
    lane.wait = kRendezvous;
    to_main();
    return;
  }
  for (int i = 0; i < simd.size; ++i)
    if (std::strcmp(g->lanes[base + i].op, op))
      fail(std::string("SIMD-group divergence: ") + op + " meets " + g->lanes[base + i].op);
  simd.arrived = 0;
  met(g, current / kSimd);
  if (!g->error.empty()) fail(g->error);
  f(context, simd.args, simd.size);
  for (int i = 0; i < simd.size; ++i)
    if (base + i != current) g->lanes[base + i].wait = kReady;
}

void simdgroup_barrier(bool orders_threadgroup) {
  rendezvous("simdgroup_barrier", nullptr, [orders_threadgroup](void**, int) {
    if (orders_threadgroup) ++own_simd().epoch;
  });
}

}  // namespace msl
