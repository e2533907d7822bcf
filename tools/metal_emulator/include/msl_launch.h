// From a kernel function to a launch: appended to the translated text, after the kernels.
#undef volatile
#undef device
#undef thread
#undef constant
#undef kernel
#include <atomic>
#include <mutex>
#include <thread>
#include <tuple>

namespace msl {

struct Arguments {
  Launch* launch;
  const void* scalars;
  uvec3 group, thread;
};

// TVM's order of parameters: buffers, the struct of scalars, then the position of the
// threadgroup and of the thread in it.
template <class T> struct Bind {
  static void set(metal::uint3& o, uvec3 v) { o.x = v.x, o.y = v.y, o.z = v.z; }
  static void set(metal::uint2& o, uvec3 v) { o.x = v.x, o.y = v.y; }
  static void set(unsigned& o, uvec3 v) { o = v.x; }
  static T get(const Arguments& a, int&, int& positions) {
    T t;
    set(t, positions++ == 0 ? a.group : a.thread);
    return t;
  }
};
template <class T> struct Bind<device_ptr<T>> {
  static device_ptr<T> get(const Arguments& a, int& buffers, int&) {
    const Buffer& b = a.launch->buffers[buffers++];
    return {(T*)b.data, b.data, b.data + b.size, b.number};
  }
};
template <class T> struct Bind<const T&> {
  static const T& get(const Arguments& a, int&, int&) { return *(const T*)a.scalars; }
};
template <class... A> void call(void (*f)(A...), const Arguments& a) {
  int buffers = 0, positions = 0;
  std::tuple<A...> t{Bind<A>::get(a, buffers, positions)...};
  std::apply(f, t);
}

inline void add(Counters& a, const Counters& b) {
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

// The C interface; sizes are in bytes, `config` is {order, seed, OS threads, trace}.
struct Request {
  void** data;
  const uint64_t* sizes;
  uint64_t count;
  const void* scalars;
  const unsigned *grid, *block;
  const int* config;
  Counters* counters;
  char* error;
  uint64_t error_size;
};

template <class F> int launch(F f, const Request& r) {
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
    Group g;
    g.launch = &l;
    Arguments a{&l, r.scalars, {0, 0, 0}, {0, 0, 0}};
    g.body = [&](uvec3 thread) { Arguments mine = a; mine.thread = thread; call(f, mine); };
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
