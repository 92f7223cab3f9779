// What Python calls: memory as exact as the compiler's sanitizers can see it, and launches by a kernel's name.
#include <cstdlib>
#include "lanes.h"

extern "C" void* device_allocate(std::size_t bytes) {
    void* memory = nullptr;
    return posix_memalign(&memory, 256, bytes) ? nullptr : memory;
}

extern "C" void device_free(void* memory) {
    std::free(memory);
}

extern "C" void run_blocks_reversed(bool yes) {
    lanes::reversed = yes;
}

// Null, or what is wrong with the launch.
extern "C" const char* launch(const char* name, const unsigned* grid, const unsigned* block, void** arguments) {
    static std::string error;
    try {
        const auto bound = lanes::kernels().at(name)(arguments);
        lanes::run(bound, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]});
        return nullptr;
    } catch (const std::exception& raised) {
        lanes::warp.clear();  // some wait in the middle of the kernel
        error = raised.what();
        return error.c_str();
    }
}
