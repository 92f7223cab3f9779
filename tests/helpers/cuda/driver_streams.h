// The driver's calls for the device, its context, streams and events.
#pragma once
#include "driver_state.h"

namespace {

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

}  // namespace
