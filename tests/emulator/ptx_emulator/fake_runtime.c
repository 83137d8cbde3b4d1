// Stands in for the runtime library of CuTe DSL, so that compiled host code runs without a driver:
// it hands every kernel launch to a callback.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CUDA_MULTIPROCESSORS = 16, CUDA_MAJOR = 75, CUDA_MINOR = 76, CUDA_MAX_SHARED_OPTIN = 97 };
enum { ATTRIBUTE_BYTES = 72, VALUE_OFFSET = 8, VALUE_WORDS = 4, MAX_ATTRIBUTES = 16 };

// name, {grid, block}, shared bytes, parameters, attributes, {id, value[4]} of each
typedef int (*launch_callback)(const char *, const uint32_t *, uint64_t, void **, int,
                               const int32_t *);

static launch_callback on_launch;
static int num_multiprocessors = 132, major = 9;

void emulator_configure(launch_callback callback, int multiprocessors, int compute_major) {
  on_launch = callback;
  num_multiprocessors = multiprocessors;
  major = compute_major;
}

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                         void *e, unsigned f) {
  *library = (void *)code;
  return 0;
}
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  *kernel = strdup(name);
  return 0;
}
int _cudaLibraryUnload(void *library) { return 0; }
int _cudaGetDevice(int *device) { return *device = 0; }
int _cudaGetDeviceCount(int *count) {
  *count = 1;
  return 0;
}
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == CUDA_MULTIPROCESSORS    ? num_multiprocessors
           : attribute == CUDA_MAX_SHARED_OPTIN ? 232448
           : attribute == CUDA_MAJOR            ? major
                                                : 0;
  return 0;
}
int _cudaFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  return 0;
}
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  return *value = 0;
}
int _cudaGetLastError(void) { return 0; }
int _cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *kernel, int threads,
                                                   uint64_t shared) {
  *blocks = 1;
  return 0;
}

struct launch_config {
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  void *stream;
  uint8_t *attributes;
  uint32_t num_attributes;
};

int _cudaLaunchKernelEx(const struct launch_config *config, const void *kernel, void **params) {
  uint32_t geometry[6];
  int32_t attributes[MAX_ATTRIBUTES * (1 + VALUE_WORDS)];
  int count = config->num_attributes;
  if (count > MAX_ATTRIBUTES) return 1;
  memcpy(geometry, config->grid, sizeof geometry);
  for (int i = 0; i < count; i++) {
    const uint8_t *source = config->attributes + i * ATTRIBUTE_BYTES;
    int32_t *target = attributes + i * (1 + VALUE_WORDS);
    memcpy(target, source, 4);
    memcpy(target + 1, source + VALUE_OFFSET, 4 * VALUE_WORDS);
  }
  return on_launch(kernel, geometry, config->shared_bytes, params, count, attributes);
}

int _cudaLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, void **params, uint64_t shared, void *stream) {
  struct launch_config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, 0, 0};
  return _cudaLaunchKernelEx(&config, kernel, params);
}
