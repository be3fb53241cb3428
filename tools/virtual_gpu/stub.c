/* The functions of libcuda that Triton calls to load a kernel and launch it. All of them succeed and
   none of them does anything, so that what a launch costs is what it costs the host. */

#include <stddef.h>
#include <stdint.h>

typedef void *handle;

static int launches = 0;

int stub_launches(void) { return launches; }

int cuLaunchKernelEx(const void *config, handle function, void **arguments, void **extra) {
  launches++;
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stub"; return 0; }
int cuCtxGetCurrent(handle *context) { *context = (handle)1; return 0; }
int cuCtxSetCurrent(handle context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { *context = (handle)1; return 0; }
int cuModuleLoadData(handle *module, const void *image) { *module = (handle)1; return 0; }
int cuModuleGetFunction(handle *function, handle module, const char *name) {
  *function = (handle)1;
  return 0;
}
int cuFuncSetAttribute(handle function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(handle function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, handle function, const void *config) {
  *clusters = 1;
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }

/* Any memory is the device's, so that tensors on the CPU pass for its own. */
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 97: /* shared memory that a block can have, in bytes */
    *value = 227 * 1024;
    break;
  case 81: /* and a multiprocessor */
    *value = 228 * 1024;
    break;
  default: /* multiprocessors; the others are clocks and widths that nobody reads */
    *value = 132;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, handle function) {
  *value = attribute == 0 ? 1024 : 0; /* the most threads of a block, else registers and spills */
  return 0;
}
