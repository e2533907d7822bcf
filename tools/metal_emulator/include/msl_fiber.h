// One threadgroup on one OS thread: its threads are fibers, 32 consecutive ones are a SIMD group.
//
// A fiber runs until it reaches a barrier or a SIMD-group operation. The order in which fibers
// run is a parameter (forward, reverse, random by seed), because a kernel that is right gives
// the same bits in every order. Nothing on a fiber's stack may need a destructor: when a check
// fails, fibers are abandoned where they stand. What is not a template is in core.cc, which is
// compiled once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace msl {

constexpr int kSimd = 32;                    // threads in a SIMD group of every Apple GPU
constexpr size_t kThreadgroupLimit = 32768;  // bytes of threadgroup memory
constexpr size_t kUnit = 2;  // granularity of race detection: the smallest element used, a half

struct uvec3 {
  unsigned x, y, z;
};

struct Counters {
  uint64_t device_read = 0, device_written = 0;            // bytes, every access counted
  uint64_t device_read_distinct = 0, device_written_distinct = 0;  // bytes, each once a launch
  uint64_t threadgroup_bytes = 0;                          // read and written
  uint64_t barriers = 0;                                   // threadgroup barriers passed
  uint64_t threadgroups = 0, mma = 0, threadgroup_memory = 0;
};

struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  int number = 0;
  // Only when tracing: which threadgroup (plus one) wrote and read every unit in this launch.
  std::vector<uint32_t> writer, reader;
};

// The C interface of a compiled kernel: sizes are in bytes, `config` is {order, seed, OS threads,
// trace}.
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

// What one thread of a launch is called with.
struct Arguments {
  const std::vector<Buffer>* buffers;
  const void* scalars;
  uvec3 group, thread;
};

typedef void (*Body)(const Arguments&);
int launch(Body body, const Request& request);

// ---------------------------------------------------------------- called by a running thread
[[noreturn]] void fail(const std::string& message);
int lane_id();
char* arena();
char* buffer_data(int buffer);
void count_mma();
void threadgroup_barrier(int line, bool orders_threadgroup);
void simdgroup_barrier(bool orders_threadgroup);
// Storage for one declaration, the same for all threads, poisoned with NaN: its offset.
size_t threadgroup_array(int line, size_t bytes);
void touch_threadgroup(size_t offset, size_t bytes, bool writes);
void touch_device(int buffer, size_t offset, size_t bytes, bool writes);
// Meet all other threads of the SIMD group; the last one runs `f` on everybody's argument.
typedef void (*Meeting)(void* context, void** all, int n);
void rendezvous(const char* op, void* arg, Meeting f, void* context);

template <class F> void rendezvous(const char* op, void* arg, F f) {
  rendezvous(op, arg, [](void* context, void** all, int n) { (*(F*)context)(all, n); }, &f);
}

}  // namespace msl
