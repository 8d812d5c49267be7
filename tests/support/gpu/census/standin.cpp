// A GPU that computes nothing and writes down what it is told to: ONNX Runtime's CUDA provider runs
// on it as on a real one, chooses its kernels and launches them, and every launch is a line.
//
// Built once for each library of CUDA's that the provider needs, with that library's macro. What is
// written here are the functions whose results matter; census.py adds one that returns 0 for every
// other symbol the provider asks for.

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

static std::mutex guard;

static void note(const char *kind, const std::string &what) {
  static FILE *log = fopen(getenv("CENSUS_LOG"), "a");
  std::lock_guard<std::mutex> held(guard);
  fprintf(log, "%s\t%s\n", kind, what.c_str());
  fflush(log);
}

#ifdef CUDART

constexpr int SM_MAJOR = 9, SM_MINOR = 0, PROCESSORS = 132, SHARED_NBYTES = 232448;

static std::map<const void *, std::string> kernels;      // a host's handle of a kernel -> its name
static std::map<uintptr_t, size_t> allocated;            // address of device memory -> its size
struct Configuration { dim3 grid, block; size_t shared; cudaStream_t stream; };
static thread_local std::vector<Configuration> configured;

static std::string readable(const char *mangled) {
  int status = 0;
  char *name = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string text = name ? name : mangled;
  free(name);
  return text;
}

static void launched(const void *kernel) {
  auto found = kernels.find(kernel);
  note("KERNEL", found == kernels.end() ? "?" : found->second);
}

static cudaError_t allocate(void **pointer, size_t nbytes) {
  nbytes = (nbytes + 4096) & ~size_t(4095);
  *pointer = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::lock_guard<std::mutex> held(guard);
  allocated[uintptr_t(*pointer)] = nbytes;
  return cudaSuccess;
}

static cudaError_t release(void *pointer) {
  std::lock_guard<std::mutex> held(guard);
  auto found = allocated.find(uintptr_t(pointer));
  if (found != allocated.end()) {
    munmap(pointer, found->second);
    allocated.erase(found);
  }
  return cudaSuccess;
}

static bool is_device(const void *pointer) {
  std::lock_guard<std::mutex> held(guard);
  auto after = allocated.upper_bound(uintptr_t(pointer));
  if (after == allocated.begin()) return false;
  --after;
  return uintptr_t(pointer) < after->first + after->second;
}

static cudaError_t copied(void *target, const void *source, size_t nbytes) {
  if (is_device(target) && is_device(source)) note("COPY", std::to_string(nbytes));
  memcpy(target, source, nbytes);
  return cudaSuccess;
}

API void **__cudaRegisterFatBinary(void *) { static void *handle; return &handle; }
API void __cudaRegisterFunction(void **, const void *handle, char *, const char *name, int, uint3 *,
                                uint3 *, dim3 *, dim3 *, int *) { kernels[handle] = readable(name); }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configured.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  Configuration last = configured.back();
  configured.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t *>(stream) = last.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(const void **kernel, const void *handle) { *kernel = handle; return cudaSuccess; }
API cudaError_t __cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) { launched(kernel); return cudaSuccess; }
API cudaError_t cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) { launched(kernel); return cudaSuccess; }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *kernel, void **) { launched(kernel); return cudaSuccess; }
API cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) { launched(kernel); return cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }

API cudaError_t cudaMalloc(void **pointer, size_t nbytes) { return allocate(pointer, nbytes); }
API cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t nbytes, cudaMemPool_t, cudaStream_t) { return allocate(pointer, nbytes); }
API cudaError_t cudaFree(void *pointer) { return release(pointer); }
API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }
API cudaError_t cudaMallocHost(void **pointer, size_t nbytes) { *pointer = malloc(nbytes); return cudaSuccess; }
API cudaError_t cudaHostAlloc(void **pointer, size_t nbytes, unsigned) { *pointer = malloc(nbytes); return cudaSuccess; }
API cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
API cudaError_t cudaMemcpy(void *target, const void *source, size_t nbytes, cudaMemcpyKind) { return copied(target, source, nbytes); }
API cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t nbytes, cudaMemcpyKind, cudaStream_t) { return copied(target, source, nbytes); }
API cudaError_t cudaMemset(void *target, int value, size_t nbytes) { note("MEMSET", ""); memset(target, value, nbytes); return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void *target, int value, size_t nbytes, cudaStream_t) { return cudaMemset(target, value, nbytes); }
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *total = *free = size_t(80) << 30; return cudaSuccess; }
API cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) { *pool = cudaMemPool_t(8); return cudaSuccess; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) { memset(value, 0, 8); return cudaSuccess; }

API cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
API cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API const char *cudaGetErrorName(cudaError_t) { return "none"; }
API const char *cudaGetErrorString(cudaError_t) { return "none"; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *device, int) {
  memset(device, 0, sizeof *device);
  strcpy(device->name, "a stand-in for H100");
  device->major = SM_MAJOR, device->minor = SM_MINOR, device->multiProcessorCount = PROCESSORS;
  device->totalGlobalMem = size_t(80) << 30, device->totalConstMem = 65536;
  device->warpSize = 32, device->regsPerBlock = device->regsPerMultiprocessor = 65536;
  device->sharedMemPerBlock = 49152, device->sharedMemPerBlockOptin = SHARED_NBYTES;
  device->sharedMemPerMultiprocessor = SHARED_NBYTES + 1024;
  device->maxThreadsPerBlock = 1024, device->maxThreadsPerMultiProcessor = 2048;
  device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024, device->maxThreadsDim[2] = 64;
  device->maxGridSize[0] = 2147483647, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->memPitch = 2147483647, device->textureAlignment = 512, device->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = SM_MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = SM_MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_NBYTES; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_NBYTES + 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMemoryPoolsSupported: case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *kernel, const void *) {
  memset(kernel, 0, sizeof *kernel);
  kernel->maxThreadsPerBlock = 1024, kernel->numRegs = 64;
  kernel->binaryVersion = kernel->ptxVersion = 10 * SM_MAJOR + SM_MINOR;
  kernel->maxDynamicSharedSizeBytes = SHARED_NBYTES;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int, size_t, unsigned) { *count = 2; return cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *about, const void *pointer) {
  memset(about, 0, sizeof *about);
  about->type = is_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  about->devicePointer = about->hostPointer = const_cast<void *>(pointer);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t *stream) { static uintptr_t last = 16; *stream = cudaStream_t(last += 16); return cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = cudaEvent_t(8); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return cudaSuccess; }
API cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *, cudaJitOption *, void **, unsigned, cudaLibraryOption *, void **, unsigned) { *library = cudaLibrary_t(8); return cudaSuccess; }
API cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t, const char *name) {
  std::string *kept = new std::string(readable(name));
  kernels[kept] = *kept;
  *kernel = cudaKernel_t(kept);
  return cudaSuccess;
}
static int succeed() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *result) {
  *function = reinterpret_cast<void *>(succeed);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#endif
#ifdef CUBLAS

static void multiplied(const char *how, int m, int n, int k) {
  note("GEMM", std::string(how) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k));
}

API int cublasCreate_v2(void **handle) { *handle = reinterpret_cast<void *>(8); return 0; }
API int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
API int cublasSgemm_v2(void *, int, int, int m, int n, int k, ...) { multiplied("Sgemm", m, n, k); return 0; }
API int cublasSgemmStridedBatched(void *, int, int, int m, int n, int k, ...) { multiplied("SgemmStridedBatched", m, n, k); return 0; }
API int cublasGemmEx(void *, int, int, int m, int n, int k, ...) { multiplied("GemmEx", m, n, k); return 0; }
API int cublasGemmStridedBatchedEx(void *, int, int, int m, int n, int k, ...) { multiplied("GemmStridedBatchedEx", m, n, k); return 0; }
API int cublasGemmBatchedEx(void *, int, int, int m, int n, int k, ...) { multiplied("GemmBatchedEx", m, n, k); return 0; }

#endif
#ifdef CUBLASLT

API int cublasLtCreate(void **handle) { *handle = reinterpret_cast<void *>(8); return 0; }
API int cublasLtMatmul(...) { note("GEMM", "LtMatmul"); return 0; }

#endif
#ifdef DRIVER

API int cuDeviceGetCount(int *count) { *count = 1; return 0; }
API int cuDriverGetVersion(int *version) { *version = 13000; return 0; }

#endif
