// Runs the threadgroups of a launch, each to its end, in the order that is asked for.
#include "state.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

namespace msl {
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
