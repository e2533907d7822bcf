"""C source that every CPU and CUDA library carries: a call's tensors, checked and passed on.

What a call costs beside its kernels is Python asking each tensor for its dtype, shape, layout and
address. Here the same questions take some nanoseconds. The runtime (moec.runtime.native) lays out
a `call_t` for a compiled function and a thread; NumPy arrays are read where NumPy's C ABI has
their fields, torch tensors through DLPack's exchange interface. Whatever does not fit is refused
without a word, and explained by the runtime. Nothing of Python is linked: what is needed of it
the runtime passes.
"""

# Changes of `call_t` or of what is returned need other names of the functions: artifacts stay.
SOURCE = r"""
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#define EXPORT __attribute__((visibility("default")))
enum { DONE, REFUSED, UNREADY, FAILED };
typedef struct { int32_t kind; uint32_t zero; int64_t bits; } value_t; /* TVMFFIAny */
typedef struct { /* DLTensor */
  char* data;
  int32_t device, index, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
} tensor_t;
/* DLPackExchangeAPI, version 1. */
typedef struct {
  struct { uint32_t major, minor; void* older; } header;
  void *allocate, *managed_in, *managed_out;
  int (*read)(void*, tensor_t*);
  int (*stream)(int32_t, int32_t, void**);
} exchange_t;
/* PyArrayObject_fields, behind the header of an object, whose last word is its type. */
typedef struct {
  char* data;
  int nd;
  int64_t *dims, *strides;
  void *base, *dtype;
  int flags;
} array_t;
enum { ALIGN = 256 }; /* of a workspace on a device */
enum { C_CONTIGUOUS = 1, WRITEABLE = 0x400 };

/* An input or output: the tensor that the compiled function is given, complete but for its
   memory; NumPy's dtype; bytes of a token; what the address must be a multiple of. */
typedef struct { tensor_t* own; void* dtype; int64_t row, align; } port_t;
/* A thread's workers and workspace, of `size` bytes. */
typedef struct { int64_t workers; char* space; int64_t size; } thread_t;
/* Functions of a device, of the current device and of torch's allocator for it. */
typedef struct {
  int (*current)(int*);                               /* cudaGetDevice */
  int (*set_stream)(int32_t, int32_t, void*, void**); /* TVMFFIEnvSetStream */
  int (*allocate)(uint64_t, void**);                  /* on the current stream */
  int (*release)(void*);
} device_t;
typedef struct {
  int (*run)(void*, value_t*, int32_t, value_t*); /* TVMFFIFunctionCall of `function` */
  void* function;
  value_t* values;
  int32_t count, inputs, outputs, unused;
  thread_t* thread; /* on the CPU */
  int64_t workers, need; /* bytes of workspace */
  tensor_t* space;
  const device_t* device; /* 0: the CPU */
  port_t ports[8]; /* inputs, then outputs */
} call_t;

static ptrdiff_t header;
static void* array_type;
static void* (*unlock)(void); /* PyEval_SaveThread */
static void (*lock)(void*);   /* PyEval_RestoreThread */

EXPORT void moec_call_1_setup(ptrdiff_t size, void* type, void* save, void* restore) {
  header = size;
  array_type = type;
  unlock = (void* (*)(void))save;
  lock = (void (*)(void*))restore;
}

/* Outputs are written while inputs are read, so they must not overlap. */
static int apart(const call_t* c) {
  int64_t tokens = c->ports[0].own->shape[0];
  for (int o = c->inputs; o < c->inputs + c->outputs; o++) {
    char *at = c->ports[o].own->data, *end = at + tokens * c->ports[o].row;
    for (int i = 0; i < c->inputs; i++) {
      char* in = c->ports[i].own->data;
      if (at < in + tokens * c->ports[i].row && in < end) return 0;
    }
  }
  return 1;
}

static int read_array(const port_t* p, const char* object, int writable) {
  if (*(void* const*)(object + header - sizeof(void*)) != array_type) return 0;
  const array_t* a = (const array_t*)(object + header);
  int flags = writable ? C_CONTIGUOUS | WRITEABLE : C_CONTIGUOUS;
  if (a->dtype != p->dtype || a->nd != p->own->ndim || (a->flags & flags) != flags) return 0;
  for (int d = 0; d < a->nd; d++)
    if (a->dims[d] != p->own->shape[d]) return 0;
  p->own->data = a->data;
  return 1;
}

static int read_tensor(const port_t* p, const exchange_t* exchange, void* object) {
  tensor_t t, *own = p->own;
  if (exchange->read(object, &t)) return 0; /* Python's error is set, and raised by ctypes */
  if (t.code != own->code || t.bits != own->bits || t.lanes != own->lanes ||
      t.ndim != own->ndim || t.device != own->device || t.index != own->index || !t.data)
    return 0;
  int64_t step = 1;
  for (int d = t.ndim - 1; d >= 0; d--) {
    if (t.shape[d] != own->shape[d]) return 0;
    if (t.strides && t.shape[d] != 1 && t.strides[d] != step) return 0;
    step *= t.shape[d];
  }
  own->data = t.data + t.offset;
  return 1;
}

static int run(const call_t* c) {
  value_t result = {0, 0, 0};
  return c->run(c->function, c->values, c->count, &result) ? FAILED : DONE;
}

static int on_thread(const call_t* c) {
  if (c->thread->workers != c->workers || c->thread->size < c->need) return UNREADY;
  c->space->data = c->thread->space;
  void* state = unlock();
  int code = run(c);
  lock(state);
  return code;
}

/* A launch may still wait for its workspace when that is given back: it goes to later work of the
   same stream only. Allocators lock, and may want Python's lock as well: it is not held there. */
static int on_device(const call_t* c, const exchange_t* exchange) {
  const device_t* d = c->device;
  int32_t device = c->ports[0].own->device, index = c->ports[0].own->index, now;
  void *stream = 0, *before = 0, *room = 0;
  if (!exchange || d->current(&now) || now != index) return REFUSED;
  if (exchange->stream(device, index, &stream)) return REFUSED;
  void* state = unlock();
  int code = REFUSED;
  if (!d->set_stream(device, index, stream, &before)) {
    if (!d->allocate((uint64_t)c->need + ALIGN, &room)) {
      c->space->data = (char*)(((uintptr_t)room + ALIGN - 1) / ALIGN * ALIGN);
      code = run(c);
      d->release(room);
    }
    d->set_stream(device, index, before, 0);
  }
  lock(state);
  return code;
}

static int call(const call_t* c, const exchange_t* exchange, int count, char* const* objects) {
  if (count != c->inputs + c->outputs) return REFUSED;
  for (int i = 0; i < count; i++) {
    const port_t* p = c->ports + i;
    if (exchange ? !read_tensor(p, exchange, objects[i])
                 : !read_array(p, objects[i], i >= c->inputs))
      return REFUSED;
    if ((uintptr_t)p->own->data % (uintptr_t)p->align) return REFUSED;
  }
  if (!apart(c)) return REFUSED;
  return c->device ? on_device(c, exchange) : on_thread(c);
}

/* Objects of Python; `exchange` is that of torch, or 0 where they should be NumPy arrays. */
EXPORT int moec_call_1_with2(call_t* c, exchange_t* exchange, char* p, char* q) {
  char* objects[] = {p, q};
  return call(c, exchange, 2, objects);
}

EXPORT int moec_call_1_with3(call_t* c, exchange_t* exchange, char* p, char* q, char* r) {
  char* objects[] = {p, q, r};
  return call(c, exchange, 3, objects);
}

EXPORT int moec_call_1_with4(call_t* c, exchange_t* exchange, char* p, char* q, char* r, char* s) {
  char* objects[] = {p, q, r, s};
  return call(c, exchange, 4, objects);
}
"""
