// One small kernel for each primitive of hopper.cuh that moves or multiplies data: raw bytes in, raw registers or bytes
// out. test_layouts.py compares them with the documented layouts, test_hardware.py with a GPU.
#include "hopper.cuh"

using namespace illada;

// ---- wgmma -----------------------------------------------------------------------------------------------------
// What to multiply: images of shared memory for A (or 4 register words for each thread) and B, their descriptors.
struct WgmmaProbe {
  int type;  // 0 bf16, 1 fp16
  int a_kind;  // 0 K-major, 1 MN-major, 2 registers
  int b_kind;  // 0 K-major, 1 MN-major
  int accumulate;  // 0: d = a b, 1: d += a b
  uint32_t a_start, a_stride, a_lead, b_start, b_stride, b_lead;  // start: bytes into the image
};
constexpr int kImage = 32768;  // bytes of an image

template <class T, int N>
ILLADA_DEVICE void probe_multiply(float (&d)[N / 2], const uint8_t* smem, const uint32_t (&a)[4], const WgmmaProbe& p) {
  const uint64_t b = smem_desc(smem + kImage + p.b_start, p.b_stride, p.b_lead);
  if (p.a_kind == 2) {
    if (p.b_kind == 0) wgmma<T, Major::K>(d, a, b, p.accumulate);
    if (p.b_kind == 1) wgmma<T, Major::MN>(d, a, b, p.accumulate);
    return;
  }
  const uint64_t from = smem_desc(smem + p.a_start, p.a_stride, p.a_lead);
  if (p.a_kind == 0 && p.b_kind == 0) wgmma<T, Major::K, Major::K>(d, from, b, p.accumulate);
  if (p.a_kind == 0 && p.b_kind == 1) wgmma<T, Major::K, Major::MN>(d, from, b, p.accumulate);
  if (p.a_kind == 1 && p.b_kind == 0) wgmma<T, Major::MN, Major::K>(d, from, b, p.accumulate);
  if (p.a_kind == 1 && p.b_kind == 1) wgmma<T, Major::MN, Major::MN>(d, from, b, p.accumulate);
}

// d (128, N / 2): each thread's accumulators, in and out. ALL: every type and kind, else only fp16 where both are
// MN-major and bf16 where both are K-major (32 shapes times 12 kinds would take long to compile).
template <int N, bool ALL>
__global__ void __launch_bounds__(128, 1)
    probe_wgmma_kernel(const uint4* a, const uint32_t* a_registers, const uint4* b, float* d, WgmmaProbe p) {
  uint8_t* smem = dynamic_smem();
  for (int i = threadIdx.x; i < kImage / 16; i += 128) {
    reinterpret_cast<uint4*>(smem)[i] = a[i];
    reinterpret_cast<uint4*>(smem + kImage)[i] = b[i];
  }
  float sum[N / 2];
  uint32_t words[4];
  for (int i = 0; i < N / 2; ++i) sum[i] = d[threadIdx.x * (N / 2) + i];
  for (int i = 0; i < 4; ++i) words[i] = a_registers[threadIdx.x * 4 + i];
  fence_proxy_async();
  __syncthreads();
  reg_fence(sum);
  reg_fence(words);
  wgmma_fence();
  if constexpr (ALL) {
    if (p.type == 0) probe_multiply<bf16, N>(sum, smem, words, p);
    if (p.type == 1) probe_multiply<fp16, N>(sum, smem, words, p);
  } else {
    const uint64_t from_a = smem_desc(smem + p.a_start, p.a_stride, p.a_lead);
    const uint64_t from_b = smem_desc(smem + kImage + p.b_start, p.b_stride, p.b_lead);
    if (p.type == 0) wgmma<bf16>(sum, from_a, from_b, p.accumulate);
    if (p.type == 1) wgmma<fp16, Major::MN, Major::MN>(sum, from_a, from_b, p.accumulate);
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(sum);
  for (int i = 0; i < N / 2; ++i) d[threadIdx.x * (N / 2) + i] = sum[i];
}

template <int N>
static int find_wgmma(int n, const uint4* a, const uint32_t* a_registers, const uint4* b, float* d, const WgmmaProbe& p,
                      cudaStream_t stream) {
  constexpr bool all = N == 8 || N == 64 || N == 136 || N == 256;
  if (n == N)
    return launch({dim3(1), dim3(128), 2 * kImage, stream}, probe_wgmma_kernel<N, all>, a, a_registers, b, d, p);
  if constexpr (N < 256) return find_wgmma<N + 8>(n, a, a_registers, b, d, p, stream);
  return int(cudaErrorInvalidValue);
}
extern "C" int probe_wgmma(int n, int type, int a_kind, int b_kind, int accumulate, uint32_t a_start, uint32_t a_stride,
                           uint32_t a_lead, uint32_t b_start, uint32_t b_stride, uint32_t b_lead, const uint4* a,
                           const uint32_t* a_registers, const uint4* b, float* d, void* stream) {
  const WgmmaProbe p{type, a_kind, b_kind, accumulate, a_start, a_stride, a_lead, b_start, b_stride, b_lead};
  return find_wgmma<8>(n, a, a_registers, b, d, p, static_cast<cudaStream_t>(stream));
}

// ---- bulk tensor copies ----------------------------------------------------------------------------------------
// Loads a box of 64 x 8 elements of a bf16 (depth, rows, columns) tensor at (x, y, z), with or without swizzle; image:
// its 1024 bytes of shared memory.
__global__ void probe_load_kernel(const __grid_constant__ CUtensorMap map, uint4* image, int x, int y, int z) {
  uint8_t* smem = dynamic_smem();
  uint64_t* bar = reinterpret_cast<uint64_t*>(smem + 1024);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_arrive_expect_tx(bar, 1024);
    tma_load(smem, &map, bar, x, y, z);
  }
  mbar_wait(bar, 0);
  image[threadIdx.x] = reinterpret_cast<uint4*>(smem)[threadIdx.x];
}
static int cube_map(CUtensorMap* map, const bf16* p, uint64_t columns, uint64_t rows, uint64_t depth, int swizzled) {
  const uint64_t strides[] = {columns * sizeof(bf16), rows * columns * sizeof(bf16)};
  return make_tensor_map<3>(map, p, {columns, rows, depth}, strides, {64, 8, 1},
                            swizzled ? Swizzle::bytes128 : Swizzle::none);
}
extern "C" int probe_load(const bf16* p, int columns, int rows, int depth, int swizzled, int x, int y, int z,
                          uint4* image, void* stream) {
  CUtensorMap map;
  const int e = cube_map(&map, p, columns, rows, depth, swizzled);
  if (e) return e;
  return launch({dim3(1), dim3(64), 1032, static_cast<cudaStream_t>(stream)}, probe_load_kernel, map, image, x, y, z);
}

// Stores, or adds, an image of 1024 bytes as such a box.
__global__ void probe_store_kernel(const __grid_constant__ CUtensorMap map, const uint4* image, int x, int y, int z,
                                   int add) {
  uint8_t* smem = dynamic_smem();
  reinterpret_cast<uint4*>(smem)[threadIdx.x] = image[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) tma_reduce_add(&map, smem, x, y, z);
    else tma_store(&map, smem, x, y, z);
    bulk_commit();
    bulk_wait<0>();
  }
}
extern "C" int probe_store(bf16* p, int columns, int rows, int depth, int swizzled, int x, int y, int z,
                           const uint4* image, int add, void* stream) {
  CUtensorMap map;
  const int e = cube_map(&map, p, columns, rows, depth, swizzled);
  if (e) return e;
  return launch({dim3(1), dim3(64), 1024, static_cast<cudaStream_t>(stream)}, probe_store_kernel, map, image, x, y, z,
                add);
}

// Two-dimensional float32 (rows, columns), four-dimensional fp16: boxes of 16 x 8, added by `blocks` blocks at once.
__global__ void probe_add_f32_kernel(const __grid_constant__ CUtensorMap map, const float4* image, int x, int y) {
  float4* smem = reinterpret_cast<float4*>(dynamic_smem());
  smem[threadIdx.x] = image[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_reduce_add(&map, smem, x, y);
    bulk_commit();
    bulk_wait<0>();
  }
}
extern "C" int probe_add_f32(float* p, int columns, int rows, int x, int y, int blocks, const float4* image,
                             void* stream) {
  const uint64_t size[] = {uint64_t(columns), uint64_t(rows)}, stride = columns * sizeof(float);
  CUtensorMap map;
  const int e = make_tensor_map<2>(&map, p, size, &stride, {16, 8}, Swizzle::none);
  if (e) return e;
  return launch({dim3(blocks), dim3(32), 512, static_cast<cudaStream_t>(stream)}, probe_add_f32_kernel, map, image, x,
                y);
}

// Without a map: copies `bytes` in, then out again (or adds them, as float32).
__global__ void probe_bulk_kernel(const float* from, float* to, uint32_t bytes, int add) {
  float* smem = reinterpret_cast<float*>(dynamic_smem());
  uint64_t* bar = reinterpret_cast<uint64_t*>(dynamic_smem() + bytes);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    mbar_init_fence();
    mbar_expect_tx(bar, bytes);
    bulk_load(smem, from, bytes, bar);
    mbar_arrive(bar);
    while (!mbar_try_wait(bar, 0)) {}
    if (add) bulk_reduce_add(to, smem, bytes);
    else bulk_store(to, smem, bytes);
    bulk_commit();
    bulk_wait<0>();
  }
}
extern "C" int probe_bulk(const float* from, float* to, int bytes, int add, void* stream) {
  return launch({dim3(1), dim3(32), size_t(bytes) + 16, static_cast<cudaStream_t>(stream)}, probe_bulk_kernel, from, to,
                uint32_t(bytes), add);
}

// ---- ldmatrix and stmatrix -------------------------------------------------------------------------------------
// Lane l names the row at byte offsets[l]; ldmatrix: image (1024 bytes) to r (32, COUNT); stmatrix: r to image.
template <int COUNT, bool TRANSPOSE>
__global__ void probe_matrix_kernel(uint4* image, const uint32_t* offsets, uint32_t* r, int store) {
  uint8_t* smem = dynamic_smem();
  for (int i = threadIdx.x; i < 64; i += 32) reinterpret_cast<uint4*>(smem)[i] = image[i];
  __syncwarp();
  uint32_t words[COUNT];
  if (store) {
    for (int i = 0; i < COUNT; ++i) words[i] = r[threadIdx.x * COUNT + i];
    stmatrix<TRANSPOSE>(smem + offsets[threadIdx.x], words);
    __syncwarp();
    for (int i = threadIdx.x; i < 64; i += 32) image[i] = reinterpret_cast<uint4*>(smem)[i];
  } else {
    ldmatrix<TRANSPOSE>(words, smem + offsets[threadIdx.x]);
    for (int i = 0; i < COUNT; ++i) r[threadIdx.x * COUNT + i] = words[i];
  }
}
template <int COUNT>
static int probe_matrix_of(int transpose, uint4* image, const uint32_t* offsets, uint32_t* r, int store,
                           cudaStream_t s) {
  return launch({dim3(1), dim3(32), 1024, s},
                transpose ? probe_matrix_kernel<COUNT, true> : probe_matrix_kernel<COUNT, false>, image, offsets, r,
                store);
}
extern "C" int probe_matrix(int count, int transpose, uint4* image, const uint32_t* offsets, uint32_t* r, int store,
                            void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (count == 1) return probe_matrix_of<1>(transpose, image, offsets, r, store, s);
  if (count == 2) return probe_matrix_of<2>(transpose, image, offsets, r, store, s);
  return probe_matrix_of<4>(transpose, image, offsets, r, store, s);
}

// ---- barriers and election -------------------------------------------------------------------------------------
// Two groups of 64 of the block's 128 threads pass values through shared memory `rounds` times, each behind its own
// named barriers; out (128): what thread t got in the end (its neighbour's, `rounds` times) + 1000 * (elected lanes in
// its warp).
__global__ void __launch_bounds__(128) probe_barriers_kernel(int* out, int rounds) {
  int* slots = reinterpret_cast<int*>(dynamic_smem());
  const int t = threadIdx.x, group = t / 64, first = group * 64;
  int value = t;
  for (int round = 0; round < rounds; ++round) {
    slots[t] = value;
    bar_sync(1 + group, 64);
    value = slots[first + (t + 1) % 64];
    bar_sync(3 + group, 64);
  }
  const bool elected = elect_one();
  if (group == 0) bar_arrive(5, 128);  // the first group tells the second that it is done, and does not wait
  if (group == 1) bar_sync(5, 128);
  out[t] = value + 1000 * __popc(__ballot_sync(~0u, elected));
}
extern "C" int probe_barriers(int* out, int rounds, void* stream) {
  return launch({dim3(1), dim3(128), 512, static_cast<cudaStream_t>(stream)}, probe_barriers_kernel, out, rounds);
}

// ---- clusters --------------------------------------------------------------------------------------------------
// Clusters of 2 go through `rounds` pairs of boxes of a bf16 (rows, 64) tensor, 8 rows each: block r loads box 2 *
// round + r into both blocks; both add what they got. A stage is reused only when both blocks have arrived at the
// loader's barrier. sums (blocks, 64 threads): each thread adds the first element of row threadIdx.x % 8 of both boxes,
// times round + 1.
__global__ void __launch_bounds__(64)
    probe_multicast_kernel(const __grid_constant__ CUtensorMap map, float* sums, int rounds) {
  uint8_t* smem = dynamic_smem();
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 2048);
  uint64_t* empty = full + 1;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbar_init(full, 1);
    mbar_init(empty, 2 * 64);
    mbar_init_fence();
  }
  cluster_sync();
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      mbar_wait(empty, (round & 1) ^ 1);
      mbar_arrive_expect_tx(full, 2048);
      tma_load_multicast(smem + rank * 1024, &map, full, 3, 0, int(2 * round + rank) * 8);
    }
    mbar_wait(full, round & 1);
    for (int box = 0; box < 2; ++box)  // row 8: bits 4 to 6 of the swizzled address
      sum += to_float(*reinterpret_cast<bf16*>(smem + box * 1024 + threadIdx.x % 8 * 128 + threadIdx.x % 8 * 16)) *
             (round + 1);
    for (uint32_t block = 0; block < 2; ++block) mbar_arrive_cluster(empty, block);
  }
  sums[blockIdx.x * 64 + threadIdx.x] = sum;
  cluster_sync();  // no block leaves while the other may still write to it
}
extern "C" int probe_multicast(const bf16* p, int rows, float* sums, int clusters, int rounds, void* stream) {
  const uint64_t size[] = {64, uint64_t(rows)}, stride = 128;
  CUtensorMap map;
  const int e = make_tensor_map<2>(&map, p, size, &stride, {64, 8}, Swizzle::bytes128);
  if (e) return e;
  return launch({dim3(2 * clusters), dim3(64), 2064, static_cast<cudaStream_t>(stream), 2}, probe_multicast_kernel, map,
                sums, rounds);
}
