// One threadgroup on one OS thread: its threads are fibers, 32 consecutive ones are a SIMD group.
//
// A fiber runs until it reaches a barrier or a SIMD-group operation. The order in which fibers
// run is a parameter (forward, reverse, random by seed), because a kernel that is right gives
// the same bits in every order. Nothing on a fiber's stack may need a destructor: when a check
// fails, fibers are abandoned where they stand. What is not a template is in core/, which is
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
enum Space { kDevice, kThreadgroup };

[[noreturn]] void fail(const std::string& message);
[[noreturn]] void fail(const char* message);
int lane_id();
void threadgroup_barrier(int line, bool orders_threadgroup);
void simdgroup_barrier(bool orders_threadgroup);
// Storage for one declaration, the same for all threads, poisoned with NaN.
char* threadgroup_array(int line, size_t bytes);
// The check of every access: bounds, alignment and races. `end - begin` is what the pointer may
// touch, `buffer` the number of a device buffer.
void access(Space space, const void* at, size_t bytes, size_t align, bool writes, const char* begin,
            const char* end, int buffer);
// Meet all other threads of the SIMD group; the last one runs `f` on everybody's argument.
typedef void (*Meeting)(void* context, void** all, int n);
void rendezvous(const char* op, void* arg, Meeting f, void* context);

template <class F> void rendezvous(const char* op, void* arg, F f) {
  rendezvous(op, arg, [](void* context, void** all, int n) { (*(F*)context)(all, n); }, &f);
}

// An operation on simdgroup matrices, which all threads of a SIMD group must come to with equal
// arguments. No thread waits: what each one says is compared with what the first one said. True
// for the one thread that carries it out; what it then touches until matrix_end is touched by
// the SIMD group as a whole.
bool matrix_begin(const char* op, const void* at = nullptr, size_t stride = 0);
void matrix_end();
// d = a * b + c on 8 x 8 floats; every element is summed in the order of the inner index.
void matrix_product(float* d, const float* a, const float* b, const float* c);
// The 8 bytes of thread `source` of the SIMD group; only who comes before it waits.
uint64_t broadcast(uint64_t value, int source);

}  // namespace msl
