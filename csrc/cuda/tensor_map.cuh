// The host side of TMA: describes a tensor in global memory to the hardware.
#pragma once
#include <cuda.h>

#include "device.cuh"

namespace illada {

template <class T> struct TensorMapType;
template <> struct TensorMapType<float> {
  static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
};
template <> struct TensorMapType<bf16> {
  static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
};
template <> struct TensorMapType<fp16> {
  static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
};

enum class Swizzle { none = CU_TENSOR_MAP_SWIZZLE_NONE, bytes128 = CU_TENSOR_MAP_SWIZZLE_128B };

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Finds the driver's function at run time, so that the library does not link to libcuda and can be imported without a
// driver. Once, because finding takes longer than encoding.
inline int find_encode_tiled(EncodeTiled* encode) {
  static EncodeTiled known = nullptr;  // threads that race here all write the same
  if ((*encode = known)) return 0;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t e =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (e != cudaSuccess) return int(e);
  if (found != cudaDriverEntryPointSuccess) return int(cudaErrorNotSupported);
  known = *encode = reinterpret_cast<EncodeTiled>(entry);
  return 0;
}

// Makes the device's context current on this thread, as the driver's functions require. torch may not have done so on a
// thread that it gave only cached memory (autograd's, a server's worker).
inline int bind_context() {
  static thread_local bool bound = false;
  if (bound) return 0;
  int device;
  if (const cudaError_t e = cudaGetDevice(&device)) return int(e);
  if (const cudaError_t e = cudaSetDevice(device)) return int(e);
  bound = true;
  return 0;
}

// Encodes a tensor map. size and box: RANK numbers of elements, the contiguous dimension first; box[0] spans at most
// 128 bytes with the 128-byte swizzle. stride_bytes: of dimensions 1 and up, multiples of 16. Elements outside the
// tensor load as zero and are not stored. Returns a cudaError_t as int.
template <int RANK, class T>
int make_tensor_map(CUtensorMap* map, const T* base, const uint64_t (&size)[RANK], const uint64_t* stride_bytes,
                    const uint32_t (&box)[RANK], Swizzle swizzle) {
  EncodeTiled encode;
  if (int e = bind_context()) return e;
  if (int e = find_encode_tiled(&encode)) return e;
  uint32_t element_strides[RANK];
  for (int i = 0; i < RANK; ++i) element_strides[i] = 1;
  const CUresult r = encode(map, TensorMapType<T>::value, RANK, const_cast<T*>(base), size, stride_bytes, box,
                            element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return int(r);  // the runtime's codes have the driver's numbers
}

}  // namespace illada
