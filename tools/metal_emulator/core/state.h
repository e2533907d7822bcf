// What the parts of the core share: the state of a launch, of a threadgroup and of its threads.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "../include/msl_fiber.h"

namespace msl {

constexpr size_t kStack = 256 << 10;

// ---------------------------------------------------------------- fibers
#if defined(__x86_64__)
typedef void* Context;
#else
typedef ucontext_t Context;
#endif
void context_switch(Context& from, Context& to);
void context_make(Context& made, char* stack, size_t size, void (*entry)());

// ---------------------------------------------------------------- state of a threadgroup
enum Wait : uint8_t { kReady, kBarrier, kRendezvous, kValue, kDone };

struct Lane {
  Context context;
  char* stack = nullptr;
  Wait wait = kReady;
  int line = 0;
  uvec3 id{0, 0, 0};
  const char* op = "";
  void* arg = nullptr;
  size_t said = 0;  // operations of the SIMD group's log that this thread has come to
};

// An operation that all threads of a SIMD group come to, without waiting for each other.
struct Said {
  const char* op;
  const void* at;
  size_t stride;
  uint64_t value;  // of a broadcast, once its source was here
  bool known;
};

struct SimdGroup {
  int arrived = 0, size = 0;
  uint32_t epoch = 0;  // counts the barriers of this SIMD group
  bool whole = false;  // what is touched now is touched by all its threads
  void* args[kSimd] = {};
  std::vector<Said> log;  // since all of its threads met
};

constexpr int kWhole = 1024;
inline int simd_of(int who) { return who < kWhole ? who / kSimd : who - kWhole; }

// Who touched a unit of threadgroup memory last, and between which barriers.
struct Shadow {
  uint32_t write_epoch = 0, read_epoch = 0;  // threadgroup barriers passed, plus one
  uint32_t write_simd_epoch = 0, read_simd_epoch = 0;
  int16_t writer = -1, reader = -1;  // a thread, or kWhole and the number of a SIMD group
  bool many_readers = false;
};

struct Launch {
  std::vector<Buffer> buffers;
  int order = 0;
  unsigned seed = 0;
  bool trace = false;
  Counters total;
};

struct Array {
  int line;
  size_t offset, bytes;
};

struct Group {
  Launch* launch = nullptr;
  std::vector<Lane> lanes;
  std::vector<SimdGroup> simds;
  int size = 0, current = 0, done = 0, at_barrier = 0;
  bool orders_threadgroup = false, dead = false;
  uint32_t epoch = 1, index = 0;
  Context main;
  Arguments arguments{};
  Body body = nullptr;
  std::string error;
  char* arena = nullptr;  // threadgroup memory
  std::vector<Array> arrays;
  size_t arena_used = 0;
  std::vector<Shadow> shadow;
  Counters count;
  ~Group() {
    for (auto& lane : lanes)
      if (lane.stack) munmap(lane.stack, kStack);
    free(arena);
  }
};

inline thread_local Group* g_group = nullptr;
inline Group* group() { return g_group; }
inline Lane& self() { return group()->lanes[group()->current]; }
inline SimdGroup& own_simd() { return group()->simds[group()->current / kSimd]; }
inline void to_main() { context_switch(self().context, group()->main); }

// All threads of a SIMD group are here: what each came to is compared, an error is left in `g`.
void met(Group* g, int simd);

}  // namespace msl
