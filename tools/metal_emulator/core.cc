// The part of the emulator that does not depend on a kernel: fibers, barriers, races, launches.
#include "include/msl_fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace msl {
namespace {

constexpr size_t kStack = 256 << 10;

// ---------------------------------------------------------------- context switch
#if defined(__x86_64__)
// ucontext makes two system calls at every switch; these ten instructions make none.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.local msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");
typedef void* Context;
void context_switch(Context& from, Context& to) { msl_switch(&from, to); }
void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  void** top = (void**)(stack + size - 64);
  *--top = nullptr;  // the return address of entry, which never returns
  *--top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  made = top;
}
#else
typedef ucontext_t Context;
void context_switch(Context& from, Context& to) { swapcontext(&from, &to); }
void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  getcontext(&made);
  made.uc_stack.ss_sp = stack;
  made.uc_stack.ss_size = size;
  made.uc_link = nullptr;
  makecontext(&made, entry, 0);
}
#endif

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
int simd_of(int who) { return who < kWhole ? who / kSimd : who - kWhole; }

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

thread_local Group* g_group = nullptr;
Group* group() { return g_group; }
Lane& self() { return group()->lanes[group()->current]; }
SimdGroup& own_simd() { return group()->simds[group()->current / kSimd]; }
void to_main() { context_switch(self().context, group()->main); }

}  // namespace

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

namespace {

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

// ---------------------------------------------------------------- threadgroup memory
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

// ---------------------------------------------------------------- running one threadgroup
namespace {

void lane_entry() {
  Group* g = group();
  Arguments mine = g->arguments;
  mine.thread = self().id;
  g->body(mine);
  self().wait = kDone;
  ++g->done;
  for (;;) to_main();
}

void start(Group& g, uvec3 block, uint32_t index) {
  int n = block.x * block.y * block.z;
  g_group = &g;
  g.size = n;
  g.done = g.at_barrier = 0;
  g.error.clear();
  g.dead = false;
  ++g.epoch;  // what earlier threadgroups touched is of another epoch
  g.index = index;
  g.arrays.clear();
  g.arena_used = 0;
  if (!g.arena) {
    g.arena = (char*)aligned_alloc(64, kThreadgroupLimit);
    g.shadow.resize(kThreadgroupLimit / kUnit + 1);
  }
  if ((int)g.lanes.size() < n) g.lanes.resize(n);
  g.simds.resize((n + kSimd - 1) / kSimd);
  for (SimdGroup& simd : g.simds) {
    simd.arrived = simd.size = 0;
    simd.whole = false;
    simd.log.clear();
  }
  for (int i = 0; i < n; ++i) {
    Lane& lane = g.lanes[i];
    if (!lane.stack)
      lane.stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // Equal offsets in all stacks would fall on the same few lines of every cache.
    context_make(lane.context, lane.stack, kStack - i % 64 * 320, lane_entry);
    lane.wait = kReady;
    lane.op = "";
    lane.line = 0;
    lane.said = 0;
    lane.id = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    ++g.simds[i / kSimd].size;
  }
}

std::string stuck(const Group& g) {
  int barrier = 0, simd = 0;
  const char* op = "";
  for (int i = 0; i < g.size; ++i) {
    barrier += g.lanes[i].wait == kBarrier;
    if (g.lanes[i].wait == kRendezvous || g.lanes[i].wait == kValue) ++simd, op = g.lanes[i].op;
  }
  return "divergence: " + std::to_string(g.done) + " threads returned, " +
         std::to_string(barrier) + " wait at threadgroup_barrier, " + std::to_string(simd) +
         " in SIMD-group operation " + op;
}

// Run one threadgroup to its end. Returns what was wrong, or "".
std::string run_group(Group& g, uvec3 block, uint32_t index) {
  start(g, block, index);
  int n = g.size;
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = g.launch->order == 1 ? n - 1 - i : i;
  static thread_local std::mt19937 random;  // making one costs more than a short threadgroup
  if (g.launch->order == 2) random.seed(g.launch->seed * 7919u + index);
  while (g.done < n) {
    if (g.launch->order == 2) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (int i : order) {
      if (g.lanes[i].wait != kReady) continue;
      progress = true;
      g.current = i;
      context_switch(g.main, g.lanes[i].context);
      if (g.dead) return g.error;
    }
    if (g.at_barrier == n) {
      for (int i = 1; i < n; ++i)
        if (g.lanes[i].line != g.lanes[0].line)
          return "divergence: threads wait at the barriers of MSL lines " +
                 std::to_string(g.lanes[0].line) + " and " + std::to_string(g.lanes[i].line);
      for (size_t i = 0; i < g.simds.size(); ++i) met(&g, i);
      if (!g.error.empty()) return g.error;
      g.at_barrier = 0;
      g.epoch += g.orders_threadgroup;
      ++g.count.barriers;
      for (int i = 0; i < n; ++i) g.lanes[i].wait = kReady;
    } else if (!progress && g.done < n) {
      return stuck(g);
    }
  }
  for (size_t i = 0; i < g.simds.size(); ++i) met(&g, i);
  ++g.count.threadgroups;
  return g.error;
}

void add(Counters& a, const Counters& b) {
  a.device_read += b.device_read;
  a.device_written += b.device_written;
  a.device_read_distinct += b.device_read_distinct;
  a.device_written_distinct += b.device_written_distinct;
  a.threadgroup_bytes += b.threadgroup_bytes;
  a.barriers += b.barriers;
  a.threadgroups += b.threadgroups;
  a.mma += b.mma;
  a.threadgroup_memory = std::max(a.threadgroup_memory, b.threadgroup_memory);
}

// Groups that no launch uses: making one maps the stacks of all its threads.
std::mutex g_pool_lock;
std::vector<std::unique_ptr<Group>> g_pool;

std::unique_ptr<Group> take_group() {
  std::lock_guard<std::mutex> hold(g_pool_lock);
  if (g_pool.empty()) return std::make_unique<Group>();
  std::unique_ptr<Group> g = std::move(g_pool.back());
  g_pool.pop_back();
  return g;
}

void give_group(std::unique_ptr<Group> g) {
  std::lock_guard<std::mutex> hold(g_pool_lock);
  g_pool.push_back(std::move(g));
}

}  // namespace

int launch(Body body, const Request& r) {
  Launch l;
  l.order = r.config[0];
  l.seed = (unsigned)r.config[1];
  l.trace = r.config[3] != 0;
  for (uint64_t i = 0; i < r.count; ++i) {
    Buffer b;
    b.data = (char*)r.data[i];
    b.size = r.sizes[i];
    // Several arguments may be one buffer: the number of the first stands for all.
    while (b.number < (int)i && l.buffers[b.number].data != b.data) ++b.number;
    if (l.trace) b.writer.resize(b.size / kUnit + 1), b.reader.resize(b.size / kUnit + 1);
    l.buffers.push_back(std::move(b));
  }
  size_t n = (size_t)r.grid[0] * r.grid[1] * r.grid[2];
  std::atomic<size_t> next{0};
  std::mutex lock;
  std::string bad;
  auto work = [&] {
    std::unique_ptr<Group> own = take_group();
    Group& g = *own;
    g.count = Counters();
    g.launch = &l;
    g.body = body;
    Arguments& a = g.arguments;
    a = {&l.buffers, r.scalars, {0, 0, 0}, {0, 0, 0}};
    for (size_t k; (k = next++) < n;) {
      size_t i = l.order == 1 ? n - 1 - k : k;
      a.group = {(unsigned)(i % r.grid[0]), (unsigned)(i / r.grid[0] % r.grid[1]), (unsigned)(i / r.grid[0] / r.grid[1])};
      std::string e = run_group(g, {r.block[0], r.block[1], r.block[2]}, (uint32_t)i);
      if (!e.empty()) {
        std::lock_guard<std::mutex> hold(lock);
        if (bad.empty())
          bad = "threadgroup " + std::to_string(a.group.x) + "," + std::to_string(a.group.y) + "," + std::to_string(a.group.z) + ": " + e;
        next = n;
      }
    }
    std::lock_guard<std::mutex> hold(lock);
    add(l.total, g.count);
    give_group(std::move(own));
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < (l.trace ? 1 : r.config[2]); ++t) threads.emplace_back(work);
  work();
  for (auto& t : threads) t.join();
  add(*r.counters, l.total);
  if (bad.empty()) return 0;
  std::strncpy(r.error, bad.c_str(), r.error_size - 1);
  r.error[r.error_size - 1] = 0;
  return 1;
}

}  // namespace msl
