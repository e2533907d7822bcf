"""C source that every CUDA library carries: tensor maps of weights, encoded once and kept.

To have the driver encode a map takes 0.7 us, and a call on few tokens needs three; weights stay
where they are. A map depends on nothing but its address and numbers, so a kept one is never wrong,
whatever lies there by then.
"""

# `what` is Box.text: an offset, the data type, the rank, and the numbers.
SOURCE = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define SETS 256 /* of maps; those of more weights than there are places take turns */
#define WAYS 8
typedef struct { _Alignas(64) unsigned char opaque[128]; } map_t; /* CUtensorMap */
typedef int (*encode_t)(map_t*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                        const uint32_t*, const uint32_t*, int, int, int, int);
static struct kept { map_t map; void* address; const char* what; } kept[SETS][WAYS];
static char busy;
static unsigned next;

static int encode(map_t* map, void* address, const char* what) {
  encode_t driver = (encode_t)dlsym(RTLD_DEFAULT, "cuTensorMapEncodeTiled");
  uint64_t dims[5], strides[5];
  uint32_t box[5], steps[5];
  int modes[4];
  char* at = (char*)what;
  char* start = (char*)address + strtoull(at, &at, 10);
  int type = (int)strtol(at, &at, 10), rank = (int)strtol(at, &at, 10);
  if (!driver || rank > 5) return -1;
  for (int i = 0; i < rank; i++) dims[i] = strtoull(at, &at, 10);
  for (int i = 0; i < rank - 1; i++) strides[i] = strtoull(at, &at, 10);
  for (int i = 0; i < rank; i++) box[i] = (uint32_t)strtoul(at, &at, 10);
  for (int i = 0; i < rank; i++) steps[i] = (uint32_t)strtoul(at, &at, 10);
  for (int i = 0; i < 4; i++) modes[i] = (int)strtol(at, &at, 10);
  return driver(map, type, (uint32_t)rank, start, dims, strides, box, steps, modes[0], modes[1],
                modes[2], modes[3]);
}

static void take(void) {
  while (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE)) {}
}

static void give(void) { __atomic_clear(&busy, __ATOMIC_RELEASE); }

/* The map over the weight at `address` that `what` describes; 0, or the driver's error. */
int moec_tensor_map(void* map, void* address, const char* what) {
  uint64_t mixed = ((uint64_t)address >> 8) * 0x9E3779B97F4A7C15u + (uint64_t)what;
  struct kept* set = kept[mixed * 0x9E3779B97F4A7C15u >> 32 & (SETS - 1)];
  take();
  int found = 0;
  while (found < WAYS && (set[found].address != address || set[found].what != what)) found++;
  if (found < WAYS) memcpy(map, &set[found].map, sizeof(map_t));
  give();
  if (found < WAYS) return 0;
  int code = encode(map, address, what);
  if (code) return code;
  take();
  struct kept* k = set + next++ % WAYS;
  for (int i = 0; i < WAYS; i++)
    if (!set[i].address) k = set + i;
  memcpy(&k->map, map, sizeof(map_t));
  k->address = address;
  k->what = what;
  give();
  return 0;
}
"""
