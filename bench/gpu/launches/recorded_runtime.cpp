#include "recorded_runtime.h"

#include <map>

namespace recorded {

int multiprocessors = 0, shared_bytes = 0;

namespace {

std::map<const void*, std::string>& symbols() {  // objects register kernels before main
  static std::map<const void*, std::string> known;
  return known;
}

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
} pushed;

cudaError_t hand_over(const void* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared) {
  launch(symbols().at(kernel), grid, block, arguments, shared);
  return cudaSuccess;
}

}  // namespace
}  // namespace recorded

extern "C" {

// ---- what nvcc has objects call (crt/host_runtime.h)

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  recorded::symbols()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, struct CUstream_st* stream) {
  recorded::pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = recorded::pushed.grid;
  *block = recorded::pushed.block;
  *shared = recorded::pushed.shared;
  *static_cast<cudaStream_t*>(stream) = recorded::pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t) {
  return recorded::hand_over(kernel, grid, block, arguments, shared);
}

// ---- what device.h calls

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = recorded::multiprocessors;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = recorded::shared_bytes;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= recorded::shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "not as the recorded device allows";
}

}  // extern "C"
