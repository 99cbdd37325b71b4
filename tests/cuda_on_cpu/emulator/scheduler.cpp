// Fibers and their scheduler; launching a grid; faults and deadlocks.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "control.h"
#include "emulator.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the running stack's registers and pointer, continues on another stack.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulator {

thread_local Cluster* cluster;
thread_local Fiber* self;
thread_local Issuer carried_out;
static thread_local void* scheduler_stack;
static thread_local Body running_body;
static thread_local void* running_arguments;

uint64_t Random::next() {
  state += 0x9e3779b97f4a7c15ull;
  uint64_t z = state;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// ---- faults ----------------------------------------------------------------------------------------------------
static std::mutex fault_lock;
static std::string fault_text;
static std::atomic<bool> failed{false};
struct ClusterStopped {};

std::string place(const void* pc) {
  Dl_info in;
  if (!dladdr(pc, &in)) return "{unknown}";
  char text[600];
  snprintf(text, sizeof text, "{pc %s %zx}", in.dli_fname,
           size_t(static_cast<const char*>(pc) - static_cast<const char*>(in.dli_fbase)));
  return text;
}

void fault(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Issuer who = self ? Issuer{self, self->pc} : carried_out;
  std::string report = text;
  if (who.fiber) {
    const uint3 b = who.fiber->block->index, t = who.fiber->index;
    char head[120];
    snprintf(head, sizeof head, "block (%u, %u, %u) thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
    report = head + report + "\n  at " + place(who.pc);
  }
  {
    std::lock_guard<std::mutex> lock(fault_lock);
    if (fault_text.empty()) fault_text = report;
  }
  failed = true;
  if (!self) throw ClusterStopped{};
  for (;;) emulator_switch(&self->stack_pointer, scheduler_stack);  // the scheduler sees `failed` and drops the cluster
}

// ---- fibers ----------------------------------------------------------------------------------------------------
static void yield() { emulator_switch(&self->stack_pointer, scheduler_stack); }

void sleep_on(Waits what, uint64_t key, int detail) {
  self->waits = what;
  self->key = key;
  self->detail = detail;
  yield();
}

void wake(Waits what, uint64_t key) {
  cluster->idle_polls = 0;
  for (Fiber& f : cluster->fibers)
    if (f.waits == what && f.key == key) {
      f.waits = Waits::nothing;
      cluster->ready.push_back(&f);
    }
}

void maybe_yield(uint32_t chance) {
  if (++cluster->steps > control::most_steps)
    fault("no end after %llu steps: an endless loop?", (unsigned long long)cluster->steps);
  // Every thousandth step it yields in any case: a thread may spin on memory that another is to write.
  if (!cluster->random.chance(chance) && cluster->steps % 1024) return;
  cluster->ready.push_back(self);
  yield();
}

static void fiber_main() {
  running_body(running_arguments);
  thread_exits();
  yield();
  abort();  // an exited fiber is never run again
}

static void prepare(Fiber& f) {
  memset(f.stack, 0, 64);  // the lowest bytes must still be zero at the end: see check_stack
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
}

void thread_exits() {
  self->waits = Waits::exited;
  --self->block->alive;
  --cluster->alive;
  for (int i = 0; i < 64; ++i)
    if (self->stack[i]) fault("local variables need more than the %zu bytes that a thread has here", kStack);
  recheck_barriers_after_exit(*self->block);
  if (self->block->alive) return;
  check_copies_done(*self->block);
  check_products_done(*self->block);
  check_barriers_empty(*self->block);
}

// ---- what happens when ---------------------------------------------------------------------------------------
Issuer issuer_here() {
  Random of_place{uint64_t(self->pc) % 4096 + cluster->lazy_places};  // an address changes from run to run, its low bits not
  const bool lazy = cluster->random.chance(cluster->chance_lazy) || (cluster->lazy_places && of_place.next() % 2);
  return {self, self->pc, lazy};
}

// ---- one cluster -----------------------------------------------------------------------------------------------
static bool carry_out_one(bool lazy) {
  Cluster& c = *cluster;
  size_t groups = 0;
  for (Block& b : c.blocks) groups += b.warpgroups.size();
  const size_t all = c.loads.size() + c.stores.size() + groups;
  if (!all) return false;
  const size_t start = c.random.next() % all;
  for (size_t step = 0; step < all; ++step) {
    size_t i = (start + step) % all;
    if (i < c.loads.size()) {
      if (c.loads[i].issuer.lazy != lazy) continue;
      return finish_load(i), true;
    }
    i -= c.loads.size();
    if (i < c.stores.size()) {
      if (c.stores[i]->issuer.lazy != lazy) continue;
      return advance_store(i), true;
    }
    i -= c.stores.size();
    for (Block& b : c.blocks) {
      if (i < b.warpgroups.size()) {
        if (carry_out_product(b, int(i), lazy)) return true;
        break;
      }
      i -= b.warpgroups.size();
    }
  }
  return false;
}

bool carry_out_one() { return carry_out_one(false) || carry_out_one(true); }

static std::string deadlock() {
  std::map<std::string, std::vector<const Fiber*>> waiting;
  for (const Fiber& f : cluster->fibers)
    if (f.waits != Waits::exited) waiting[describe_barrier(f) + ", at " + place(f.pc)].push_back(&f);
  std::string text = "deadlock:";
  for (auto& [what, fibers] : waiting) {
    const Block& b = *fibers[0]->block;
    char head[160];
    snprintf(head, sizeof head, "\n  block (%u, %u, %u): %zu threads (%d to %d) wait on ", b.index.x, b.index.y, b.index.z,
             fibers.size(), fibers.front()->thread, fibers.back()->thread);
    text += head + what;
  }
  return text;
}

static void run_fibers() {
  Cluster& c = *cluster;
  while (c.alive && !failed) {
    if (c.chance_async && c.random.chance(c.chance_async)) carry_out_one(false);
    if (c.ready.empty()) {
      if (carry_out_one()) continue;
      carried_out = {};
      fault("%s", deadlock().c_str());
    }
    const size_t pick = c.random.next() % c.ready.size();
    self = c.ready[pick];
    c.ready[pick] = c.ready.back();
    c.ready.pop_back();
    threadIdx = self->index;
    blockIdx = self->block->index;
    emulator_switch(&scheduler_stack, self->stack_pointer);
    self = nullptr;
  }
  while (!failed && !c.stores.empty()) advance_store(0);
}

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
  // From "nothing happens before it must" to "everything happens at once"; from long runs of a thread to short ones; and
  // operations, or all those of one line, that take longer than all others.
  constexpr uint32_t async[] = {0, 0x02000000, 0x30000000, 0xf0000000}, switches[] = {0, 0x08000000, 0x60000000};
  c.chance_async = async[c.random.next() % 4];
  c.chance_yield = switches[c.random.next() % 3];
  const uint64_t lazy = c.random.next() % 4;
  c.chance_lazy = lazy == 1 ? 0x40000000 : 0;
  c.lazy_places = lazy >= 2 ? uint32_t(c.random.next()) | 1 : 0;
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
      prepare(f);
      c.ready.push_back(&f);
    }
  }
  try {
    run_fibers();
  } catch (ClusterStopped) {
  }
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
