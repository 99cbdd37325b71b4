// wgmma: descriptors, fragments, products that happen late; ldmatrix and stmatrix.
//
// The 128 threads of a warpgroup issue each product; once all have, it may be carried out, in order, at any time until
// a wgmma_wait that covers it. From issue to wait the accumulators live here and the threads' registers hold NaN.
#include <immintrin.h>

#include <cmath>

#include "emulator.h"

namespace emulator {

// ---- layouts, as in the PTX ISA's figures ----------------------------------------------------------------------
// Row and column of accumulator register i of thread t; also of A's registers, two columns a register (n = 16).
static int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
static int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

struct Accumulator {
  int n;
  std::vector<float> matrix;  // (64, n)
  float* registers[128] = {};
  float* at(int t, int r) {
    return &matrix[fragment_row(t, r) * n + fragment_column(t, r)];
  }  // and the next, if r is even
};
struct PendingProduct {
  Issuer issuer;
  Product what;
  bool a_in_registers;
  int threads = 0;       // that have issued it
  int waited = 0;        // threads that know it is done
  std::vector<float> a;  // (64, 16), if A is in registers
  std::shared_ptr<Accumulator> accumulator;
};

// ---- operands --------------------------------------------------------------------------------------------------
static __m256 decode(__m128i bits, bool is_bf16) {
  if (!is_bf16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

struct Descriptor {
  uint32_t start, lead, stride;
};
static Descriptor read_descriptor(uint64_t d) {
  if (d >> 62 != 1) fault("wgmma descriptor %016llx: only the 128-byte swizzle is known here", (unsigned long long)d);
  const Descriptor r{uint32_t(d & 0x3fff) << 4, uint32_t(d >> 16 & 0x3fff) << 4, uint32_t(d >> 32 & 0x3fff) << 4};
  if (d >> 49 & 7 || r.start & 0x380)
    fault("wgmma descriptor: the tile starts at +%d, inside the swizzle's pattern of 8 rows (multiples of 1024)",
          int(r.start - kSharedStart));
  return r;
}

// A tile of `rows` by 16 k. K-major: 8 rows of 128 bytes are 1024 bytes, `stride` on follow the next 8. MN-major: 64
// rows are the 128 bytes, 8 k are 1024 bytes, `stride` on follow the next 8 k, `lead` on the next 64 rows. Calls
// take(row, k, its 8 elements, which run along k or along the rows).
template <class Take>
static void read_tile(const Block& b, const Descriptor& d, int rows, bool mn_major, const char* what, Take take) {
  for (int piece = 0; piece < rows * 2; ++piece) {
    const int row = mn_major ? piece / 16 * 8 : piece / 2, k = mn_major ? piece % 16 : piece % 2 * 8;
    const uint32_t offset = mn_major ? row / 64 * d.lead + row % 64 * 2 + k / 8 * d.stride + k % 8 * 128
                                     : row / 8 * d.stride + row % 8 * 128 + k * 2;
    const uint32_t at = swizzle128((d.start + offset) & (kSharedSpan - 1));
    check_async_read(b, at, 16, what);
    take(row, k, _mm_load_si128(reinterpret_cast<const __m128i*>(b.shared + at)));
  }
}

// out[row * row_stride + k * k_stride]
static void read_operand(const Block& b, uint64_t descriptor, int rows, bool mn_major, bool is_bf16, const char* what,
                         float* out, int row_stride, int k_stride) {
  const int step = mn_major ? row_stride : k_stride;
  read_tile(b, read_descriptor(descriptor), rows, mn_major, what, [&](int row, int k, __m128i elements) {
    float* to = out + row * row_stride + k * k_stride;
    const __m256 values = decode(elements, is_bf16);
    if (step == 1) return _mm256_storeu_ps(to, values);
    for (int i = 0; i < 8; ++i) to[i * step] = values[i];
  });
}

// ---- carrying out ----------------------------------------------------------------------------------------------
// d += a @ b, for 8 * width of the n columns of b (16, n) and d (64, n), which start where these point; a (64, 16).
// Each element adds its products in order of k.
template <int width> static void multiply_columns(const float* a, const float* b, float* d, int n) {
  for (int i = 0; i < 64; i += 4) {
    __m256 sum[4][width];
    for (int row = 0; row < 4; ++row)
      for (int j = 0; j < width; ++j) sum[row][j] = _mm256_loadu_ps(d + (i + row) * n + 8 * j);
    for (int k = 0; k < 16; ++k)
      for (int row = 0; row < 4; ++row)
        for (int j = 0; j < width; ++j)
          sum[row][j] =
              _mm256_fmadd_ps(_mm256_set1_ps(a[(i + row) * 16 + k]), _mm256_loadu_ps(b + k * n + 8 * j), sum[row][j]);
    for (int row = 0; row < 4; ++row)
      for (int j = 0; j < width; ++j) _mm256_storeu_ps(d + (i + row) * n + 8 * j, sum[row][j]);
  }
}

static void multiply(const Block& block, const PendingProduct& p) {
  static thread_local std::vector<float> a_of_memory(64 * 16), b(16 * 256);
  const Product& w = p.what;
  if (!p.a_in_registers)
    read_operand(block, w.a, 64, w.a_mn_major, w.bf16, "wgmma (operand A)", a_of_memory.data(), 16, 1);
  const float* a = p.a_in_registers ? p.a.data() : a_of_memory.data();
  read_operand(block, w.b, w.n, w.b_mn_major, w.bf16, "wgmma (operand B)", b.data(), 1, w.n);
  float* d = p.accumulator->matrix.data();
  if (!w.accumulate) std::fill(d, d + 64 * w.n, 0.f);
  int j = 0;
  for (; j + 16 <= w.n; j += 16) multiply_columns<2>(a, b.data() + j, d + j, w.n);
  if (j < w.n) multiply_columns<1>(a, b.data() + j, d + j, w.n);
}

bool carry_out_product(Block& b, int warpgroup, bool lazy) {
  Warpgroup& g = b.warpgroups[warpgroup];
  const uint64_t i = g.finished - g.first;
  if (i >= g.queue.size() || g.queue[i]->threads < 128 || g.queue[i]->issuer.lazy != lazy) return false;
  carried_out = g.queue[i]->issuer;
  multiply(b, *g.queue[i]);
  ++g.finished;
  wake(Waits::wgmma, key_of(b, warpgroup));
  return true;
}

// ---- issuing ---------------------------------------------------------------------------------------------------
// This thread's accumulator whose registers start at d: one in flight, that of the product's other threads, or a new
// one.
static std::shared_ptr<Accumulator> accumulator_of(PendingProduct& p, float* d) {
  const int t = self->thread % 128, n = p.what.n;
  std::shared_ptr<Accumulator> found;
  for (auto& a : self->accumulators)
    if (a->registers[t] == d) found = a;
  if (!found) {
    found = p.accumulator ? p.accumulator : std::make_shared<Accumulator>();
    if (!p.accumulator) found->n = n, found->matrix.resize(64 * n);
    found->registers[t] = d;
    self->accumulators.push_back(found);
    for (int r = 0; r < n / 2; r += 2)
      if (p.what.accumulate) memcpy(found->at(t, r), &d[r], 8);
    std::fill(d, d + n / 2, NAN);
  }
  if (found->n != n) fault("wgmma: accumulators in flight with %d columns are used with %d", found->n, n);
  if (p.accumulator && p.accumulator != found) fault("wgmma: the warpgroup's threads name different accumulators");
  return found;
}

void wgmma(float* d, const uint32_t* a_registers, const Product& w) {
  CALLED_FROM_KERNEL;
  if (int(blockDim.x * blockDim.y * blockDim.z) / 128 <= self->thread / 128) fault("wgmma outside a whole warpgroup");
  if (!self->wgmma_fenced) fault("wgmma without wgmma_fence at the start of its group");
  Warpgroup& g = self->block->warpgroups[self->thread / 128];
  const int t = self->thread % 128;
  const uint64_t number = self->products++;
  if (number - g.first == g.queue.size()) {
    auto p = std::make_shared<PendingProduct>();
    p->issuer = issuer_here();
    p->what = w;
    p->a_in_registers = a_registers;
    if (a_registers) p->a.resize(64 * 16);
    g.queue.push_back(std::move(p));
  }
  PendingProduct& p = *g.queue[number - g.first];
  const Product& v = p.what;
  if (v.n != w.n || v.a != w.a || v.b != w.b || v.accumulate != w.accumulate || p.a_in_registers != !!a_registers ||
      v.bf16 != w.bf16 || v.a_mn_major != w.a_mn_major || v.b_mn_major != w.b_mn_major)
    fault("wgmma: the warpgroup's threads disagree on shape, descriptors or accumulate");
  p.accumulator = accumulator_of(p, d);
  if (a_registers) {
    const __m256 values = decode(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a_registers)), w.bf16);
    for (int i = 0; i < 8; ++i) p.a[fragment_row(t, i) * 16 + fragment_column(t, i)] = values[i];
  }
  ++p.threads;
}

void wgmma_fence() {
  CALLED_FROM_KERNEL;
  meet("wgmma_fence", ~0u, 0);
  self->wgmma_fenced = true;
}

void wgmma_commit() {
  self->group_ends.push_back(self->products);
  self->wgmma_fenced = false;  // each group starts with its own fence
}

void wgmma_wait(int newest) {
  CALLED_FROM_KERNEL;
  meet("wgmma_wait", ~0u, newest);
  const int t = self->thread % 128, groups = int(self->group_ends.size());
  Warpgroup& g = self->block->warpgroups[self->thread / 128];
  const uint64_t wanted = groups > newest ? self->group_ends[groups - newest - 1] : 0;
  wait_until(Waits::wgmma, key_of(*self->block, self->thread / 128), newest, [&] { return g.finished >= wanted; });
  // Give back the accumulators that no later product of this thread uses.
  auto& mine = self->accumulators;
  for (size_t i = 0; i < mine.size();) {
    Accumulator& a = *mine[i];
    bool busy = false;
    for (uint64_t p = std::max(wanted, g.first); p < self->products; ++p)
      busy |= g.queue[p - g.first]->accumulator.get() == &a;
    if (busy) {
      ++i;
      continue;
    }
    for (int r = 0; r < a.n / 2; r += 2) memcpy(&a.registers[t][r], a.at(t, r), 8);
    mine.erase(mine.begin() + i);
  }
  for (uint64_t& p = self->products_waited; p < wanted; ++p) ++g.queue[p - g.first]->waited;
  // what is still in the queue tells every thread alike what is in flight
  while (!g.queue.empty() && g.queue.front()->waited == 128) g.queue.pop_front(), ++g.first;
}

// ---- 8x8 matrices ----------------------------------------------------------------------------------------------
static uint16_t* matrix_row(const Lanes& rows, int matrix, int row) {
  return reinterpret_cast<uint16_t*>(rows.at[matrix * 8 + row]);
}
static const Lanes& meet_with_rows(const char* name, int count, const void* row, bool write) {
  const Lanes& rows = meet(name, ~0u, uint64_t(row));
  if (self->thread % 32 < count * 8) {
    if (uint64_t(row) % 16) fault("%s: a row that is not 16-byte aligned", name);
    shared_address(row);
    check_access(row, 16, 16, write);
  }
  return rows;
}

void ldmatrix(uint32_t* r, int count, bool transpose, const void* row) {
  CALLED_FROM_KERNEL;
  const Lanes& rows = meet_with_rows("ldmatrix", count, row, false);
  const int lane = self->thread % 32;
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int a = lane / 4, b = lane % 4 * 2 + i;
      pair[i] = transpose ? matrix_row(rows, m, b)[a] : matrix_row(rows, m, a)[b];
    }
    memcpy(&r[m], pair, 4);
  }
  meet("ldmatrix", ~0u, 0);  // no lane goes on to overwrite a row before all have read
}

void stmatrix(const uint32_t* r, int count, bool transpose, void* row) {
  CALLED_FROM_KERNEL;
  const Lanes& rows = meet_with_rows("stmatrix", count, row, true);
  const int lane = self->thread % 32;
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    memcpy(pair, &r[m], 4);
    for (int i = 0; i < 2; ++i) {
      const int a = lane / 4, b = lane % 4 * 2 + i;
      (transpose ? matrix_row(rows, m, b)[a] : matrix_row(rows, m, a)[b]) = pair[i];
    }
  }
  meet("stmatrix", ~0u, 0);
}

void check_products_done(const Block& b) {
  for (const Fiber& f : cluster->fibers)
    if (f.block == &b && !f.accumulators.empty()) fault("the block ended without a wgmma_wait for its last products");
}

}  // namespace emulator
