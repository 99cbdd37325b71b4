// What plain CUDA kernels use, and what they can do wrong; test_basics.py says what each should give.
#include "device.cuh"

using namespace illada;

// ---- collectives -----------------------------------------------------------------------------------------------
// out (10, 64): of the values x[64], one row per collective; a block of 64 threads.
__global__ void collectives(const int* x, int* out) {
  const int t = threadIdx.x, lane = t % 32, value = x[t];
  int* scratch = reinterpret_cast<int*>(dynamic_smem());
  out[0 * 64 + t] = warp_sum(value);
  out[1 * 64 + t] = warp_max<8>(value);
  out[2 * 64 + t] = block_reduce<64>(value, scratch, Min{});
  out[3 * 64 + t] = __shfl_sync(~0u, value, lane * 7 + 3);
  out[4 * 64 + t] = __shfl_up_sync(~0u, value, 3, 16);
  out[5 * 64 + t] = __shfl_down_sync(~0u, value, 5);
  out[6 * 64 + t] = int(__ballot_sync(~0u, value > 0));
  out[7 * 64 + t] = int(__match_any_sync(~0u, value % 4));
  out[8 * 64 + t] =
      __syncthreads_count(value > 2) * 4 + __syncthreads_or(value > 90) * 2 + __syncthreads_and(value > -90);
  out[9 * 64 + t] = lane < 16 ? __reduce_add_sync(0xffffu, value) : __any_sync(0xffff0000u, value == 7);
}
extern "C" int run_collectives(const int* x, int* out, void* stream) {
  return launch({dim3(1), dim3(64), 8, static_cast<cudaStream_t>(stream)}, collectives, x, out);
}

// ---- several blocks --------------------------------------------------------------------------------------------
// counters: add int, max int, min unsigned, or, exchange, CAS (counts up), add 64-bit; total: float sum of x by the
// block that arrives last, in fixed order.
__global__ void count(const float* x, int* counters, unsigned long long* wide, float* partial, float* total) {
  float* scratch = reinterpret_cast<float*>(dynamic_smem());
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&counters[0], i);
  atomicMax(&counters[1], i * 3);
  atomicMin(reinterpret_cast<unsigned*>(&counters[2]), unsigned(i + 5));
  atomicOr(&counters[3], 1 << i % 31);
  atomicExch(&counters[4], 99);
  for (int old = counters[5], seen; (seen = atomicCAS(&counters[5], old, old + 1)) != old; old = seen) {}
  atomicAdd(wide, 1ull << 33);
  const float sum = block_reduce<64>(x[i], scratch, Sum{});
  int* last = reinterpret_cast<int*>(scratch + 2);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    *last = atomicAdd(&counters[6], 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (*last && threadIdx.x == 0) {
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += __ldcg(&partial[b]);
    *total = all;
  }
}
extern "C" int run_count(const float* x, int* counters, unsigned long long* wide, float* partial, float* total,
                         int blocks, void* stream) {
  return launch({dim3(blocks), dim3(64), 16, static_cast<cudaStream_t>(stream)}, count, x, counters, wide, partial,
                total);
}

// ---- 16-byte accesses and conversions --------------------------------------------------------------------------
template <class T> __global__ void double_rows(const T* x, T* y, int n) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * Vec16<T>::size;
  if (i + Vec16<T>::size <= n) {
    Vec16<T> v = load16_streaming(x + i);
#pragma unroll
    for (int j = 0; j < Vec16<T>::size; ++j) v.at[j] = from_float<T>(2 * to_float(v.at[j]));
    store16(y + i, v);
  } else {
    for (int j = i; j < n; ++j) y[j] = from_float<T>(2 * to_float(x[j]));
  }
}
template <class T> static int run_double_of(const void* x, void* y, int n, cudaStream_t s) {
  const int per_block = 64 * Vec16<T>::size;
  return launch({dim3((n + per_block - 1) / per_block), dim3(64), 0, s}, double_rows<T>, static_cast<const T*>(x),
                static_cast<T*>(y), n);
}
extern "C" int run_double(int dtype, const void* x, void* y, int n, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (dtype == 0) return run_double_of<float>(x, y, n, s);
  return dtype == 1 ? run_double_of<bf16>(x, y, n, s) : run_double_of<fp16>(x, y, n, s);
}

// Rounds n floats one by one, and in pairs; n is a multiple of 128.
template <class T> __global__ void narrow(const float* x, T* one, uint32_t* pairs) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
  one[i] = from_float<T>(x[i]), one[i + 1] = from_float<T>(x[i + 1]);
  pairs[i / 2] = pack<T>(x[i], x[i + 1]);
}
extern "C" int run_narrow(int half, const float* x, void* one, uint32_t* pairs, int n, void* stream) {
  const Launch l = {dim3(n / 128), dim3(64), 0, static_cast<cudaStream_t>(stream)};
  return half ? launch(l, narrow<fp16>, x, static_cast<fp16*>(one), pairs)
              : launch(l, narrow<bf16>, x, static_cast<bf16*>(one), pairs);
}

// ---- mistakes --------------------------------------------------------------------------------------------------
// One for each number; the test looks for the line with the words "mistake: NUMBER".
__global__ void mistakes(int which, float* x, int n, const int* table) {
  float* shared = reinterpret_cast<float*>(dynamic_smem());
  const int t = threadIdx.x;
  float local[4] = {1, 2, 3, 4};
  shared[t] = float(t);
  if (which == 0) x[0] = shared[64 + t];                                        // mistake: 0
  if (which == 1) x[n + t] = 1;                                                 // mistake: 1
  if (which == 2) x[0] = x[-1 - t];                                             // mistake: 2
  if (which == 3) *reinterpret_cast<float4*>(x + 1) = make_float4(1, 2, 3, 4);  // mistake: 3
  if (which == 4) x[0] = load16(x + 2).at[0];                                   // mistake: 4
  if (which == 5) x[0] = local[table[3]];                                       // mistake: 5
  if (which == 6) x[0] = float(table[4] * 3);                                   // mistake: 6
  if (which == 8 && t == 5) __syncwarp();                                       // mistake: 8
  if (which == 9 && t < 32) x[t] = __shfl_sync(0xffu << t / 8 * 8, 1.f, 9);     // mistake: 9
  if (which == 10) shared[128 + t] = 1;                                         // mistake: 10
  if (which == 11 && t == 0)
    while (__ldcg(x) != 7) {  // mistake: 11
    }
  if (which == 12) x[0] = float(t >> table[5]);                                   // mistake: 12
  if (which == 13) x[0] = float(t / table[6]);                                    // mistake: 13
  if (which == 14 && t < 32) t % 2 ? __syncwarp() : void(__ballot_sync(~0u, 1));  // mistake: 14
  if (which == 15) {  // no barrier between writing and reading: wrong under some schedule
    shared[t] = float(t);
    x[t] = shared[63 - t];
    return;
  }
  __syncthreads();                             // mistake: 7
  if (which == 16 && t == 0) x[table[7]] = 1;  // mistake: 16
}
extern "C" int run_mistakes(int which, float* x, int n, const int* table, int smem, void* stream) {
  return launch({dim3(1), dim3(64), size_t(smem), static_cast<cudaStream_t>(stream)}, mistakes, which, x, n, table);
}
