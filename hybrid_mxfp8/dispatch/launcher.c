/* Makes all launches of a plan in one call.

   Launching from Python costs microseconds a kernel, most of them spent on taking arguments apart.
   A plan knows everything about its launches beforehand, but for the stream and where its buffers
   are. It says so once, in a program: an array of 64-bit words that Python owns. Then

       run(program, stream, *addresses)

   checks that no buffer that is written overlaps another, fills the addresses in, encodes TMA
   descriptors, and launches. All numbers are plain ints, and nothing is kept from call to call: the
   program is only read, so threads may run one at the same time (tvm-ffi releases Python's lock).

   A program, a word each:

       device, num_addresses, {bytes of the buffer},
       num_written, {index of the buffer, index of one that may be the same memory or -1},
       num_launches, {function, grid, block_threads, shared_bytes, pdl, num_params, {parameter}}

   and a parameter, in the order of the kernel's:

       SCALAR,     value                    its low bytes are passed, as many as the kernel takes
       ADDRESS,    index, offset in bytes   into a buffer
       TENSOR_MAP, index, offset, data type, bytes of an element, swizzle, rank,
                   dims and then box (rank words each, innermost first),
                   strides of dims 1.. in bytes

   launcher.py writes programs. verify() checks one; run() trusts it. */

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <tvm/ffi/c_api.h>

#define EXPORT __attribute__((visibility("default")))

enum { SCALAR, ADDRESS, TENSOR_MAP };
enum { MAX_PARAMS = 128, MAX_TENSOR_MAPS = 16, MAX_RANK = 5, MAX_BUFFERS = 4096, MAX_LAUNCHES = 4096 };
static const int64_t ANY_LOW = INT64_MIN, ANY_HIGH = INT64_MAX;

static int raise_error(const char *kind, const char *format, ...) {
  char message[512];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

static int return_int(TVMFFIAny *result, int64_t value) {
  *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = value};
  return 0;
}

static int check_ints(const char *function, const TVMFFIAny *args, int32_t num_args, int32_t at_least) {
  if (num_args < at_least)
    return raise_error("TypeError", "%s: expected at least %d arguments, got %d", function, at_least, num_args);
  for (int32_t i = 0; i < num_args; i++)
    if (args[i].type_index != kTVMFFIInt)
      return raise_error("TypeError", "%s: argument %d must be an int of 64 bits", function, i);
  return 0;
}

/* ---------------------------------------------------------------- the driver, opened when first used */

#define DRIVER_FUNCTIONS(F)                                                                        \
  F(cuGetErrorString) F(cuCtxGetDevice) F(cuDeviceGet) F(cuDevicePrimaryCtxRetain)                 \
  F(cuDevicePrimaryCtxRelease) F(cuCtxPushCurrent) F(cuCtxPopCurrent) F(cuTensorMapEncodeTiled)    \
  F(cuLaunchKernelEx) F(cuFuncGetParamInfo)
#define STRING(name) #name
#define SYMBOL(name) STRING(name) /* cuda.h's macros may add a version: cuCtxPushCurrent_v2 */

#define DECLARE(name) static __typeof__(&name) p_##name;
DRIVER_FUNCTIONS(DECLARE)

static pthread_once_t opened = PTHREAD_ONCE_INIT;
static char open_problem[512];

static void open_driver_once(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(open_problem, sizeof open_problem, "the CUDA driver does not load: %s", dlerror());
    return;
  }
#define LOAD(name)                                                                                 \
  if (!(p_##name = (__typeof__(&name))dlsym(library, SYMBOL(name))))                               \
    snprintf(open_problem, sizeof open_problem,                                                    \
             "the CUDA driver lacks %s: expected one for CUDA 12.4 or later", SYMBOL(name));
  DRIVER_FUNCTIONS(LOAD)
}

static int open_driver(void) {
  pthread_once(&opened, open_driver_once);
  return open_problem[0] ? raise_error("RuntimeError", "%s", open_problem) : 0;
}

static int driver_error(const char *call, CUresult result) {
  const char *text = NULL;
  p_cuGetErrorString(result, &text);
  return raise_error("RuntimeError", "%s: %s (CUDA error %d)", call, text ? text : "unknown error", result);
}

#define CHECK(name, ...)                                                                           \
  do {                                                                                             \
    CUresult status = p_##name(__VA_ARGS__);                                                       \
    if (status != CUDA_SUCCESS) return driver_error(#name, status);                                \
  } while (0)

/* ---------------------------------------------------------------- run */

/* Whether a written buffer overlaps another one. */
static int overlaps(const int64_t *extents, int64_t num_buffers, const int64_t *written,
                    int64_t num_written, const TVMFFIAny *addresses) {
  for (int64_t w = 0; w < num_written; w++) {
    int64_t index = written[2 * w], may_equal = written[2 * w + 1];
    int64_t start = addresses[index].v_int64, end = start + extents[index];
    if (start == end) continue;
    for (int64_t i = 0; i < num_buffers; i++) {
      int64_t other = addresses[i].v_int64;
      if (i == index || extents[i] == 0 || other >= end || start >= other + extents[i]) continue;
      if (i == may_equal && other == start) continue;
      return 1;
    }
  }
  return 0;
}

/* Encodes a TENSOR_MAP whose words after the kind start at `word`; *next is the word after it. */
static int encode(CUtensorMap *map, const int64_t *word, const TVMFFIAny *addresses, const int64_t **next) {
  static const cuuint32_t ones[MAX_RANK] = {1, 1, 1, 1, 1};
  uint64_t base = addresses[word[0]].v_uint64 + word[1];
  int64_t element_bytes = word[3], rank = word[5];
  const int64_t *dims = word + 6, *strides = dims + 2 * rank;
  int64_t last_element = (dims[0] - 1) * element_bytes; /* its byte */
  cuuint32_t box[MAX_RANK];
  for (int64_t i = 0; i < rank; i++) box[i] = dims[rank + i];
  for (int64_t i = 1; i < rank; i++) last_element += (dims[i] - 1) * strides[i - 1];
  CHECK(cuTensorMapEncodeTiled, map, word[2], rank, (void *)base, (const cuuint64_t *)dims,
        (const cuuint64_t *)strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, word[4],
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  /* Drivers wrongly set this bit for some tensors under 128 KiB: sporadic illegal addresses on
     Blackwell. NVIDIA's workaround, for the same sizes as in CUTLASS and Triton 3.7. */
  if (last_element + 1 < 128 * 1024) map->opaque[1] &= ~(1ull << 21);
  *next = strides + rank - 1;
  return 0;
}

/* Makes the launch at `word`; *next is the word after it. Only one that follows another of its
   program may start early. */
static int launch(const int64_t *word, CUstream stream, const TVMFFIAny *addresses, const int64_t **next,
                  int follows) {
  _Alignas(128) CUtensorMap maps[MAX_TENSOR_MAPS];
  uint64_t pointers[MAX_PARAMS];
  void *params[MAX_PARAMS];
  CUfunction function = (CUfunction)word[0];
  int64_t num_params = word[5], num_maps = 0;
  CUlaunchAttribute overlapping = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                   .value.programmaticStreamSerializationAllowed = 1};
  CUlaunchConfig config = {.gridDimX = word[1], .gridDimY = 1, .gridDimZ = 1,
                           .blockDimX = word[2], .blockDimY = 1, .blockDimZ = 1,
                           .sharedMemBytes = word[3], .hStream = stream,
                           .attrs = &overlapping, .numAttrs = follows && word[4]};
  word += 6;
  for (int64_t i = 0; i < num_params; i++) {
    switch (*word++) {
      case SCALAR:
        params[i] = (void *)word++;
        break;
      case ADDRESS:
        pointers[i] = addresses[word[0]].v_uint64 + word[1];
        params[i] = &pointers[i];
        word += 2;
        break;
      default:
        params[i] = &maps[num_maps];
        if (encode(&maps[num_maps++], word, addresses, &word)) return -1;
    }
  }
  CHECK(cuLaunchKernelEx, &config, function, params, NULL);
  *next = word;
  return 0;
}

static int launch_all(const int64_t *word, CUstream stream, const TVMFFIAny *addresses) {
  int64_t num_launches = *word++;
  for (int64_t i = 0; i < num_launches; i++)
    if (launch(word, stream, addresses, &word, i > 0)) return -1;
  return 0;
}

/* The same with the device's primary context current, on a thread that has none or another's. */
static int launch_all_on(int64_t ordinal, const int64_t *word, CUstream stream, const TVMFFIAny *addresses) {
  CUdevice device;
  CUcontext context;
  CHECK(cuDeviceGet, &device, ordinal);
  CHECK(cuDevicePrimaryCtxRetain, &context, device);
  CUresult pushed = p_cuCtxPushCurrent(context);
  int failed = pushed ? driver_error("cuCtxPushCurrent", pushed) : launch_all(word, stream, addresses);
  if (!pushed) p_cuCtxPopCurrent(&context);
  p_cuDevicePrimaryCtxRelease(device);
  return failed;
}

/* run(program, stream, *addresses) -> 0, or 1 with nothing launched where buffers overlap. */
EXPORT int __tvm_ffi_run(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self;
  if (check_ints("run", args, num_args, 2) || open_driver()) return -1;
  const int64_t *program = (const int64_t *)args[0].v_int64;
  CUstream stream = (CUstream)args[1].v_int64;
  const TVMFFIAny *addresses = args + 2;
  int64_t ordinal = program[0], num_buffers = program[1];
  const int64_t *extents = program + 2;
  int64_t num_written = extents[num_buffers];
  const int64_t *written = extents + num_buffers + 1;
  if (num_args - 2 != num_buffers)
    return raise_error("TypeError", "run: expected %d addresses, got %d", (int)num_buffers, num_args - 2);
  if (overlaps(extents, num_buffers, written, num_written, addresses)) return return_int(result, 1);

  CUdevice current;
  const int64_t *launches = written + 2 * num_written;
  int is_current = p_cuCtxGetDevice(&current) == CUDA_SUCCESS && current == ordinal;
  if (is_current ? launch_all(launches, stream, addresses) : launch_all_on(ordinal, launches, stream, addresses))
    return -1;
  return return_int(result, 0);
}

/* ---------------------------------------------------------------- verify, check */

typedef struct {
  const int64_t *word, *end;
  char problem[256];
} Reader;

/* The next word, if it is from low to high; else `low`, and the first problem is noted. */
static int64_t take(Reader *reader, const char *what, int64_t low, int64_t high) {
  if (reader->problem[0]) return low;
  if (reader->word == reader->end) {
    snprintf(reader->problem, sizeof reader->problem, "expected %s, got the end of the words", what);
    return low;
  }
  int64_t value = *reader->word++;
  if (low <= value && value <= high) return value;
  snprintf(reader->problem, sizeof reader->problem, "%s: expected %lld to %lld, got %lld", what,
           (long long)low, (long long)high, (long long)value);
  return low;
}

static void take_launch(Reader *reader, int64_t num_buffers) {
  take(reader, "function", 1, ANY_HIGH);
  take(reader, "grid", 1, INT32_MAX);
  take(reader, "block_threads", 1, 1024);
  take(reader, "shared_bytes", 0, 228 * 1024);
  take(reader, "pdl", 0, 1);
  int64_t num_params = take(reader, "num_params", 0, MAX_PARAMS), num_maps = 0;
  for (int64_t i = 0; i < num_params; i++) {
    int64_t kind = take(reader, "kind of parameter", SCALAR, TENSOR_MAP);
    if (kind == SCALAR) {
      take(reader, "value", ANY_LOW, ANY_HIGH);
      continue;
    }
    take(reader, "index of a buffer", 0, num_buffers - 1);
    take(reader, "offset", 0, ANY_HIGH);
    if (kind == ADDRESS) continue;
    if (++num_maps > MAX_TENSOR_MAPS && !reader->problem[0])
      snprintf(reader->problem, sizeof reader->problem, "tensor maps: expected at most %d a launch", MAX_TENSOR_MAPS);
    take(reader, "data type", 0, 255);
    take(reader, "bytes of an element", 1, 8);
    take(reader, "swizzle", 0, 255);
    int64_t rank = take(reader, "rank", 1, MAX_RANK);
    for (int64_t d = 0; d < rank; d++) take(reader, "dimension", 1, 1ll << 32);
    for (int64_t d = 0; d < rank; d++) take(reader, "box", 1, 256);
    for (int64_t d = 1; d < rank; d++) take(reader, "stride", 0, (1ll << 40) - 1);
  }
}

/* verify(program, num_words): ValueError unless run() can read it and its stack arrays hold it. */
EXPORT int __tvm_ffi_verify(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self;
  if (check_ints("verify", args, num_args, 2)) return -1;
  const int64_t *program = (const int64_t *)args[0].v_int64;
  Reader reader = {.word = program, .end = program + args[1].v_int64};
  take(&reader, "device", 0, INT32_MAX);
  int64_t num_buffers = take(&reader, "num_addresses", 0, MAX_BUFFERS);
  for (int64_t i = 0; i < num_buffers; i++) take(&reader, "bytes of a buffer", 0, 1ll << 56);
  int64_t num_written = take(&reader, "num_written", 0, num_buffers);
  for (int64_t i = 0; i < num_written; i++) {
    take(&reader, "index of a written buffer", 0, num_buffers - 1);
    take(&reader, "index of the buffer that it may be", -1, num_buffers - 1);
  }
  int64_t num_launches = take(&reader, "num_launches", 0, MAX_LAUNCHES);
  for (int64_t i = 0; i < num_launches; i++) take_launch(&reader, num_buffers);
  if (!reader.problem[0] && reader.word != reader.end)
    snprintf(reader.problem, sizeof reader.problem, "expected the end after %d words, got %d",
             (int)(reader.word - program), (int)(reader.end - program));
  if (reader.problem[0]) return raise_error("ValueError", "program: %s", reader.problem);
  return return_int(result, 0);
}

/* check(function, *bytes of each parameter): RuntimeError unless these are the kernel's. */
EXPORT int __tvm_ffi_check(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self;
  if (check_ints("check", args, num_args, 1) || open_driver()) return -1;
  CUfunction function = (CUfunction)args[0].v_int64;
  int32_t expected = num_args - 1, found = 0;
  size_t offset, size;
  for (; p_cuFuncGetParamInfo(function, found, &offset, &size) == CUDA_SUCCESS; found++)
    if (found < expected && (int64_t)size != args[1 + found].v_int64)
      return raise_error("RuntimeError", "the kernel's parameter %d: expected %d bytes, found %d", found,
                         (int)args[1 + found].v_int64, (int)size);
  if (found != expected)
    return raise_error("RuntimeError", "the kernel's parameters: expected %d, found %d", expected, found);
  return return_int(result, 0);
}
