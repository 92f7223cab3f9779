// The calls of cuBLAS and cuDNN whose answers ONNX Runtime looks at; all others are made by build.py and answer 0.
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" {
void stub_called(const char*);

int cublasCreate_v2(void** handle) {
    return *handle = std::calloc(1, 64), 0;
}
int cublasLtCreate(void** handle) {
    return *handle = std::calloc(1, 64), 0;
}
const char* cublasGetStatusString(int) {
    return "stub";
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* count) {
    enum { kResultBytes = 104 };  // of one cublasLtMatmulHeuristicResult_t
    std::memset(result, 0, kResultBytes);
    return *count = 1, 0;
}

int cudnnCreate(void** handle) {
    return *handle = std::calloc(1, 64), 0;
}
size_t cudnnGetVersion() {
    return 91300;
}
const char* cudnnGetErrorString(int) {
    return "stub";
}
void cudnnGetLastErrorString(char* text, size_t size) {
    if (size) *text = 0;
}
int cudnnBackendCreateDescriptor(int, void** descriptor) {
    return *descriptor = std::calloc(1, 64), 0;
}
int cudnnBackendGetAttribute(void*, int name, int type, int64_t asked, int64_t* count, void* out) {
    enum { kBehaviorNotes = 302, kInt64 = 3, kDescriptor = 15, kKnobType = 23 };
    int64_t given = 0;  // an engine of one configuration, without workspace
    if (name != kBehaviorNotes) {
        if (type == kKnobType && out) *static_cast<int*>(out) = 0, given = 1;
        if (type == kInt64 && out && asked >= 1) *static_cast<int64_t*>(out) = 0, given = 1;
        if (type == kDescriptor) given = 1;
    }
    if (count) *count = given;
    return 0;
}
int cudnnBackendExecute(void*, void*, void*) {
    return stub_called("launch"), 0;
}
#define CREATED(name)                         \
    int name(void** made) {                   \
        return *made = std::calloc(1, 64), 0; \
    }
CREATED(cudnnCreateTensorDescriptor)
CREATED(cudnnCreateFilterDescriptor)
CREATED(cudnnCreateConvolutionDescriptor)
CREATED(cudnnCreateActivationDescriptor)
CREATED(cudnnCreatePoolingDescriptor)
CREATED(cudnnCreateReduceTensorDescriptor)
CREATED(cudnnCreateDropoutDescriptor)
CREATED(cudnnCreateLRNDescriptor)
CREATED(cudnnCreateRNNDescriptor)
CREATED(cudnnCreateRNNDataDescriptor)
}
