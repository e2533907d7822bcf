"""C source that every CPU library carries: its parallel loops on threads of an OpenMP runtime.

A process in which torch works has threads of torch's OpenMP runtime that go on spinning for
milliseconds after each of its operations. Those of a second pool then get half of a core, and
all wait for them: on two cores a block took twice as long after a torch matmul as alone. So the
loops can run on the threads that spin. The runtime (moec.runtime.openmp) passes the functions of
the OpenMP runtime that it finds in the process, and says which thread's loops use them; no library
is linked.
"""

# What TVM's code generation passes: int task(int number, struct {void*; int32_t tasks}*, void*).
SOURCE = r"""
typedef int (*task_t)(int, void*, void*);
typedef int (*task_launch_t)(task_t, void*, int);
struct group { void* sync; int tasks; };
struct work { task_t run; void* data; int tasks, failed; };
static void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
static int (*thread_num)(void);
static int (*num_threads)(void);
static int (*max_threads)(void);
static task_launch_t other;
static _Thread_local int workers; /* 0: the loops of this thread are for `other` */

static void body(void* argument) {
  struct work* work = argument;
  struct group group = {0, work->tasks};
  int step = num_threads();
  for (int i = thread_num(); i < work->tasks; i += step)
    if (work->run(i, &group, work->data)) __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
}

/* TVMBackendParallelLaunch; a team as large as that of the caller's other loops is kept. */
EXPORT int moec_omp_launch(task_t run, void* data, int tasks) {
  if (!workers) return other(run, data, tasks);
  struct work work = {run, data, tasks > 0 ? tasks : workers, 0};
  if (work.tasks == 1) {
    struct group group = {0, 1};
    return run(0, &group, data);
  }
  int most = max_threads();
  parallel(body, &work, most > work.tasks ? most : work.tasks, 0);
  return work.failed ? -1 : 0;
}

/* The calling thread's loops run on so many threads of the OpenMP runtime. */
EXPORT void moec_omp_workers(int count) { workers = count; }

/* GOMP_parallel, omp_get_{thread_num, num_threads, max_threads}, and who launches else. */
EXPORT void moec_omp_setup(void* a, void* b, void* c, void* d, void* e) {
  parallel = (void (*)(void (*)(void*), void*, unsigned, unsigned))a;
  thread_num = (int (*)(void))b;
  num_threads = (int (*)(void))c;
  max_threads = (int (*)(void))d;
  other = (task_launch_t)e;
}
"""
