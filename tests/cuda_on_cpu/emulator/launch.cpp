// Launching: a grid is cut into clusters, which host threads run one after the other.
#include <sys/mman.h>

#include <cstdlib>
#include <thread>

#include "emulator.h"

namespace emulator {

// Memory of one host thread, kept from launch to launch: page faults cost more than the fibers.
struct Pool {
  std::vector<char*> stacks;
  std::vector<uint8_t*> shared;
};
static std::mutex pools_lock;
static std::vector<std::unique_ptr<Pool>> pools;

static void* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  return p;
}

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes;
  int cluster;
};

static void run_cluster(const Grid& grid, uint64_t number, Pool& pool) {
  Cluster c;
  cluster = &c;
  c.random.state = control::seed * 0x9e3779b97f4a7c15ull + number * 7919;
  c.elections = c.random.next();
  // From "nothing happens before it must" to "everything happens at once"; from long runs of a thread to short ones;
  // and operations, or all those of one line, that take longer than all others.
  constexpr uint32_t async[] = {0, 0x02000000, 0x30000000, 0xf0000000}, switches[] = {0, 0x08000000, 0x60000000};
  c.chance_async = async[c.random.next() % 4];
  c.chance_yield = switches[c.random.next() % 3];
  const uint64_t lazy = c.random.next() % 4;
  c.chance_lazy = lazy == 1 ? 0x40000000 : 0;
  c.lazy_places = lazy >= 2 ? uint32_t(c.random.next()) | 1 : 0;
  c.slow_warps = c.random.next() % 2 ? uint32_t(c.random.next()) | 1 : 0;
  const int threads = grid.threads.x * grid.threads.y * grid.threads.z;
  c.alive = threads * grid.cluster;
  c.blocks.resize(grid.cluster);
  c.fibers.resize(c.alive);
  c.ready.reserve(c.alive);
  while (int(pool.stacks.size()) < c.alive) pool.stacks.push_back(static_cast<char*>(map_memory(kStack)));
  while (int(pool.shared.size()) < grid.cluster) pool.shared.push_back(static_cast<uint8_t*>(map_memory(kSharedSpan)));
  for (int r = 0; r < grid.cluster; ++r) {
    Block& b = c.blocks[r];
    const uint64_t i = number * grid.cluster + r;
    b.rank = r;
    b.index = {uint32_t(i % grid.blocks.x), uint32_t(i / grid.blocks.x % grid.blocks.y),
               uint32_t(i / grid.blocks.x / grid.blocks.y)};
    b.alive = threads;
    b.shared = pool.shared[r];
    b.shared_end = kSharedStart + uint32_t(grid.shared_bytes);
    memset(b.shared + kSharedStart, 0xff, grid.shared_bytes);  // NaN in every float type
    b.bytes.assign(b.shared_end, unwritten);
    b.warps.resize((threads + 31) / 32);
    b.warpgroups.resize((threads + 127) / 128);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = c.fibers[r * threads + t];
      f.block = &b;
      f.thread = t;
      f.index = {t % grid.threads.x, t / grid.threads.x % grid.threads.y, t / (grid.threads.x * grid.threads.y)};
      f.stack = pool.stacks[r * threads + t];
      Random of_warp{c.slow_warps + uint64_t(t / 32) * 64 + r};
      f.slow = c.slow_warps && of_warp.next() % 4 == 0;
      prepare(f);
      c.ready.push_back(&f);
    }
  }
  run_fibers();
  control::count(c.steps);
  cluster = nullptr;
}

// ---- a grid ----------------------------------------------------------------------------------------------------
static const char* bad_launch(const Grid& g) {
  const uint64_t threads = uint64_t(g.threads.x) * g.threads.y * g.threads.z;
  if (threads < 1 || threads > 1024 || g.threads.z > 64) return "a block has 1 to 1024 threads, at most 64 along z";
  if (g.blocks.x > 0x7fffffffu || g.blocks.y > 65535 || g.blocks.z > 65535) return "too many blocks along an axis";
  if (g.shared_bytes > kSharedMost) return "a block has at most 232448 bytes of dynamic shared memory";
  if (g.cluster < 1 || g.cluster > 8 || g.blocks.x % g.cluster) return "1 to 8 blocks a cluster, dividing the grid";
  return nullptr;
}

int run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, int cluster_size, Body body, void* arguments,
             size_t argument_bytes) {
  constexpr int invalid_value = 1, launch_failure = 719;  // cudaErrorInvalidValue, cudaErrorLaunchFailure
  const Grid grid{blocks, threads, shared_bytes, cluster_size};
  if (failed) return launch_failure;  // as on a GPU, where a fault stays until the context goes
  if (const char* why = bad_launch(grid)) {
    fault_text = std::string("launch: ") + why;
    failed = true;
    return invalid_value;
  }
  const control::ScopedRange parameters(arguments, argument_bytes, "the kernel's parameters");
  const uint64_t clusters = uint64_t(blocks.x) * blocks.y * blocks.z / cluster_size;
  std::atomic<uint64_t> next{0};
  auto work = [&] {
    std::unique_ptr<Pool> pool;
    {
      std::lock_guard<std::mutex> lock(pools_lock);
      if (!pools.empty()) pool = std::move(pools.back()), pools.pop_back();
    }
    if (!pool) pool = std::make_unique<Pool>();
    running_body = body;
    running_arguments = arguments;
    gridDim = {blocks.x, blocks.y, blocks.z};
    blockDim = {threads.x, threads.y, threads.z};
    for (uint64_t i; !failed && (i = next++) < clusters;) run_cluster(grid, i, *pool);
    std::lock_guard<std::mutex> lock(pools_lock);
    pools.push_back(std::move(pool));
  };
  std::vector<std::thread> others;
  for (int i = 1; i < control::host_threads && uint64_t(i) < clusters; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  return failed ? launch_failure : 0;
}

}  // namespace emulator

// ---- what the Python side calls --------------------------------------------------------------------------------
namespace control = emulator::control;
uint64_t control::seed = 0, control::most_steps = uint64_t(1) << 28;
int control::host_threads = 1;
static std::atomic<uint64_t> steps_taken{0};
void control::count(uint64_t steps) { steps_taken += steps; }

extern "C" void cuda_on_cpu_configure(uint64_t seed, int host_threads, uint64_t most_steps) {
  control::seed = seed;
  control::host_threads = host_threads;
  control::most_steps = most_steps;
  emulator::fault_text.clear();
  emulator::failed = false;
  steps_taken = 0;
}
extern "C" const char* cuda_on_cpu_error() { return emulator::fault_text.c_str(); }
extern "C" uint64_t cuda_on_cpu_steps() { return steps_taken; }
