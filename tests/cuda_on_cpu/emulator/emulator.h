// The inside of the emulator. A cluster of blocks (mostly one block) runs on one thread of the host; each CUDA thread
// is a fiber. A fiber runs until it waits; the scheduler then picks another at random and, now and then, carries out
// one of the asynchronous operations under way. When no fiber can run and nothing is under way, that is a deadlock.
#pragma once
#include <atomic>
#include <cstdarg>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../shim/emulator_api.h"
#include "control.h"

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr uint32_t kSharedStart = 1024;   // sm_90 keeps the first KiB of a block's shared memory for itself
constexpr uint32_t kSharedMost = 232448;  // the most that a block may ask for
constexpr uint32_t kSharedSpan = 256 << 10;
constexpr size_t kStack = 128 << 10;  // of a fiber

// splitmix64: the only source of chance, so a seed repeats a run exactly (with one host thread, or within a cluster)
struct Random {
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ull;
  uint64_t state = 0;
  uint64_t next() {
    state += kStep;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  bool chance(uint32_t of_2_32) {
    if (!of_2_32) return state += kStep, false;
    return uint32_t(next()) < of_2_32;
  }
};

// What a byte of shared memory holds. Threads may read where kReadable is set and write where kHeld is not, so that one
// comparison decides for 8 bytes.
enum Byte : uint8_t {
  unwritten = 0,
  valid = 1,      // readable by all
  unfenced = 3,   // written by an ordinary store; TMA and wgmma may not see it before the writer's fence_proxy_async
  in_flight = 4,  // a bulk copy is writing it
  mbarrier = 6,   // part of an mbarrier: no ordinary access
};
constexpr uint64_t kEach = 0x0101010101010101, kReadable = 1 * kEach, kHeld = 4 * kEach;

enum class Waits { nothing, exited, barrier, cluster_barrier, mbarrier, wgmma, bulk, warp };

struct Block;
struct WarpMeeting;
struct Accumulator;
struct BulkStore;

struct alignas(64) Fiber {
  // a cache line of what every switch needs
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  uint3 index{};
  int thread = 0;  // linear index in the block
  Waits waits = Waits::nothing;
  bool slow = false;   // it runs only when no other can
  int detail = 0;      // parity, groups...: for the report
  uint64_t key = 0;    // which barrier, mbarrier... it waits on
  const void* pc = nullptr;  // the kernel's line, for reports
  char* stack = nullptr;
  WarpMeeting* meeting = nullptr;  // the last one, of the lanes in meeting_mask
  uint32_t meeting_mask = 0;
  uint32_t cluster_phase = 0;                                 // of the cluster barrier: arrivals of this thread
  int registers = 0;                                          // set by setmaxnreg
  std::vector<std::pair<uint32_t, uint32_t>> unfenced_bytes;  // (address, bytes) of ordinary stores
  std::vector<uint32_t> unfenced_barriers;
  // wgmma: products issued, where groups end, accumulators in flight
  uint64_t products = 0;
  uint64_t products_waited = 0;  // wgmma_wait has said that these are done
  std::vector<uint64_t> group_ends;
  std::vector<std::shared_ptr<Accumulator>> accumulators;
  bool wgmma_fenced = false;
  std::vector<std::pair<void*, const void*>> copies;  // copy_async: to and from, not yet waited for
  // bulk stores: not committed, and the groups
  std::vector<std::shared_ptr<BulkStore>> stores;
  std::vector<std::vector<std::shared_ptr<BulkStore>>> store_groups;
};

struct Mbarrier {
  uint32_t arrivals, pending;
  int64_t bytes = 0;  // announced and not yet come
  uint32_t phase = 0;
  bool fenced = false;
};
struct Barrier {
  int threads = 0, arrived = 0;
  int votes[2] = {0, 0}, met = 0;  // of __syncthreads: votes of this phase and the last; threads of the last
  uint32_t phase = 0;
};
struct Lanes {
  uint64_t at[32];
  bool reduced = false;  // to the total, by the lane that was the first to want it
  uint32_t total = 0;
};
struct WarpMeeting {  // of the lanes in one mask; two buffers, since a fast lane may come again before a slow one read
  uint32_t arrived = 0, phase = 0;
  const char* name = "";
  Lanes values[2];
};
struct Issuer {  // of an asynchronous operation
  const Fiber* fiber = nullptr;  // whom a report names
  const void* pc = nullptr;
  bool lazy = false;  // not carried out while anything else can get on
};
struct BulkLoad {
  Issuer issuer;
  uint32_t dst, bar, bytes, blocks;  // dst and bar: offsets, the same in each of `blocks`
  std::function<void(uint8_t* tile)> fetch;
};
struct BulkStore {
  enum State { issued, read, done } state = issued;
  Issuer issuer;
  uint32_t src, bytes;
  std::vector<uint8_t> data;
  std::function<void(const uint8_t* tile)> write;
};
struct PendingProduct;
struct Warpgroup {
  std::deque<std::shared_ptr<PendingProduct>> queue;
  uint64_t first = 0, finished = 0;  // index of queue[0]; products carried out
};

struct Block {
  int rank = 0;  // in the cluster
  uint3 index{};
  uint8_t* shared = nullptr;  // address 0 of the shared window
  uint32_t shared_end = 0;
  std::vector<uint8_t> bytes;  // a Byte for each byte of the window
  int alive = 0;
  int registers = 0;  // of the threads that have called setmaxnreg
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  Barrier barriers[16];
  std::vector<std::map<uint32_t, WarpMeeting>> warps;
  std::vector<Warpgroup> warpgroups;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Barrier barrier;
  Random random;
  uint64_t elections = 0;
  uint32_t chance_async = 0, chance_yield = 0;
  uint32_t chance_lazy = 0, lazy_places = 0;  // of one operation; of all operations issued by one line
  uint32_t slow_warps = 0;  // not 0: some warps run only when no other can
  std::vector<BulkLoad> loads;
  std::vector<std::shared_ptr<BulkStore>> stores;
  int alive = 0;
  uint32_t idle_polls = 0;  // of mbarriers, since the last wake
  uint64_t steps = 0;  // memory accesses and switches: a bound on endless loops
};

extern __thread Cluster* cluster;  // the one this host thread runs
extern __thread Fiber* self;  // the running fiber, null in the scheduler
extern thread_local Issuer carried_out;  // the operation that the scheduler carries out

Issuer issuer_here();  // the running fiber, lazy or not as the schedule wants

// ---- scheduler.cpp ---------------------------------------------------------------------------------------------
inline uint64_t key_of(const Block& b, uint32_t what) { return uint64_t(b.rank) << 32 | what; }
void sleep_on(Waits what, uint64_t key, int detail);  // until wake
// Wakes the fibers that wait for this, among `count` of the cluster from `first` on.
void wake(Waits what, uint64_t key, size_t first = 0, size_t count = ~size_t(0));
void yield();
[[noreturn]] void no_end();
inline void maybe_yield(uint32_t chance) {
  Cluster& c = *cluster;
  if (++c.steps > control::most_steps) no_end();
  // Every thousandth step it yields in any case: a thread may spin on memory that another is to write.
  if (!c.random.chance(chance) && c.steps % 1024) return;
  c.ready.push_back(self);
  yield();
}
bool carry_out_one();  // one asynchronous operation, chosen at random among those under way; false if there is none
template <class Ready> void wait_until(Waits what, uint64_t key, int detail, Ready ready) {
  maybe_yield(cluster->chance_yield);
  while (!ready()) sleep_on(what, key, detail);
}
// Records the first fault of the launch ("{pc ...}" marks an address that the Python side turns into file and line)
// and leaves the fiber for good.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place(const void* pc);
extern std::string fault_text;  // of this launch; empty: none
extern std::atomic<bool> failed;
extern thread_local Body running_body;
extern thread_local void* running_arguments;
void prepare(Fiber& fiber);  // to run the body from its start
void run_fibers();  // of the cluster, until all have exited or one has failed

// ---- memory.cpp ------------------------------------------------------------------------------------------------
void check_shared_range(const Block& block, uint32_t at, uint32_t bytes, const char* what);
// Whether of each of `bytes` bytes from `at` on the bits of `mask` are those of `wanted`.
inline bool all_bytes(const Block& block, uint32_t at, uint32_t bytes, uint64_t mask, uint64_t wanted) {
  const uint8_t *s = &block.bytes[at], *end = s + bytes;
  uint64_t states;
  for (; end - s >= 8; s += 8) {
    memcpy(&states, s, 8);
    if ((states & mask) != wanted) return false;
  }
  for (; s < end; ++s)
    if ((*s & uint8_t(mask)) != uint8_t(wanted)) return false;
  return true;
}
void check_async_read(const Block& block, uint32_t at, uint32_t bytes, const char* what);  // and the range
void mark(Block& block, uint32_t at, uint32_t bytes, Byte state);
void check_global(const void* p, size_t bytes, const char* what);
uint32_t combine(Atomic op, AtomicType type, uint32_t a, uint32_t b);  // i32 or u32
std::mutex& add_lock();  // around read-modify-write of global memory

// ---- barriers.cpp, tma.cpp, wgmma.cpp --------------------------------------------------------------------------
void bytes_arrived(Block& block, uint32_t bar, uint32_t bytes);
void finish_load(size_t i);
void advance_store(size_t i);
bool carry_out_product(Block& block, int warpgroup, bool lazy);
Lanes& meet(const char* name, uint32_t mask, uint64_t value);  // what each lane of the warp brought
std::string describe_barrier(const Fiber& fiber);
void check_copies_done(const Block& block);  // these three when its last thread exits
void check_products_done(const Block& block);
void check_barriers_empty(const Block& block);
void fence_barriers();
void recheck_barriers_after_exit(Block& block);
uint32_t swizzle128(uint32_t address);

// At the head of what kernels call. Calls from within the emulator leave the place alone.
extern "C" const char __ehdr_start __attribute__((visibility("hidden"))), etext __attribute__((visibility("hidden")));
inline void note_caller(const void* pc) {
  if (pc < &__ehdr_start || pc >= &etext) self->pc = pc;
}
#define CALLED_FROM_KERNEL note_caller(__builtin_return_address(0))

}  // namespace emulator
