// The functions of the CUDA runtime and driver that host code of this library calls. There is one device, with few
// multiprocessors, so that a persistent kernel has blocks that do several tiles each.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "emulator.h"

extern "C" {

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute what, int value) {
  const bool too_much = what == cudaFuncAttributeMaxDynamicSharedMemorySize && value > int(emulator::kSharedMost);
  return too_much ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
const char* cudaGetErrorString(cudaError_t e) { return e ? "CUDA error (emulated)" : "no error"; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return memset(p, value, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount: return *value = 3, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = 0, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = int(emulator::kSharedMost), cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                             const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                             const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  return emulator::encode_tensor_map(map, type, rank, base, size, stride, box, element_strides, interleave, swizzle,
                                     fill)
             ? CUDA_ERROR_INVALID_VALUE
             : CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *entry = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
