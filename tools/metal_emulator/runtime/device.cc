// A stand-in for TVM's Metal runtime on a machine without Metal: the same registered functions
// and the same launch ABI, but kernels are MSL text compiled for this CPU (through the Python
// function metal_emulator.compile) and buffers are host memory behind opaque handles.
#include <dlfcn.h>
#include <tvm/ffi/cast.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>
#include <tvm/runtime/logging.h>
#include <tvm/support/io.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/runtime/metadata.h"
#include "src/runtime/pack_args.h"
#include "src/runtime/thread_storage_scope.h"

namespace tvm {
namespace runtime {
namespace {

// As opaque as id<MTLBuffer>: host code that does arithmetic on a handle fails here too.
struct Handle {
  uint64_t magic;
  char* data;
  size_t size;
};
constexpr uint64_t kMagic = 0x6d65746c62756666ull;

Handle* Open(const void* p) {
  auto* h = static_cast<Handle*>(const_cast<void*>(p));
  TVM_FFI_ICHECK(h != nullptr && reinterpret_cast<uintptr_t>(h) % alignof(Handle) == 0 && h->magic == kMagic)
      << "not the handle of a Metal buffer";
  return h;
}

class EmulatedDevice final : public DeviceAPI {
 public:
  void SetDevice(Device) final {}
  void GetAttr(Device device, DeviceAttrKind kind, ffi::Any* rv) final {
    switch (kind) {
      case kExist: *rv = device.device_id == 0 ? 1 : 0; return;
      case kMaxThreadsPerBlock: *rv = 1024; return;
      case kWarpSize: *rv = 32; return;
      case kMaxSharedMemoryPerBlock: *rv = 32768; return;
      case kDeviceName: *rv = ffi::String("Metal emulator"); return;
      default: return;
    }
  }
  void* AllocDataSpace(Device, size_t size, size_t, DLDataType) final {
    auto* h = new Handle{kMagic, nullptr, size};
    size_t room = (size + 63) / 64 * 64 + 64;
    h->data = static_cast<char*>(aligned_alloc(64, room));
    TVM_FFI_ICHECK(h->data != nullptr);
    std::memset(h->data, 0xFF, room);  // NaN in every float format
    return h;
  }
  void FreeDataSpace(Device, void* p) final {
    Handle* h = Open(p);
    h->magic = 0;
    free(h->data);
    delete h;
  }
  void StreamSync(Device, TVMStreamHandle) final {}

 protected:
  void CopyDataFromTo(const void* from, size_t from_at, void* to, size_t to_at, size_t size, Device from_device,
                      Device to_device, DLDataType, TVMStreamHandle) final {
    const char* s = Host(from, from_at + size, from_device);
    char* d = Host(to, to_at + size, to_device);
    std::memcpy(d + to_at, s + from_at, size);
  }

 private:
  static char* Host(const void* p, size_t end, Device device) {
    if (device.device_type != kDLMetal) return static_cast<char*>(const_cast<void*>(p));
    TVM_FFI_ICHECK_LE(end, Open(p)->size) << "a copy goes past the end of a Metal buffer";
    return Open(p)->data;
  }
};

class BytesStream : public support::Stream {
 public:
  explicit BytesStream(std::string* s) : s_(s) {}
  using support::Stream::Read;
  using support::Stream::Write;
  size_t Read(void* p, size_t n) override {
    n = std::min(n, s_->size() - at_);
    std::memcpy(p, s_->data() + at_, n);
    at_ += n;
    return n;
  }
  size_t Write(const void* p, size_t n) override {
    s_->append(static_cast<const char*>(p), n);
    return n;
  }

 private:
  std::string* s_;
  size_t at_ = 0;
};

// The C interface of a compiled kernel (msl_launch.h).
constexpr int kCounters = 9;
struct Request {
  void** data;
  const uint64_t* sizes;
  uint64_t count;
  const void* scalars;
  const unsigned *grid, *block;
  const int* config;
  uint64_t* counters;
  char* error;
  uint64_t error_size;
};
typedef int (*Entry)(const Request*);

struct Log {
  std::string kernel;
  uint64_t counters[kCounters];
  unsigned grid[3], block[3];
};
std::mutex g_lock;
int g_config[4] = {0, 0, 2, 0};  // order, seed, OS threads, trace
bool g_keep = false;
std::vector<Log> g_log;

class EmulatedModule final : public ffi::ModuleObj {
 public:
  EmulatedModule(ffi::Map<ffi::String, ffi::Bytes> sources, ffi::String format, ffi::Map<ffi::String, FunctionInfo> functions)
      : sources_(sources), format_(format), functions_(functions) {}
  const char* kind() const final { return "metal"; }
  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable | ffi::Module::kRunnable; }
  ffi::Bytes SaveToBytes() const final {
    std::string bytes;
    BytesStream stream(&bytes);
    stream.Write(format_);
    stream.Write(functions_);
    stream.Write(sources_);
    return ffi::Bytes(std::move(bytes));
  }
  ffi::String InspectSource(const ffi::String&) const final {
    std::string all;
    for (const auto& kv : sources_) all.append(kv.second.data(), kv.second.size());
    return all;
  }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = functions_.Get(name);
    if (!found.has_value()) return std::nullopt;
    FunctionInfo info = found.value();
    size_t buffers = NumBufferArgs(info->arg_types);
    LaunchParamConfig config;
    config.Init(info->arg_types.size(), info->launch_param_tags);
    TVM_FFI_ICHECK_LE(buffers + 1, 31) << "Metal binds at most 31 buffers";
    auto self = ffi::GetRef<ffi::Module>(this);  // keeps the module alive with its functions
    Entry entry = Compile(name);
    auto run = [self, entry, buffers, config, name](ffi::PackedArgs args, ffi::Any*, const ArgUnion64* scalars) {
      Launch(entry, name, buffers, config.Extract(args), args, scalars);
    };
    return PackFuncNonBufferArg(run, info->arg_types);
  }

 private:
  Entry Compile(const std::string& name) {
    std::lock_guard<std::mutex> hold(lock_);
    auto known = compiled_.find(name);
    if (known != compiled_.end()) return known->second;
    TVM_FFI_ICHECK(format_ == "metal") << "only MSL text can be emulated, not " << format_;
    ffi::Bytes source = sources_.at(name);
    auto compile = ffi::Function::GetGlobalRequired("metal_emulator.compile");
    // "library entry"
    std::string made = compile(ffi::String(source.data(), source.size())).cast<ffi::String>();
    std::string path = made.substr(0, made.rfind(' ')), symbol = made.substr(made.rfind(' ') + 1);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    TVM_FFI_ICHECK(library) << dlerror();
    auto entry = reinterpret_cast<Entry>(dlsym(library, symbol.c_str()));
    TVM_FFI_ICHECK(entry) << "no kernel in " << path;
    return compiled_[name] = entry;
  }

  static void Launch(Entry entry, const ffi::String& name, size_t buffers, const ThreadWorkLoad& load,
                     ffi::PackedArgs args, const ArgUnion64* scalars) {
    std::vector<void*> data(buffers + 1);
    std::vector<uint64_t> sizes(buffers + 1);
    for (size_t i = 0; i < buffers; ++i) {
      Handle* h = Open(args[i].cast<void*>());
      data[i] = h->data;
      sizes[i] = h->size;
    }
    Log log{name, {}, {}, {}};
    for (int i = 0; i < 3; ++i) {
      // TVM's Metal runtime launches an extent of zero as one.
      log.grid[i] = std::max<unsigned>(1, load.grid_dim(i));
      log.block[i] = load.block_dim(i);
    }
    TVM_FFI_ICHECK_LE(log.block[0] * log.block[1] * log.block[2], 1024u) << "threads in a threadgroup";
    char error[2048];
    Request request{data.data(), sizes.data(), buffers,  scalars, log.grid,
                    log.block,   g_config,     log.counters, error,  sizeof error};
    int bad = entry(&request);
    {
      std::lock_guard<std::mutex> hold(g_lock);
      if (g_keep) g_log.push_back(log);
    }
    if (bad) TVM_FFI_THROW(RuntimeError) << "Metal kernel " << name << ": " << error;
  }

  ffi::Map<ffi::String, ffi::Bytes> sources_;
  ffi::String format_;
  ffi::Map<ffi::String, FunctionInfo> functions_;
  std::unordered_map<std::string, Entry> compiled_;
  std::mutex lock_;
};

ffi::Module Create(ffi::Map<ffi::String, ffi::Bytes> sources, ffi::String format,
                   ffi::Map<ffi::String, FunctionInfo> functions, ffi::Map<ffi::String, ffi::String>) {
  return ffi::Module(ffi::make_object<EmulatedModule>(sources, format, functions));
}

ffi::Module Load(const ffi::Bytes& bytes) {
  std::string text(bytes.data(), bytes.size());
  BytesStream stream(&text);
  ffi::String format;
  ffi::Map<ffi::String, FunctionInfo> functions;
  ffi::Map<ffi::String, ffi::Bytes> sources;
  TVM_FFI_ICHECK(stream.Read(&format) && stream.Read(&functions) && stream.Read(&sources)) << "damaged Metal module";
  // Together they compile in a third of the time.
  auto announce = ffi::Function::GetGlobalRequired("metal_emulator.announce");
  for (const auto& kv : sources) announce(ffi::String(kv.second.data(), kv.second.size()));
  return Create(sources, format, functions, {});
}

// One line a launch: name, counters, grid, block; the log is emptied.
ffi::String TakeLog() {
  std::lock_guard<std::mutex> hold(g_lock);
  std::string out;
  for (const Log& log : g_log) {
    out += log.kernel;
    for (uint64_t c : log.counters) out += " " + std::to_string(c);
    for (unsigned g : log.grid) out += " " + std::to_string(g);
    for (unsigned b : log.block) out += " " + std::to_string(b);
    out += "\n";
  }
  g_log.clear();
  return out;
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def_packed("device_api.metal",
                  [](ffi::PackedArgs, ffi::Any* rv) {
                    static EmulatedDevice device;
                    *rv = static_cast<void*>(static_cast<DeviceAPI*>(&device));
                  })
      .def("ffi.Module.create.metal", Create)
      .def("ffi.Module.load_from_bytes.metal", Load)
      .def("metal_emulator.options",
           [](int64_t order, int64_t seed, int64_t threads, bool trace) {
             int config[4] = {static_cast<int>(order), static_cast<int>(seed), static_cast<int>(threads), trace};
             std::memcpy(g_config, config, sizeof config);
           })
      .def("metal_emulator.keep", [](bool keep) { g_keep = keep; })
      .def("metal_emulator.log", TakeLog);
}

}  // namespace runtime
}  // namespace tvm
