// Lists of logits, by which the fused head truncates: its blocks list what may reach a row's bound, and
// unmask_draw_sm90a.cu draws among that once the bound is known.
//
// A row of c.lists has ILLADA_UNMASK_TILE_WORDS for each tile of 256 ids, and one tile more, then
// ILLADA_UNMASK_PART_WORDS for each part. A block lists in the words of its own tiles, in order: so no list overflows,
// and what is not listed is not touched. Behind a tile's 256 logits stands which ids of its two halves are listed.
#pragma once
#include "unmask.cuh"

namespace illada {

constexpr int kTile = 256, kTileWords = ILLADA_UNMASK_TILE_WORDS, kPartWords = ILLADA_UNMASK_PART_WORDS;

// Which of 128 ids are listed: id 4 i + j by bit i of of[j]. In the list they stand by j, then by i.
struct alignas(16) Places {
  uint32_t of[4];
  float top;  // the largest logit of all 128
  int32_t before, after;  // how many the block has listed
  uint32_t unused;
};
static_assert((kTileWords - kTile) * sizeof(float) == 2 * sizeof(Places), "of two halves");

struct Threshold {
  float at;
  int32_t reached;  // by so many ids
};
static_assert(kPartWords * sizeof(float) == 32 * sizeof(Threshold), "one a lane");

// What a block lists of a row. Its tiles and halves of tiles are counted from 0.
struct PartList {
  float* words;  // of its first tile
  int stride;  // of its tiles
  Threshold* thresholds;

  ILLADA_DEVICE float* tile(int i) const { return words + int64_t(i) * stride; }
  ILLADA_DEVICE float* logit(int i) const { return tile(i / kTile) + i % kTile; }
  ILLADA_DEVICE Places* places(int half) const { return reinterpret_cast<Places*>(tile(half / 2) + kTile) + half % 2; }
};

ILLADA_DEVICE PartList list_of(const Call& c, int64_t row, int part) {
  const int64_t of_tiles = ((c.vocab + kTile - 1) / kTile + 1) * kTileWords;
  float* const words = c.lists + row * (of_tiles + c.parts * kPartWords);
  return PartList{words + int64_t(part) * kTileWords, int(c.parts) * kTileWords,
                  reinterpret_cast<Threshold*>(words + of_tiles) + part * 32};
}

}  // namespace illada
