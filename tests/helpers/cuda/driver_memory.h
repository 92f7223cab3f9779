// The driver's calls for memory and graphs.
#pragma once
#include "driver_state.h"

namespace {

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

}  // namespace
