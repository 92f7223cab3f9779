# One cubin per kernel and architecture, installed where nvrtc.py looks before it compiles.
# A plain command instead of CMake's CUDA language: device code only needs nvcc itself.
find_program(GD_NVCC nvcc PATHS /usr/local/cuda/bin REQUIRED)

set(cubins)
foreach(stem cfg_step image_epilogue mask_epilogue)
  foreach(arch ${GD_CUDA_ARCHITECTURES})
    set(cubin "${CMAKE_CURRENT_BINARY_DIR}/${stem}.sm_${arch}.cubin")
    add_custom_command(
      OUTPUT "${cubin}"
      COMMAND "${GD_NVCC}" -cubin -std=c++17 -arch=sm_${arch} -I "${CMAKE_CURRENT_SOURCE_DIR}/${KERNELS}/core"
              -o "${cubin}" "${CMAKE_CURRENT_SOURCE_DIR}/${KERNELS}/cuda/${stem}.cu"
      DEPENDS ${KERNELS}/cuda/${stem}.cu ${KERNELS}/core/${stem}.cuh ${KERNELS}/core/common.cuh ${KERNELS}/core/half.cuh
      COMMENT "nvcc ${stem} for sm_${arch}"
      VERBATIM)
    list(APPEND cubins "${cubin}")
  endforeach()
endforeach()
add_custom_target(cubins ALL DEPENDS ${cubins})
install(FILES ${cubins} DESTINATION grounded_diffusion/kernels/cuda/cubin)
