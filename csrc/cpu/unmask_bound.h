// unmask on the CPU: top_k and top_p of a row as the least logit that is kept.
//
// An id is kept while all larger logits together weigh less than a target. For top_k each weighs 1 and the target is k;
// for top_p each weighs exp((l - max l) / T) and the target is p of the sum. A histogram that is linear in l finds the
// bin in which the weight reaches the target. A sample spares most of it: it bounds a small k, and for top_p it says
// below which logit the bound hardly lies, so that only ids above are weighed; the sum is then that of the first pass,
// and where they do not reach the target all are weighed. The ids of the bin are listed, and the list is narrowed by
// the bits of its logits until few are left to sort. A bin of more than kListed ids is narrowed first, by passes over
// the row. Weights add up in float64 and in order of id, and a thread has a row to itself: the bound depends on the row
// alone. Memory: 90 KiB a thread.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "unmask_rows.h"

namespace {

constexpr int kBins = 512, kCopies = 4, kListed = 8192, kSampled = 2048;
constexpr float kLargest = std::numeric_limits<float>::max();

// Rises with the float, as signed integers; -0 lies below +0, which are equal as bounds.
inline vi key_of(vf v) {
  const vi bits = bit_cast<vi>(v);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int32_t key_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Writes the lanes of v that are inside to `out`, in order, and returns their number; up to kWidth floats are written.
inline int append(float* out, vf v, vi inside) {
#if defined(__AVX512F__)
  const __mmask16 lanes = _mm512_test_epi32_mask(bit_cast<__m512i>(inside), bit_cast<__m512i>(inside));
  store(out, bit_cast<vf>(_mm512_maskz_compress_ps(lanes, bit_cast<__m512>(v))));
  return __builtin_popcount(lanes);
#else
  if (!any(inside)) return 0;
  int n = 0;
  for (int i = 0; i < kWidth; ++i)
    if (inside[i]) out[n++] = v[i];
  return n;
#endif
}

// One row's logits, a segment at a time.
struct RowLogits {
  const Reader& reader;
  const char* data;
  int64_t ids;
  const Edits& edits;
  const Partial* parts;

  int64_t segments() const { return (ids + kSegment - 1) / kSegment; }
  const float* segment(int64_t s, float* scratch) const {
    const int n = int(std::min<int64_t>(kSegment, ids - s * kSegment));
    return reader.fetch(data + s * kSegment * reader.bytes, n, s * kSegment, edits, scratch);
  }
  int padded(int64_t s) const {  // of a segment: -inf fills its last block
    return int((std::min<int64_t>(kSegment, ids - s * kSegment) + kBlock - 1) / kBlock * kBlock);
  }
  // Calls f(vectors) with 4 vectors at a time of the segments that reach `least`.
  template <class F> void each(float least, F f) const {
    alignas(64) float scratch[kSegment];
    for (int64_t s = 0; s < segments(); ++s) {
      if (!(parts[s].top >= least)) continue;
      const float* logits = segment(s, scratch);
      for (int j = 0; j < padded(s); j += 4 * kWidth) {
        vf v[4];
        for (int c = 0; c < 4; ++c) v[c] = load(logits + j + c * kWidth);
        if (any((v[0] >= least) | (v[1] >= least) | (v[2] >= least) | (v[3] >= least))) f(v);
      }
    }
  }
  // Copies some logits of each segment, without their edits; returns their number, `most` at most.
  int sample(float top, int most, float* out) const {
    alignas(64) float scratch[kSegment];
    const int each = most / 64;
    int n = 0;
    const int64_t step = std::max<int64_t>(1, segments() / 64);
    for (int64_t s = 0; s < segments() && n + each <= most; s += step) {
      const int here = int(std::min<int64_t>(each, ids - s * kSegment));
      const float* l = reader.fetch(data + s * kSegment * reader.bytes, here, s * kSegment, Edits{}, scratch);
      for (int i = 0; i < here; ++i) out[n++] = l[i] <= top ? l[i] : -kInf;  // what is above, or a NaN, is forbidden
    }
    return n;
  }
};

// What an id weighs.
struct Weigh {
  bool by_mass;
  float top, scale;  // exp((l - top) * scale)
  void operator()(const vf (&v)[4], vf (&w)[4]) const {
    for (int c = 0; c < 4; ++c) w[c] = by_mass ? (v[c] - top) * scale : splat(1.0f);
    if (by_mass) exp_not_positive(w);
  }
};

// The weight of each bin; bins follow falling logits. Copies take turns, because an addition waits for the one before.
struct Histogram {
  double weight[kCopies][kBins];
  void clear() { std::fill_n(&weight[0][0], kCopies * kBins, 0.0); }
  inline __attribute__((always_inline)) void add(const vi (&bin)[4], const vf (&w)[4]) {
    alignas(64) int32_t b[4 * kWidth];
    alignas(64) float x[4 * kWidth];
    for (int c = 0; c < 4; ++c) {
      std::memcpy(b + c * kWidth, &bin[c], sizeof(vi));
      store(x + c * kWidth, w[c]);
    }
    for (int i = 0; i < 4 * kWidth; i += kCopies)
      for (int c = 0; c < kCopies; ++c) weight[c][b[i + c]] += double(x[i + c]);
  }
  double of(int b) const { return weight[0][b] + weight[1][b] + (weight[2][b] + weight[3][b]); }
  double total() const {
    double sum = 0;
    for (int b = 0; b < kBins; ++b) sum += of(b);
    return sum;
  }
  // Returns the bin in which `above` reaches the target, and adds the bins before it to `above`; where rounding lets no
  // bin reach it, the last that has weight.
  int crossing(double& above, double target) const {
    int last = 0;
    double before = above;
    for (int b = 0; b < kBins; ++b) {
      const double w = of(b);
      if (!(w > 0)) continue;
      last = b, before = above;
      if (above + w >= target) break;
      above += w;
    }
    above = before;
    return last;
  }
};

// Finds the least logit of a row that is kept.
class Bound {
 public:
  Bound(const RowLogits& row, float top) : row_(row), top_(top == 0 ? 0.0f : top) {}  // the highest key of a zero

  float by_count(int64_t k) {
    weigh_ = Weigh{false, top_, 0};
    target_ = double(k);
    const int n = row_.sample(top_, kSampled, logits_);
    const double expected = target_ * n / double(row_.ids);
    const int64_t rank = int64_t(expected + 4 * std::sqrt(expected) + 3);
    if (rank < n) {
      std::nth_element(logits_, logits_ + rank, logits_ + n, [](float a, float b) { return a > b; });
      floor_ = logits_[rank];
      list(key_of(floor_), key_of(top_));
      if (listed_ >= k && listed_ <= kListed) return in_list(0);
      if (listed_ >= k) {
        linear_bins(floor_);
        return in_linear_bin(floor_);
      }
    }
    floor_ = -kInf;
    return narrow(key_of(-kInf), key_of(top_), 0);
  }

  // `floor`: ids below it count for nothing. `total`: what all ids weigh, or 0 where that is not known.
  float by_mass(float temperature, float p, float floor, double total) {
    if (!(p > 0)) return top_;
    weigh_ = Weigh{true, top_, std::min(1.0f / temperature, kLargest)};
    const float guess = std::max(top_ - 20.0f * temperature, -kLargest);
    if (total > 0) {
      target_ = double(p) * total;
      floor_ = std::max(floor, safe_floor(guess, p));
      if (floor_ > guess) {
        kept_bins(floor_);
        if (bins_.total() >= target_) return in_linear_bin(floor_);
      }
    }
    floor_ = floor;
    linear_bins(std::max(guess, floor));
    target_ = double(p) * bins_.total();
    return in_linear_bin(std::max(guess, floor));
  }

 private:
  float scale_of(float guess) const {
    return std::max(std::min(kBins / (top_ - guess), kLargest), std::numeric_limits<float>::min());
  }
  vi linear_bin(vf v, float scale) const {
    return __builtin_convertvector(min((top_ - v) * scale, splat(float(kBins - 1))), vi);
  }
  // Adds the first n of logits_ to bins_, which end at `guess`.
  void add_listed(int n, float guess) {
    const float scale = scale_of(guess);
    for (int i = n; i % (4 * kWidth); ++i) logits_[i] = -kInf;  // weighs 1e-38
    for (int j = 0; j < n; j += 4 * kWidth) {
      vf v[4], w[4];
      vi bin[4];
      for (int c = 0; c < 4; ++c) v[c] = load(logits_ + j + c * kWidth), bin[c] = linear_bin(v[c], scale);
      weigh_(v, w);
      bins_.add(bin, w);
    }
  }
  // Fills bins_ with the ids from `guess` on.
  void kept_bins(float guess) {
    int n = 0;
    bins_.clear();
    row_.each(guess, [&](const vf(&v)[4]) {
      for (int c = 0; c < 4; ++c) n += append(logits_ + n, v[c], v[c] >= guess);
      if (n < kListed - 4 * kWidth) return;
      add_listed(n, guess);
      n = 0;
    });
    add_listed(n, guess);
  }
  // Returns a logit that the bound is hardly below, or -inf: two standard deviations beyond p of a sample.
  float safe_floor(float guess, float p) {
    const int n = row_.sample(top_, kListed, logits_);
    bins_.clear();
    add_listed(n, guess);
    double squares = 0;
    for (int i = 0; i < n; i += kWidth) {
      const vf w = exp((load(logits_ + i) - top_) * weigh_.scale);
      squares += double(reduce_add(w * w));
    }
    const double total = bins_.total();
    const double share = p + 2 * std::sqrt(p * (1 - double(p)) * squares) / total;
    double above = 0;
    return share < 1 ? top_ - float(bins_.crossing(above, share * total) + 1) / scale_of(guess) : -kInf;
  }
  // Fills bins_. All ids below `guess` lie in the last bin.
  void linear_bins(float guess) {
    const float scale = scale_of(guess);
    bins_.clear();
    Doubles rest{};
    row_.each(floor_, [&](const vf(&v)[4]) {
      vf w[4];
      vi bin[4];
      weigh_(v, w);
      for (int c = 0; c < 4; ++c) w[c] = v[c] >= floor_ ? w[c] : vf{};
      if (!any((v[0] >= guess) | (v[1] >= guess) | (v[2] >= guess) | (v[3] >= guess))) {
        for (int c = 0; c < 4; ++c) accumulate(rest, w[c]);
        return;
      }
      for (int c = 0; c < 4; ++c) bin[c] = linear_bin(v[c], scale);
      bins_.add(bin, w);
    });
    bins_.weight[0][kBins - 1] += total(rest);
  }

  float in_linear_bin(float guess) {
    const float scale = scale_of(guess);
    double above = 0;
    const int bin = bins_.crossing(above, target_);
    // the keys of the bin, by bisection: bins fall as keys rise
    const auto least_key_below = [&](int b) {
      int64_t low = key_of(-kInf), high = int64_t(key_of(top_)) + 1;
      while (low < high) {
        const int64_t mid = low + (high - low) / 2;
        if (linear_bin(splat(float_of(int32_t(mid))), scale)[0] < b) high = mid;
        else low = mid + 1;
      }
      return low;
    };
    const int32_t low = int32_t(least_key_below(bin + 1)), high = int32_t(least_key_below(bin) - 1);
    list(low, high);
    return listed_ <= kListed ? in_list(above) : narrow(low, high, above);
  }

  // Lists the ids with keys from low to high: their number, the first kListed logits and weights.
  void list(int32_t low, int32_t high) {
    listed_ = 0, low_ = low, high_ = high;
    row_.each(std::max(floor_, float_of(low)), [&](const vf(&v)[4]) {
      vi inside[4];
      for (int c = 0; c < 4; ++c) inside[c] = (key_of(v[c]) >= low) & (key_of(v[c]) <= high) & (v[c] >= floor_);
      if (!any(inside[0] | inside[1] | inside[2] | inside[3])) return;
      for (int c = 0; c < 4; ++c) listed_ += append(logits_ + std::min<int64_t>(listed_, kListed), v[c], inside[c]);
    });
    for (int64_t j = 0; j < std::min<int64_t>(listed_, kListed); j += 4 * kWidth) {
      vf v[4], w[4];
      for (int c = 0; c < 4; ++c) v[c] = load(logits_ + j + c * kWidth);
      weigh_(v, w);
      for (int c = 0; c < 4; ++c) store(weights_ + j + c * kWidth, w[c]);
    }
  }

  // The bound lies between two keys; larger logits weigh `above`. Narrows the keys by passes over the row.
  float narrow(int32_t low, int32_t high, double above) {
    while (low < high) {
      const int shift = shift_of(low, high);
      bins_.clear();
      row_.each(floor_, [&](const vf(&v)[4]) {
        vi inside[4];
        for (int c = 0; c < 4; ++c) inside[c] = (key_of(v[c]) >= low) & (key_of(v[c]) <= high) & (v[c] >= floor_);
        if (!any(inside[0] | inside[1] | inside[2] | inside[3])) return;
        vf w[4];
        weigh_(v, w);
        for (int c = 0; c < 4; ++c)
          for (int i = 0; i < kWidth; ++i)
            if (inside[c][i]) bins_.weight[0][bin_of(v[c][i], high, shift)] += double(w[c][i]);
      });
      const int64_t bin = bins_.crossing(above, target_), largest = int64_t(high) - (bin << shift);
      const int32_t from = int32_t(std::max<int64_t>(low, largest - (int64_t(1) << shift) + 1)), to = int32_t(largest);
      list(from, to);
      if (listed_ <= kListed) return in_list(above);
      low = from, high = to;
    }
    return float_of(low);
  }

  float in_list(double above) {
    int n = int(listed_);
    while (n > 24 && low_ < high_) {
      const int shift = shift_of(low_, high_);
      bins_.clear();
      for (int i = 0; i < n; ++i) bins_.weight[0][bin_of(logits_[i], high_, shift)] += double(weights_[i]);
      const int bin = bins_.crossing(above, target_);
      int kept = 0;
      int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
      for (int i = 0; i < n; ++i) {
        if (bin_of(logits_[i], high_, shift) != bin) continue;
        low = std::min(low, key_of(logits_[i])), high = std::max(high, key_of(logits_[i]));
        logits_[kept] = logits_[i], weights_[kept++] = weights_[i];
      }
      n = kept, low_ = low, high_ = high;
    }
    if (low_ == high_) return float_of(low_);
    for (int i = 1; i < n; ++i)  // insertion, by falling logit
      for (int j = i; j > 0 && logits_[j - 1] < logits_[j]; --j)
        std::swap(logits_[j - 1], logits_[j]), std::swap(weights_[j - 1], weights_[j]);
    float bound = logits_[0];
    for (int i = 0; i < n && above < target_; ++i) bound = logits_[i], above += double(weights_[i]);
    return bound;
  }

  static int shift_of(int32_t low, int32_t high) {
    const uint32_t span = uint32_t(high) - uint32_t(low);
    int shift = 0;
    while (span >> shift >= uint32_t(kBins)) ++shift;
    return shift;
  }
  static int bin_of(float l, int32_t high, int shift) { return int((uint32_t(high) - uint32_t(key_of(l))) >> shift); }
  static float float_of(int32_t key) { return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

  const RowLogits& row_;
  const float top_;
  Weigh weigh_{};
  double target_ = 0;
  float floor_ = -kInf;
  int64_t listed_ = 0;
  int32_t low_ = 0, high_ = 0;  // keys of the list lie between them
  Histogram bins_;
  float logits_[kListed + 4 * kWidth], weights_[kListed + 4 * kWidth];
};

}  // namespace
