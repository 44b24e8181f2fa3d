/* Stands for libcuda.so.1 where there is no GPU: launches nothing, and records what it was asked to.

   Has what Triton's driver and dispatch/launcher.c call. Tests read and steer it by the functions
   fake_*, see fake_driver.py. Function handles are small numbers, in the order of their loading.
   Many parameters are not used. */

#include <cuda.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RECORDS = 4096, MAX_RECORD_BYTES = 16384, MAX_FUNCTIONS = 256, MAX_PARAMS = 256, DEVICES = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---------------------------------------------------------------- steering */

static struct { int count; size_t sizes[MAX_PARAMS]; } functions[MAX_FUNCTIONS];
static int num_functions;

int fake_new_function(void) { return ++num_functions; }

void fake_set_sizes(int function, const int64_t *sizes, int count) {
  functions[function].count = count;
  for (int i = 0; i < count; i++) functions[function].sizes[i] = sizes[i];
}

static char failing[64];
static CUresult failure;
void fake_fail(const char *call, int result) {
  strncpy(failing, call, sizeof failing - 1);
  failure = result;
}
#define MAY_FAIL()                                                                                 \
  if (failure && !strncmp(failing, __func__, strlen(failing))) return failure /* cuCtxPushCurrent_v2 */

static __thread int current = 1; /* the thread's context: 1 + device, or 0 */
static int retained[DEVICES];
void fake_set_current(int device) { current = 1 + device; }
int fake_current(void) { return current - 1; }
int fake_retained(int device) { return retained[device]; }

/* ---------------------------------------------------------------- what was launched */

typedef struct {
  uint32_t grid[3], block[3], shared_bytes, num_attributes;
  uint32_t attributes[4][2]; /* id, first word of the value */
  uint64_t stream, function;
  int64_t context_device; /* current when it was launched */
  uint64_t num_bytes;
  unsigned char bytes[MAX_RECORD_BYTES]; /* of the parameters, without gaps */
} Record;

static Record *records;
static int num_records;

int fake_num_records(void) { return num_records; }
const Record *fake_record(int i) { return &records[i]; }
void fake_forget(void) { num_records = 0; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  sched_yield(); /* let another thread spoil what is shared */
  pthread_mutex_lock(&lock);
  if (!records) records = malloc(MAX_RECORDS * sizeof *records);
  Record *record = &records[num_records++ % MAX_RECORDS];
  memset(record, 0, offsetof(Record, bytes));
  record->grid[0] = config->gridDimX, record->grid[1] = config->gridDimY, record->grid[2] = config->gridDimZ;
  record->block[0] = config->blockDimX, record->block[1] = config->blockDimY, record->block[2] = config->blockDimZ;
  record->shared_bytes = config->sharedMemBytes;
  record->num_attributes = config->numAttrs;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    record->attributes[i][0] = config->attrs[i].id;
    memcpy(&record->attributes[i][1], &config->attrs[i].value, 4);
  }
  record->stream = (uint64_t)config->hStream;
  record->function = (uint64_t)function;
  record->context_device = current - 1;
  for (int i = 0; i < functions[record->function].count; i++) {
    size_t size = functions[record->function].sizes[i];
    memcpy(record->bytes + record->num_bytes, params[i], size);
    record->num_bytes += size;
  }
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

/* All that it was given, and the bit that drivers wrongly set, bit 21 of word 1. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  MAY_FAIL();
  if ((uint64_t)map % 64 || (uint64_t)base % 16) return CUDA_ERROR_INVALID_VALUE;
  uint64_t *words = map->opaque;
  memset(map, 0, sizeof *map);
  words[0] = (uint64_t)base;
  words[1] = 1ull << 21 | (uint64_t)map % 128;
  unsigned char kinds[8] = {type, rank, interleave, swizzle, promotion, fill};
  memcpy(&words[2], kinds, 8);
  for (unsigned i = 0; i < rank; i++) {
    words[3 + i] = dims[i];
    if (i + 1 < rank) words[8 + i] = strides[i];
    ((uint32_t *)&words[12])[i] = box[i];
    words[15] = words[15] << 8 | element_strides[i];
  }
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- contexts */

#define CONTEXT(device) ((CUcontext)(uintptr_t)(1 + (device)))

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)(uintptr_t)current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = (int)(uintptr_t)context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  MAY_FAIL();
  *device = current - 1;
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
static __thread int stack[8], depth;
CUresult cuCtxPushCurrent(CUcontext context) {
  MAY_FAIL();
  stack[depth++] = current;
  current = (int)(uintptr_t)context;
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext *context) {
  *context = (CUcontext)(uintptr_t)current;
  current = stack[--depth];
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  MAY_FAIL();
  __atomic_add_fetch(&retained[device], 1, __ATOMIC_SEQ_CST);
  *context = CONTEXT(device);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  __atomic_sub_fetch(&retained[device], 1, __ATOMIC_SEQ_CST);
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- modules and functions */

CUresult cuModuleLoadData(CUmodule *module, const void *data) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(uintptr_t)fake_new_function();
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
#ifndef BEFORE_CUDA_12_4
CUresult cuFuncGetParamInfo(CUfunction function, size_t i, size_t *offset, size_t *size) {
  *offset = 0;
  if (i >= (size_t)functions[(uintptr_t)function].count) return CUDA_ERROR_INVALID_VALUE;
  *size = functions[(uintptr_t)function].sizes[i];
  return CUDA_SUCCESS;
}
#endif

/* ---------------------------------------------------------------- the rest that Triton links to */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : NULL;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  MAY_FAIL();
  *device = ordinal;
  return ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetCount(int *count) { *count = DEVICES; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 9;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
