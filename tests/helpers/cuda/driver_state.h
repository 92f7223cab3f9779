// The state of the driver in driver.cpp: its streams, its memory, and what was done wrong.
#pragma once
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
int running = 0;      // pieces of work that have begun: one that waits for another stream runs that one's inside it
std::vector<Work> postponed;  // what has to wait until none is

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
            ++running;
            work();
            --running;
        }
        while (!running && !postponed.empty()) {
            const Work freeing = std::move(postponed.back());
            postponed.pop_back();
            freeing();
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

// Freeing waits for all streams. Inside a piece of work, where Python may collect an array, that would run what comes
// after the work before the work is done.
int release(Pointer pointer, std::map<Pointer, std::size_t>& blocks) {
    if (running) {
        postponed.push_back([pointer, &blocks] { release(pointer, blocks); });
        return kSuccess;
    }
    for (Stream* stream : streams) stream->run_all();
    const auto found = blocks.find(pointer);
    if (found == blocks.end()) return kInvalidValue;
    std::memset(reinterpret_cast<void*>(pointer), 0xFF, found->second);
    std::free(reinterpret_cast<void*>(pointer));
    blocks.erase(found);
    return kSuccess;
}

}  // namespace
