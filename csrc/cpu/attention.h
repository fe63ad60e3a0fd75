// Attention as the torch side and the kernels of every instruction set see it: one list of sequences for dense, packed
// and ring-cached calls. Strides count elements; the last dimension has stride 1.
#pragma once
#include "cpu/isa.h"

namespace mk {

// Keys and values at equal distances in memory, in order of position. Codes are read where a sequence is decoded only.
struct KeySpan {
  const char *k, *v;
  int64_t k_row, k_head, v_row, v_head, count;
  // Of int8 codes, a scale for each head of a key, in the dtype of the arithmetic; null where k and v hold numbers.
  const char *k_scale = nullptr, *v_scale = nullptr;
  int64_t k_scale_row = 0, k_scale_head = 0, v_scale_row = 0, v_scale_head = 0;
};

constexpr int max_spans = 3;  // the older and the newer part of a ring, and a chunk

// The keys are those of the spans one after the other; the last query is aligned with the last key. Keys before
// `first_key` are seen by no query. Tiles read the panels from `first_panel` on, which hold the keys from `first_key`
// on.
struct AttentionSequence {
  const char* q;
  char *out, *lse;
  int64_t queries, keys, first_key, first_panel;
  KeySpan spans[max_spans];
};

struct Attention {
  Dtype dtype;
  int64_t heads, kv_heads, dim;
  int64_t q_row, q_head, out_row, out_head, lse_head;
  int64_t window;  // 0: none
  double scale;
  bool causal;
  const AttentionSequence* sequences;
  char *key_panels, *value_panels;  // [kv_heads][panels]
  int64_t panels;
  char* partials;  // of decode items, `partial_bytes` each
  int64_t partial_bytes;
};

// A tile is up to `tile_rows` queries, from `first` on, of the query heads [head, head + heads) of one KV head.
// A decode item is all queries of the KV heads [head, head + heads) over the keys [first, last).
struct AttentionItem {
  int64_t sequence, head, heads, first, last, partial;
};

constexpr int64_t tile_rows = 96;
constexpr int64_t tile_heads = 4;
constexpr int64_t decode_heads = 8;
// Up to so many rows that share a KV head, keys are read in place; beyond, packing them pays.
constexpr int64_t decode_rows = 32;
constexpr int64_t piece_keys = 256;  // the longest piece of a decoded sequence

struct TileSizes {
  int64_t panel_keys, key_panel_bytes, value_panel_bytes, scratch_bytes;
};

struct AttentionKernels {
  // `rows`: the most queries times query heads of a tile.
  using Sizes = TileSizes (*)(int64_t dim, int64_t rows);
  using Pack = void (*)(const Attention&, int64_t sequence, int64_t kv_head, int64_t panel);
  using Tile = void (*)(const Attention&, const AttentionItem&, char* scratch);
  Sizes sizes[dtypes];
  Pack pack[dtypes];
  Tile tile[dtypes];
};

struct DecodeSizes {
  int64_t scratch_bytes, partial_bytes;
};

struct DecodeKernels {
  // `rows`: the most queries times query heads that share a KV head.
  using Sizes = DecodeSizes (*)(int64_t dim, int64_t rows);
  using Run = void (*)(const Attention&, const AttentionItem&, char* scratch);
  // Joins the partial results of the `count` pieces from `item` on, and writes the outputs.
  using Join = void (*)(const Attention&, const AttentionItem& item, int64_t count);
  Sizes sizes[dtypes];
  Run run[dtypes];
  Join join[dtypes];
};

static inline bool decoded(const Attention& a, int64_t queries) {
  return queries * (a.heads / a.kv_heads) <= decode_rows;
}

// The keys that a query sees are [first_visible, end_visible).
static inline int64_t first_visible(const Attention& a, const AttentionSequence& s, int64_t query) {
  const int64_t first = query + s.keys - s.queries - a.window + 1;
  return a.causal && a.window && first > 0 ? first : 0;
}

static inline int64_t end_visible(const Attention& a, const AttentionSequence& s, int64_t query) {
  const int64_t end = query + s.keys - s.queries + 1;
  return !a.causal ? s.keys : end > 0 ? end : 0;
}

}  // namespace mk

MK_MATRIX_KERNELS(AttentionKernels, attention)
MK_MATRIX_KERNELS(DecodeKernels, attention_decode)
