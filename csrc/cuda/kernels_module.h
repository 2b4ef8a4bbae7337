#pragma once

#include <pybind11/pybind11.h>

namespace greedynas::cuda {

void bind_kernels(pybind11::module_& module);

}  // namespace greedynas::cuda
