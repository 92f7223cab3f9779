// CUDA's runtime over host memory, for ONNX Runtime's CUDA provider: kernels are counted and compute nothing, streams
// do everything at once. What a GPU would refuse while a stream is captured, or punish, is counted by name.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#undef cudaGetDeviceProperties
#define CUDA extern "C" cudaError_t

namespace {
std::recursive_mutex mutex;
std::map<std::string, long> counts;
std::map<void*, size_t> blocks;
size_t used = 0, peak = 0;
bool capturing = false;

int architecture() {
    const char* given = std::getenv("STUB_CUDA_SM");
    return given ? std::atoi(given) : 90;
}

cudaError_t note(const std::string& name) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    counts[name]++;
    return cudaSuccess;
}

// What a stream in capture does not take.
cudaError_t outside(const std::string& name) {
    return note(capturing ? name + " while capturing" : name);
}

cudaError_t launch(const dim3& grid, const dim3& block, cudaStream_t stream) {
    note("launch");
    if (!stream) note("launch on the default stream");
    const bool empty = !grid.x || !grid.y || !grid.z;
    if (empty || grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024)
        note("launch of a size that fails");
    return cudaSuccess;
}
}  // namespace

extern "C" void stub_called(const char* name) {
    note(name);
}
extern "C" void stub_reset() {
    counts.clear(), peak = used;
}
extern "C" size_t stub_used() {
    return used;
}
extern "C" size_t stub_peak() {
    return peak;
}
extern "C" const char* stub_counts() {  // a line for each name
    static std::string text;
    text.clear();
    for (auto& [name, count] : counts) text += std::to_string(count) + " " + name + "\n";
    return text.c_str();
}

CUDA cudaGetDeviceCount(int* count) {
    return *count = 1, cudaSuccess;
}
CUDA cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
CUDA cudaSetDevice(int) {
    return cudaSuccess;
}
CUDA cudaDriverGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
CUDA cudaRuntimeGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
CUDA cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "stub");
    p->major = architecture() / 10, p->minor = architecture() % 10;
    p->totalGlobalMem = 80ull << 30, p->multiProcessorCount = 132, p->warpSize = 32, p->regsPerBlock = 65536;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->sharedMemPerBlock = 49152;
    p->sharedMemPerMultiprocessor = 233472, p->sharedMemPerBlockOptin = 232448, p->l2CacheSize = 50 << 20;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    return cudaSuccess;
}
CUDA cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const std::map<cudaDeviceAttr, int> known = {{cudaDevAttrComputeCapabilityMajor, architecture() / 10},
                                                 {cudaDevAttrComputeCapabilityMinor, architecture() % 10},
                                                 {cudaDevAttrMultiProcessorCount, 132},
                                                 {cudaDevAttrMaxThreadsPerBlock, 1024},
                                                 {cudaDevAttrWarpSize, 32},
                                                 {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
                                                 {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
                                                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
                                                 {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472}};
    const auto found = known.find(attribute);
    return *value = found == known.end() ? 0 : found->second, cudaSuccess;
}
CUDA cudaDeviceSynchronize() {
    return outside("synchronize");
}

CUDA cudaMalloc(void** pointer, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    outside("allocate");
    *pointer = mmap(nullptr, size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    blocks[*pointer] = size, used += size;  // zeros, which take room only once they are written
    if (used > peak) peak = used;
    return cudaSuccess;
}
CUDA cudaFree(void* pointer) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    if (pointer) used -= blocks[pointer], munmap(pointer, blocks[pointer] + 1), blocks.erase(pointer);
    return cudaSuccess;
}
CUDA cudaMallocFromPoolAsync(void** pointer, size_t size, cudaMemPool_t, cudaStream_t) {
    return cudaMalloc(pointer, size);
}
CUDA cudaFreeAsync(void* pointer, cudaStream_t) {
    return cudaFree(pointer);
}
CUDA cudaMallocHost(void** pointer, size_t size) {
    return *pointer = std::calloc(1, size), outside("allocate on the host");
}
CUDA cudaHostAlloc(void** pointer, size_t size, unsigned) {
    return cudaMallocHost(pointer, size);
}
CUDA cudaFreeHost(void* pointer) {
    return std::free(pointer), cudaSuccess;
}
CUDA cudaMemGetInfo(size_t* free, size_t* total) {
    return *total = 80ull << 30, *free = *total - used, cudaSuccess;
}
CUDA cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    return std::memmove(to, from, size), outside("copy and wait");
}
CUDA cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    if (!stream) note("copy on the default stream");
    if (to && from) std::memmove(to, from, size);
    return kind == cudaMemcpyDeviceToDevice ? note("copy on the device") : outside("copy to or from the host");
}
CUDA cudaMemset(void* pointer, int value, size_t size) {
    return std::memset(pointer, value, size), outside("set and wait");
}
CUDA cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t) {
    return std::memset(pointer, value, size), note("set");
}
CUDA cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
    std::memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice, a->devicePointer = const_cast<void*>(pointer);
    return cudaSuccess;
}

CUDA cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = static_cast<cudaStream_t>(std::malloc(8)), cudaSuccess;
}
CUDA cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, 0);
}
CUDA cudaStreamSynchronize(cudaStream_t) {
    return outside("synchronize");
}
CUDA cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
CUDA cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return capturing = true, note("capture");
}
CUDA cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing = false;
    return *graph = reinterpret_cast<cudaGraph_t>(1), cudaSuccess;
}
CUDA cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
    return *executable = reinterpret_cast<cudaGraphExec_t>(1), cudaSuccess;
}
CUDA cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    return note("replay");
}
CUDA cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = static_cast<cudaEvent_t>(std::malloc(8)), cudaSuccess;
}
CUDA cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, 0);
}
CUDA cudaEventSynchronize(cudaEvent_t) {
    return outside("synchronize");
}
CUDA cudaEventElapsedTime(float* time, cudaEvent_t, cudaEvent_t) {
    return *time = 1, cudaSuccess;
}
extern "C" const char* cudaGetErrorName(cudaError_t) {
    return "stub";
}
extern "C" const char* cudaGetErrorString(cudaError_t) {
    return "stub";
}

CUDA cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    std::memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = architecture();
    return cudaSuccess;
}
CUDA cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
    return *count = 2, cudaSuccess;
}
CUDA cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                      cudaDriverEntryPointQueryResult* result) {
    static int (*nothing)() = [] { return 0; };
    *function = reinterpret_cast<void*>(nothing);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// What nvcc calls: kernels are registered when the provider is loaded, and launched through their host functions.
extern "C" void** __cudaRegisterFatBinary(void*) {
    return static_cast<void**>(std::calloc(1, sizeof(void*)));
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
extern "C" void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*,
                                       int*) {}
namespace {
thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;
}  // namespace
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, static_cast<cudaStream_t>(stream)};
    return 0;
}
CUDA __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
CUDA cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(grid, block, stream);
}
CUDA cudaLaunchCooperativeKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(grid, block, stream);
}
CUDA cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
    return launch(c->gridDim, c->blockDim, c->stream);
}
CUDA __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = (cudaKernel_t)function, cudaSuccess;
}
CUDA __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(grid, block, stream);
}
