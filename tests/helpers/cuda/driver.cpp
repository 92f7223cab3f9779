// A CUDA driver, libcuda.so.1, with one GPU of host memory: as much of it as cuda-core and the engine call.
// A stream runs nothing until somebody waits for it, and then only what must have happened by then; one that is
// eager runs everything at once. Memory is NaN when it is allocated and again when it is freed. What a GPU would
// only punish with a race, a stall or a broken graph is written down as a complaint.
#include "lanes.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#undef __CUDACC__
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>

namespace {

using Work = std::function<void()>;
using Pointer = unsigned long long;  // CUdeviceptr
// Values of CUresult.
enum Result {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kIllegalState = 401,
    kNotFound = 500,
    kNotReady = 600,
    kLaunchFailed = 719,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
};
constexpr int kRelaxed = 2;          // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr std::size_t kAlign = 256;  // what cuMemAlloc gives at least

std::recursive_mutex lock;
std::set<std::string> complaints;
bool broken = false;  // a kernel has failed: as on a GPU, nothing works from then on

void complain(const std::string& what) {
    complaints.insert(what);
}

struct Graph {
    std::vector<Work> nodes;
};

struct Stream {
    std::vector<Work> waiting;
    std::size_t done = 0;
    bool eager = false, spoiled = false;
    int mode = 0;
    std::unique_ptr<Graph> capture;

    void run(std::size_t until) {
        while (done < until) {
            const Work work = std::move(waiting[done]);
            ++done;
            work();
        }
    }
    void run_all() {
        if (!capture) run(waiting.size());
    }
    void put(Work work) {
        if (capture) {
            capture->nodes.push_back(std::move(work));
            return;
        }
        waiting.push_back(std::move(work));
        if (eager) run(waiting.size());
    }
};

struct Event {
    Stream* stream = nullptr;
    std::size_t at = 0;
};

struct Kernel {
    const lanes::Bind* bind;
    bool loaded;  // CUDA loads a kernel's code at its first launch, and cannot do it in a capture
};

std::vector<Stream*> streams;
std::vector<Stream*> opened;  // since the last fake_open
unsigned eager = 0;           // bit k: the k-th of them
std::map<Pointer, std::size_t> device_blocks, host_blocks;
std::map<std::string, Kernel> loaded;
std::size_t capacity = std::size_t{1} << 40, used = 0, used_before = 0;  // the last: by devices of earlier tests
thread_local void* context = nullptr;
void* const primary = &lock;

// The block that holds [p, p + n), or not.
bool within(const std::map<Pointer, std::size_t>& blocks, Pointer p, std::size_t n) {
    auto after = blocks.upper_bound(p);
    if (after == blocks.begin()) return false;
    --after;
    return p + n <= after->first + after->second;
}

Stream& stream_of(void* handle) {
    static Stream legacy;
    legacy.eager = true;
    if (reinterpret_cast<std::size_t>(handle) > 2) return *static_cast<Stream*>(handle);
    complain("work on the default stream");
    return legacy;
}

// What may break a capture that another thread is in.
void unsafe(const char* call) {
    for (Stream* stream : streams) {
        if (!stream->capture || stream->mode == kRelaxed) continue;
        stream->spoiled = true;
        complain(std::string(call) + " while a stream is captured");
    }
}

int ready(const char* call) {
    if (broken) return kLaunchFailed;
    if (context) return kSuccess;
    complain(std::string(call) + " without a context");
    return kInvalidContext;
}

#define BEGIN(call)                                    \
    std::lock_guard<std::recursive_mutex> guard(lock); \
    if (const int error = ready(#call)) return error

int allocate(void** memory, std::size_t bytes, std::map<Pointer, std::size_t>& blocks) {
    if (posix_memalign(memory, kAlign, bytes)) return kOutOfMemory;
    std::memset(*memory, 0xFF, bytes);
    blocks[reinterpret_cast<Pointer>(*memory)] = bytes;
    return kSuccess;
}

int release(Pointer pointer, std::map<Pointer, std::size_t>& blocks) {
    for (Stream* stream : streams) stream->run_all();
    const auto found = blocks.find(pointer);
    if (found == blocks.end()) return kInvalidValue;
    std::memset(reinterpret_cast<void*>(pointer), 0xFF, found->second);
    std::free(reinterpret_cast<void*>(pointer));
    blocks.erase(found);
    return kSuccess;
}

// ---- the device and its context

int init(unsigned) {
    return kSuccess;
}
int driver_version(int* version) {
    *version = 13000;
    return kSuccess;
}
int device_count(int* count) {
    *count = 1;
    return kSuccess;
}
int device_get(int* device, int number) {
    *device = 0;
    return number ? kInvalidDevice : kSuccess;
}
int device_name(char* name, int length, int) {
    std::snprintf(name, length, "host");
    return kSuccess;
}
int device_uuid(void* uuid, int) {
    std::memset(uuid, 7, 16);
    return kSuccess;
}
int device_attribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : 0;  // compute capability 9.0: 75 is its major part; no memory pools
    return kSuccess;
}
int context_retain(void** to, int) {
    *to = primary;
    return kSuccess;
}
int context_release(int) {
    return kSuccess;
}
int context_set(void* to) {
    context = to;
    return kSuccess;
}
int context_get(void** to) {
    *to = context;
    return kSuccess;
}
int context_pop(void** to) {
    if (to) *to = context;
    context = nullptr;
    return kSuccess;
}
int context_device(int* device) {
    *device = 0;
    return context ? kSuccess : kInvalidContext;
}
int context_priorities(int* least, int* greatest) {
    *least = *greatest = 0;
    return kSuccess;
}
int error_name(int error, const char** name) {
    static thread_local std::string text;
    *name = (text = "CUDA_ERROR_" + std::to_string(error)).c_str();
    return kSuccess;
}

// ---- streams and events

int stream_create(void** handle, unsigned, int) {
    BEGIN(cuStreamCreate);
    auto* stream = new Stream;  // lives as long as the process: events may remember it
    stream->eager = eager >> opened.size() & 1;
    streams.push_back(stream), opened.push_back(stream);
    *handle = stream;
    return kSuccess;
}
int stream_destroy(void*) {
    return kSuccess;
}
int stream_flags(void*, unsigned* flags) {
    *flags = 1;  // CU_STREAM_NON_BLOCKING
    return kSuccess;
}
int stream_priority(void*, int* priority) {
    *priority = 0;
    return kSuccess;
}
int stream_context(void*, void** to) {
    *to = primary;
    return kSuccess;
}
int stream_capturing(void* handle, int* status) {
    *status = stream_of(handle).capture ? 1 : 0;
    return kSuccess;
}
int stream_synchronize(void* handle) {
    BEGIN(cuStreamSynchronize);
    Stream& stream = stream_of(handle);
    if (stream.capture) {
        stream.spoiled = true;
        return kCaptureUnsupported;
    }
    stream.run_all();
    return broken ? kLaunchFailed : kSuccess;
}
int stream_wait(void* handle, void* event, unsigned) {
    BEGIN(cuStreamWaitEvent);
    const Event was = *static_cast<Event*>(event);
    if (was.stream) stream_of(handle).put([was] { was.stream->run(was.at); });
    return kSuccess;
}
int event_create(void** event, unsigned) {
    BEGIN(cuEventCreate);
    *event = new Event;
    return kSuccess;
}
int event_destroy(void* event) {
    delete static_cast<Event*>(event);
    return kSuccess;
}
int event_record(void* event, void* handle) {
    BEGIN(cuEventRecord);
    Stream& stream = stream_of(handle);
    *static_cast<Event*>(event) = {&stream, stream.waiting.size()};
    return kSuccess;
}
int event_record_with_flags(void* event, void* handle, unsigned) {
    return event_record(event, handle);
}
int event_synchronize(void* event) {
    BEGIN(cuEventSynchronize);
    unsafe("cuEventSynchronize");
    const Event was = *static_cast<Event*>(event);
    if (was.stream) was.stream->run(was.at);
    return broken ? kLaunchFailed : kSuccess;
}
int event_query(void* event) {
    BEGIN(cuEventQuery);
    const Event was = *static_cast<Event*>(event);
    return !was.stream || was.stream->done >= was.at ? kSuccess : kNotReady;
}

// ---- memory

int memory_info(std::size_t* free, std::size_t* total) {
    BEGIN(cuMemGetInfo);
    *free = capacity - used, *total = capacity;
    return kSuccess;
}
int memory_allocate(Pointer* pointer, std::size_t bytes) {
    BEGIN(cuMemAlloc);
    unsafe("cuMemAlloc");
    if (bytes > capacity - used) return kOutOfMemory;
    used += bytes;
    return allocate(reinterpret_cast<void**>(pointer), bytes, device_blocks);
}
int memory_free(Pointer pointer) {
    BEGIN(cuMemFree);
    unsafe("cuMemFree");
    const std::size_t bytes = device_blocks.count(pointer) ? device_blocks[pointer] : 0;
    used -= bytes;
    return release(pointer, device_blocks);
}
int memory_host_allocate(void** memory, std::size_t bytes, unsigned) {
    BEGIN(cuMemHostAlloc);
    return allocate(memory, bytes, host_blocks);
}
int memory_host_free(void* memory) {
    BEGIN(cuMemFreeHost);
    return release(reinterpret_cast<Pointer>(memory), host_blocks);
}
int memory_copy(Pointer to, Pointer from, std::size_t bytes, void* handle) {
    BEGIN(cuMemcpyAsync);
    const auto known = [=] {
        const bool to_device = within(device_blocks, to, bytes), from_device = within(device_blocks, from, bytes);
        const bool whole =
            (to_device || within(host_blocks, to, bytes)) && (from_device || within(host_blocks, from, bytes));
        return whole && (to_device || from_device);
    };
    if (!known()) complain("a copy that is not between device memory and device or pinned memory");
    stream_of(handle).put([=] {
        if (!known()) complain("a copy that ran when its memory was freed");
        std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    });
    return kSuccess;
}
int memory_to_device(Pointer to, const void* from, std::size_t bytes) {
    BEGIN(cuMemcpyHtoD);
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return within(device_blocks, to, bytes) ? kSuccess : kInvalidValue;
}
int memory_to_host(void* to, Pointer from, std::size_t bytes) {
    BEGIN(cuMemcpyDtoH);
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return within(device_blocks, from, bytes) ? kSuccess : kInvalidValue;
}
int memory_set(Pointer to, unsigned char value, std::size_t bytes, void* handle) {
    BEGIN(cuMemsetD8Async);
    if (!within(device_blocks, to, bytes)) return kInvalidValue;
    stream_of(handle).put([=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
    return kSuccess;
}

// ---- graphs

int capture_begin(void* handle, int mode) {
    BEGIN(cuStreamBeginCapture);
    Stream& stream = stream_of(handle);
    if (stream.capture) return kIllegalState;
    stream.capture = std::make_unique<Graph>();
    stream.mode = mode, stream.spoiled = false;
    return kSuccess;
}
int capture_end(void* handle, void** graph) {
    BEGIN(cuStreamEndCapture);
    Stream& stream = stream_of(handle);
    if (!stream.capture) return kIllegalState;
    std::unique_ptr<Graph> made = std::move(stream.capture);
    *graph = stream.spoiled ? nullptr : made.release();
    return stream.spoiled ? kCaptureInvalidated : kSuccess;
}
int graph_instantiate(void** executable, void* graph, unsigned long long) {
    BEGIN(cuGraphInstantiate);
    *executable = new std::shared_ptr<Graph>(new Graph(*static_cast<Graph*>(graph)));
    return kSuccess;
}
int graph_launch(void* executable, void* handle) {
    BEGIN(cuGraphLaunch);
    const std::shared_ptr<Graph> graph = *static_cast<std::shared_ptr<Graph>*>(executable);
    stream_of(handle).put([graph] {
        for (const Work& node : graph->nodes) node();
    });
    return kSuccess;
}
int graph_destroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return kSuccess;
}
int graph_executable_destroy(void* executable) {
    delete static_cast<std::shared_ptr<Graph>*>(executable);
    return kSuccess;
}

// ---- kernels: whatever a library holds, those that were compiled in here are meant

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
