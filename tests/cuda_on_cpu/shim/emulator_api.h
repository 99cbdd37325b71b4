// What the stand-in headers (cuda_runtime.h, hopper_on_cpu.cuh) call in the emulator. Called by fibers, one for each
// CUDA thread, except where "host" is said. None is inlined into a kernel, so that its return address names the
// kernel's line.
#pragma once
#include <cstddef>
#include <cstdint>

#include <vector_types.h>

namespace emulator {

// ---- host ------------------------------------------------------------------------------------------------------
using Body = void (*)(void* arguments);
// Runs the grid; 0, or a CUDA error code after a fault (the text: cuda_on_cpu_error).
int run_grid(dim3 grid, dim3 block, size_t shared_bytes, int cluster, Body body, void* arguments,
             size_t argument_bytes);
int encode_tensor_map(void* map, int type, uint32_t rank, void* base, const uint64_t* size,
                      const uint64_t* stride_bytes, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int fill);

// ---- memory ----------------------------------------------------------------------------------------------------
uint8_t* shared_base();                  // of the dynamic shared memory of this block
uint32_t shared_address(const void* p);  // as PTX sees it; a fault if p is not in this block's shared memory
void memory_fence();
void check_access(const void* p, int bytes, int alignment, bool write);
enum class Atomic { add, min, max, exchange, compare_and_swap, bit_and, bit_or, bit_xor };
enum class AtomicType { i32, u32, u64, f32, f64 };
uint64_t atomic(Atomic op, AtomicType type, void* p, uint64_t value, uint64_t compare);

// ---- meetings of threads ---------------------------------------------------------------------------------------
struct Votes {
  int yes, all;
};
Votes barrier_all(bool vote);  // __syncthreads and its votes
void barrier_named(int id, int threads, bool wait);
void cluster_barrier_arrive();
void cluster_barrier_wait();
uint32_t cluster_rank();
// The lanes of `mask` meet in the collective `name`, each with a value.
void warp_meet(const char* name, uint32_t mask);
enum class Shuffle { from, exclusive_or, up, down };
uint64_t warp_shuffle(const char* name, uint32_t mask, uint64_t value, Shuffle how, int by, int width);
uint32_t warp_lanes_with(const char* name, uint32_t mask, uint64_t value, uint64_t wanted);  // a mask
uint32_t warp_reduce(const char* name, uint32_t mask, uint32_t value, Atomic op, AtomicType type);
uint32_t warp_lanes();  // mask of the lanes that this warp has
bool elect_one();
void set_registers(int count, bool increase);

// ---- asynchronous proxy ----------------------------------------------------------------------------------------
void mbarrier_init(uint32_t bar, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t bar, uint32_t rank);
void mbarrier_expect(uint32_t bar, uint32_t bytes);
bool mbarrier_test(uint32_t bar, uint32_t parity);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void tensor_load(uint32_t dst, const void* map, uint32_t bar, uint32_t blocks, int rank, const int* at);
void tensor_store(const void* map, uint32_t src, int rank, const int* at, bool add);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add);
void copy_async(void* dst, const void* src);
void copy_async_wait();
void bulk_commit();
void bulk_wait(int newest, bool read_only);
void fence_proxy_async();
// d: this thread's n / 2 accumulators. a_registers: four words, or null and A is in shared memory.
struct Product {
  int n;
  bool accumulate, bf16, a_mn_major, b_mn_major;
  uint64_t a, b;
};
void wgmma(float* d, const uint32_t* a_registers, const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest);
void ldmatrix(uint32_t* r, int count, bool transpose, const void* row);
void stmatrix(const uint32_t* r, int count, bool transpose, void* row);

}  // namespace emulator
