/* Counts OpenMP's parallel regions of more than one thread: put in front of GNU's OpenMP by
   LD_PRELOAD. PyTorch's own loops, oneDNN and MKL in PyTorch's Linux packages all begin theirs so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

typedef void (*body)(void *);

static long count;

static void *of_openmp(const char *name) {
    void *library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void *found = library ? dlsym(library, name) : 0;
    if (!found) abort();
    return found;
}

static void note(unsigned threads) {
    static int (*most)(void);
    if (!most) most = (int (*)(void))of_openmp("omp_get_max_threads");
    if (threads > 1 || (threads == 0 && most() > 1)) __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
}

long parallel_regions(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

void GOMP_parallel(body run, void *data, unsigned threads, unsigned flags) {
    static void (*next)(body, void *, unsigned, unsigned);
    if (!next) next = (void (*)(body, void *, unsigned, unsigned))of_openmp("GOMP_parallel");
    note(threads);
    next(run, data, threads, flags);
}

void GOMP_parallel_start(body run, void *data, unsigned threads) {
    static void (*next)(body, void *, unsigned);
    if (!next) next = (void (*)(body, void *, unsigned))of_openmp("GOMP_parallel_start");
    note(threads);
    next(run, data, threads);
}
