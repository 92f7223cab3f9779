// A CUDA driver, libcuda.so.1, with one GPU of host memory: as much of it as cuda-core and the engine call.
// A stream runs nothing until somebody waits for it, and then only what must have happened by then; one that is
// eager runs everything at once. Memory is NaN when it is allocated and again when it is freed. What a GPU would
// only punish with a race, a stall or a broken graph is written down as a complaint.
#include "driver_memory.h"
#include "driver_streams.h"

namespace {

// Kernels: whatever a library holds, those that were compiled in here are meant.
int library_load(void** library, const void*, void*, void*, unsigned, void*, void*, unsigned) {
    static char any;
    *library = &any;
    return kSuccess;
}
int library_unload(void*) {
    return kSuccess;
}
int library_kernel(void** kernel, void*, const char* name) {
    const auto found = lanes::kernels().find(name);
    if (found == lanes::kernels().end()) return kNotFound;
    *kernel = &loaded.emplace(name, Kernel{&found->second, false}).first->second;
    return kSuccess;
}
int kernel_function(void** function, void* kernel) {
    *function = kernel;
    return kSuccess;
}
int kernel_library(void** library, void*) {
    return library_load(library, nullptr, nullptr, nullptr, 0, nullptr, nullptr, 0);
}

int function_load(void* function) {
    static_cast<Kernel*>(function)->loaded = true;
    return kSuccess;
}

// The beginning of CUlaunchConfig.
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
};

int launch(const LaunchConfig* config, void* function, void** arguments, void**) {
    BEGIN(cuLaunchKernelEx);
    auto& kernel = *static_cast<Kernel*>(function);
    Stream& stream = stream_of(config->stream);
    if (stream.capture && !kernel.loaded) complain("the first launch of a kernel inside a capture");
    kernel.loaded = true;
    const lanes::Bound bound = (*kernel.bind)(arguments);
    const lanes::Dim grid{config->grid[0], config->grid[1], config->grid[2]};
    const lanes::Dim block{config->block[0], config->block[1], config->block[2]};
    stream.put([=] {
        try {
            lanes::run(bound, grid, block);
        } catch (const std::exception& error) {
            complain(error.what());
            broken = true;
        }
    });
    return kSuccess;
}

const std::map<std::string, void*>& functions() {
#define ENTRY(name, function)                    \
    {                                            \
        #name, reinterpret_cast<void*>(function) \
    }
    static const std::map<std::string, void*> all{
        ENTRY(cuInit, init),
        ENTRY(cuDriverGetVersion, driver_version),
        ENTRY(cuDeviceGetCount, device_count),
        ENTRY(cuDeviceGet, device_get),
        ENTRY(cuDeviceGetName, device_name),
        ENTRY(cuDeviceGetUuid, device_uuid),
        ENTRY(cuDeviceGetAttribute, device_attribute),
        ENTRY(cuDevicePrimaryCtxRetain, context_retain),
        ENTRY(cuDevicePrimaryCtxRelease, context_release),
        ENTRY(cuCtxSetCurrent, context_set),
        ENTRY(cuCtxPushCurrent, context_set),
        ENTRY(cuCtxGetCurrent, context_get),
        ENTRY(cuCtxPopCurrent, context_pop),
        ENTRY(cuCtxGetDevice, context_device),
        ENTRY(cuCtxGetStreamPriorityRange, context_priorities),
        ENTRY(cuGetErrorName, error_name),
        ENTRY(cuGetErrorString, error_name),
        ENTRY(cuStreamCreateWithPriority, stream_create),
        ENTRY(cuStreamDestroy, stream_destroy),
        ENTRY(cuStreamGetFlags, stream_flags),
        ENTRY(cuStreamGetPriority, stream_priority),
        ENTRY(cuStreamGetCtx, stream_context),
        ENTRY(cuStreamIsCapturing, stream_capturing),
        ENTRY(cuStreamSynchronize, stream_synchronize),
        ENTRY(cuStreamWaitEvent, stream_wait),
        ENTRY(cuEventCreate, event_create),
        ENTRY(cuEventDestroy, event_destroy),
        ENTRY(cuEventRecord, event_record),
        ENTRY(cuEventRecordWithFlags, event_record_with_flags),
        ENTRY(cuEventSynchronize, event_synchronize),
        ENTRY(cuEventQuery, event_query),
        ENTRY(cuMemGetInfo, memory_info),
        ENTRY(cuMemAlloc, memory_allocate),
        ENTRY(cuMemFree, memory_free),
        ENTRY(cuMemHostAlloc, memory_host_allocate),
        ENTRY(cuMemFreeHost, memory_host_free),
        ENTRY(cuMemcpyAsync, memory_copy),
        ENTRY(cuMemcpyHtoD, memory_to_device),
        ENTRY(cuMemcpyDtoH, memory_to_host),
        ENTRY(cuMemsetD8Async, memory_set),
        ENTRY(cuStreamBeginCapture, capture_begin),
        ENTRY(cuStreamEndCapture, capture_end),
        ENTRY(cuGraphInstantiate, graph_instantiate),
        ENTRY(cuGraphInstantiateWithFlags, graph_instantiate),
        ENTRY(cuGraphLaunch, graph_launch),
        ENTRY(cuGraphDestroy, graph_destroy),
        ENTRY(cuGraphExecDestroy, graph_executable_destroy),
        ENTRY(cuLibraryLoadData, library_load),
        ENTRY(cuLibraryUnload, library_unload),
        ENTRY(cuLibraryGetKernel, library_kernel),
        ENTRY(cuKernelGetFunction, kernel_function),
        ENTRY(cuKernelGetLibrary, kernel_library),
        ENTRY(cuFuncLoad, function_load),
        ENTRY(cuLaunchKernelEx, launch),
    };
    return all;
}

}  // namespace

extern "C" {

int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
    const bool itself = !std::strncmp(name, "cuGetProcAddress", 16);
    const auto found = functions().find(name);
    *function = itself ? reinterpret_cast<void*>(cuGetProcAddress_v2) : nullptr;
    if (found != functions().end()) *function = found->second;
    if (status) *status = *function ? 0 : 1;  // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND
    return *function ? kSuccess : kNotFound;
}
int cuInit(unsigned flags) {
    return init(flags);
}
int cuDriverGetVersion(int* version) {
    return driver_version(version);
}

// What a test asks for: as much memory, and of the streams made from now on those that are eager, a bit each.
void fake_open(std::size_t memory, unsigned eager_streams) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    used_before = used, capacity = used + memory, eager = eager_streams;
    opened.clear();
    complaints.clear();
    for (auto& [name, kernel] : loaded) kernel.loaded = false;
}
std::size_t fake_used() {
    return used - used_before;
}
// What was done wrong since fake_open, one a line.
const char* fake_complaints() {
    static std::string text;
    text.clear();
    for (const std::string& complaint : complaints) text += complaint + "\n";
    return text.c_str();
}
// Put a function of the test's on a stream.
void fake_put(void* stream, void (*work)(long), long tag) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    static_cast<Stream*>(stream)->put([=] { work(tag); });
}

}  // extern "C"
