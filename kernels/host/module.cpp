// The host extension: grounded_diffusion._kernels.
#include <nanobind/nanobind.h>

namespace gd {
void bind_cfg_step(nanobind::module_& m);
void bind_image_epilogue(nanobind::module_& m);
void bind_mask_epilogue(nanobind::module_& m);
}  // namespace gd

NB_MODULE(_kernels, m) {
    m.doc() = "Host loops of the kernels. Use grounded_diffusion.kernels, which checks the arguments.";
    gd::bind_cfg_step(m);
    gd::bind_image_epilogue(m);
    gd::bind_mask_epilogue(m);
}
