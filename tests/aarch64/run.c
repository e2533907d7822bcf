/* Runs calls of a compiled library: job file in, buffers of the job out.
 *
 * What the code needs of the TVM runtime is here: a launcher of parallel loops that runs the
 * tasks in turn, and the function that takes an error. The job is written by emulator.py.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { INT = 1, TENSOR = 7, TASKS = 3 };

typedef struct { int32_t kind; uint32_t zero; int64_t bits; } Any;
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} Tensor;
typedef struct { void *sync; int32_t tasks; } Group;
typedef int (*Task)(int number, Group *group, void *data);
typedef int (*Function)(void *self, const Any *args, int32_t count, Any *result);

static int launch(Task task, void *data, int tasks) {
    Group group = {0, tasks ? tasks : TASKS};
    for (int i = 0; i < group.tasks; i++) {
        if (task(i, &group, data)) return -1;
    }
    return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    fprintf(stderr, "%s: ", kind);
    for (int i = 0; i < count; i++) fputs(parts[i], stderr);
    fputc('\n', stderr);
}

static FILE *job;

static int64_t number(void) {
    int64_t value;
    if (fread(&value, sizeof value, 1, job) != 1) exit(3);
    return value;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 4;
    void **launcher = dlsym(library, "__TVMBackendParallelLaunch");
    if (launcher) *launcher = (void *)launch;
    job = fopen(argv[2], "rb");
    int64_t buffers = number();
    void **data = calloc(buffers, sizeof *data);
    int64_t *bytes = calloc(buffers, sizeof *bytes);
    for (int64_t i = 0; i < buffers; i++) {
        bytes[i] = number();
        data[i] = aligned_alloc(64, (bytes[i] + 127) / 64 * 64);
        if (bytes[i] && fread(data[i], bytes[i], 1, job) != 1) return 3;
    }
    for (int64_t calls = number(); calls; calls--) {
        char symbol[256] = {0};
        int64_t length = number();
        if (length > 255 || fread(symbol, length, 1, job) != 1) return 3;
        int64_t count = number();
        Any *args = calloc(count, sizeof *args), result = {0};
        for (int64_t i = 0; i < count; i++) {
            args[i].kind = number();
            if (args[i].kind == INT) {
                args[i].bits = number();
                continue;
            }
            Tensor *tensor = calloc(1, sizeof *tensor);
            tensor->data = data[number()];
            tensor->device_type = 1;
            tensor->code = number();
            tensor->bits = number();
            tensor->lanes = 1;
            tensor->ndim = number();
            tensor->shape = calloc(tensor->ndim + 1, sizeof(int64_t));
            for (int d = 0; d < tensor->ndim; d++) tensor->shape[d] = number();
            args[i].bits = (int64_t)tensor;
        }
        Function function = (Function)dlsym(library, symbol);
        if (!function) return fprintf(stderr, "%s\n", dlerror()), 4;
        if (function(0, args, count, &result)) return 5;
    }
    FILE *out = fopen(argv[3], "wb");
    for (int64_t i = 0; i < buffers; i++) {
        if (bytes[i] && fwrite(data[i], bytes[i], 1, out) != 1) return 6;
    }
    return fclose(out) ? 6 : 0;
}
