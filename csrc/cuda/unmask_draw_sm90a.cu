// unmask with top_k, top_p or min_p, after the fused head (unmask_lists.cuh): the bound of each row, and the best of
// the ids that reach it.
//
// A few blocks share a row. Each searches the bound among all that is listed (unmask_bound.cuh), then draws noise for
// listed ids of its half tiles that reach it, and stores its best in one of the row's parts, which had none. Reads 32
// bytes for 128 ids, and of the lists what the search asks for. Leaves rows alone that list nothing: those without
// noise, and those that keep all ids.
#include "unmask_bound.cuh"
#include "unmask_lists.cuh"

namespace {

using namespace illada;

constexpr int kThreads = kBoundThreads, kWarps = kBoundWarps;

struct Shared {
  BoundShared bound;
  Running best[kWarps];
};  // and how many logits each part listed

// Draws, with a warp, among 128 ids from `first` on.
ILLADA_DEVICE void draw(const PartList& list, int half, int first, const Row& row, float bound, Running& s) {
  const int lane = threadIdx.x % 32;
  const Places places = *list.places(half);
  int before = places.before;
  float l[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool listed = places.of[j] >> lane & 1;
    l[j] = listed ? *list.logit(before + __popc(places.of[j] & ((1u << lane) - 1))) : -infinity();
    l[j] = l[j] >= bound ? l[j] : -infinity();
    before += __popc(places.of[j]);
  }
  meet_noise(l, first + lane * 4, row, places.top, s);
}

__global__ void __launch_bounds__(kThreads, 1) draw_kernel(const __grid_constant__ Call c) {
  const int64_t r = blockIdx.x, b = r / c.count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Row row = load_row(c, b, r % c.count);
  if (!row.needed || !(row.temperature > 0.0f)) return;
  const Truncation by = truncation_of(c, b, row.temperature);
  if (by.keeps_all()) return;
  Shared& s = *reinterpret_cast<Shared*>(dynamic_smem());
  int32_t* const counts = reinterpret_cast<int32_t*>(&s + 1);
  const int parts = int(c.parts), tiles = int((c.vocab + kTile - 1) / kTile);
  float top = -infinity();
  for (int p = threadIdx.x; p < parts; p += kThreads) {
    top = fmaxf(top, *partial(c, kTop, r, p));
    counts[p] = list_of(c, r, p).places((tiles - 1 - p) / parts * 2 + 1)->after;
  }
  top = block_reduce<kThreads>(top, s.bound.top, Max{});
  if (!(top > -infinity() && top < infinity())) return;  // a bad row
  const auto over_lists = [&](auto visit) {
    for (int tile = warp; tile < tiles; tile += kWarps) {
      const int part = tile % parts, left = counts[part] - tile / parts * kTile;
      if (left <= 0) continue;
      const float* const listed = list_of(c, r, part).tile(tile / parts);
      float l[kTile / 32];
#pragma unroll
      for (int j = 0; j < kTile / 32; ++j) l[j] = j * 32 + lane < left ? listed[j * 32 + lane] : -infinity();
#pragma unroll
      for (int j = 0; j < kTile / 32; ++j) visit(l[j]);
    }
  };
  const float bound = bound_of(s.bound, c, row, by, top, over_lists);
  Running best = nothing_met();
  const auto places_of = [&](int half) { return half / 2 / parts * 2 + half % 2; };  // counted in its block
  const int apart = kWarps * int(gridDim.y);  // of the halves that a warp takes at once, one a lane
  for (int from = warp + kWarps * int(blockIdx.y); from < 2 * tiles; from += 32 * apart) {
    const int mine = from + lane * apart;
    float tops = -infinity();
    if (int64_t(mine) * 128 < c.vocab) tops = list_of(c, r, mine / 2 % parts).places(places_of(mine))->top;
    for (uint32_t left = __ballot_sync(0xffffffffu, tops > -infinity() && tops >= bound); left; left &= left - 1) {
      const int half = from + (__ffs(int(left)) - 1) * apart;
      draw(list_of(c, r, half / 2 % parts), places_of(half), half * 128, row, bound, best);
    }
  }
  if (lane == 0) s.best[warp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    const Running& other = s.best[w];
    const bool before = uint32_t(other.best_id) < uint32_t(best.best_id);  // -1 comes last
    if (other.best_score > best.best_score || (other.best_score == best.best_score && before)) best = other;
  }
  *partial(c, kBestScore, r, blockIdx.y) = best.best_score;
  *partial(c, kBestLogit, r, blockIdx.y) = best.best_logit;
  *partial(c, kBestId, r, blockIdx.y) = __int_as_float(best.best_id);
}

}  // namespace

extern "C" int illada_unmask_draw_sm90a(const illada_unmask_call* call, void* stream) {
  const Call& c = *call;
  const int64_t rows = c.batch * c.count;
  if (rows < 1 || rows > 128 || c.vocab > 0x7fff0000 || c.parts > 8192 || !c.lists) return int(cudaErrorInvalidValue);
  const size_t smem = sizeof(Shared) + c.parts * sizeof(int32_t);
  const int64_t wanted = rows < 128 ? 128 / rows : 1, blocks = wanted < c.parts ? wanted : c.parts;  // of a row
  return launch({dim3(unsigned(rows), unsigned(blocks)), dim3(kThreads), smem, static_cast<cudaStream_t>(stream)},
                draw_kernel, c);
}
