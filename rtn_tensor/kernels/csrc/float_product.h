// The product of float activations, written once over an instruction set `I` (linear.h names the rest of what one has):
//
//   I::W             one decoded pair of weights (k, k + 1) of each row
//   I::X             eight activations k .. k + 7, as four pairs
//   I::HALVES        most tokens for which low_half<i>(dword) and high_half<i>(dword), whose sum is the pair of int8, are used for it
//   decode<BITS, i>(dword)                 the pair that lies in fields i of a dword's two 16-bit words
//   dot(sum, pair, x, q)                   sum + pair . (pair q of x), per row
//
// Field i of a chunk's words has its weights 8i .. 8i + 7, and a dword the words t = 2q and 2q + 1: so dwords transposed over rows decode
// to pairs of neighbours in k, as a dot-product instruction wants them, and the activations stay in their own order.
//
// Integers stay exact; each group's sum is scaled in fp32 (16 rows at a time, once for group_size / 2 dot products).
#pragma once
#include "convert.h"
#include "rtn.h"

namespace rtn {
namespace {

template <class I>
struct FloatProduct {
  static constexpr int L = I::L, V = I::V;
  // Columns of a block of rows that are decoded into L2 (64 KiB, as bf16). At M = 256 half of it costs 2 %, and twice is no faster.
  static constexpr int64_t K_BLOCK = 1024;
  using F = typename I::F;
  using D = typename I::D;
  using W = typename I::W;
  using X = typename I::X;
  static constexpr int COLUMNS = X::COLUMNS;
  static constexpr int64_t BLOCKS = 4;  // of rows, at most, to which a thread applies the same tokens in one go
  static constexpr bool ALWAYS_DECODED = false;
  static constexpr bool SCALED = false;
  struct Session {};

  template <int BITS>
  static constexpr int per_chunk() {  // decoded pairs of a row
    return 64 / BITS;
  }
  template <int BITS>
  static constexpr int chunks_together() {  // that are decoded at least
    return 1;
  }

  // ------------------------------------------------------------------------------------------------ activations

  // A tile's tokens, interleaved by pieces: out[piece * tokens + token]. Zero past K.
  template <class T, class Frame>
  static void pack(const Frame& l, const typename Frame::Tile& tile, X* out) {
    const T* x = l.template row_of<T>(tile.row);
    const int64_t whole = l.a.k / COLUMNS, pieces = l.x_pieces();
    for (int64_t p = 0; p < whole; ++p)
      for (int64_t c = 0; c < tile.tokens; ++c) *out++ = I::piece(x + c * l.a.x_stride + COLUMNS * p);
    for (int64_t p = whole; p < pieces; ++p) {
      for (int64_t c = 0; c < tile.tokens; ++c) {
        T some[COLUMNS] = {};
        for (int64_t j = 0; COLUMNS * p + j < l.a.k; ++j) some[j] = x[c * l.a.x_stride + COLUMNS * p + j];
        *out++ = I::piece(some);
      }
    }
    if (l.minus_sums) sum_groups<T>(l, tile);
  }

  template <class T, class Frame>
  static void sum_groups(const Frame& l, const typename Frame::Tile& tile) {
    const int64_t size = l.group_chunks * l.chunk_k;
    for (int64_t c = 0; c < tile.tokens; ++c) {
      const T* x = l.template row_of<T>(tile.row + c);
      for (int64_t g = 0; g < l.groups; ++g) {
        const int64_t begin = g * size, end = begin + size < l.a.k ? begin + size : l.a.k;
        float lanes[16] = {};
        int64_t k = begin;
        for (; k + 16 <= end; k += 16)
          for (int j = 0; j < 16; ++j) lanes[j] += to_float(x[k + j]);
        for (int j = 0; k < end; ++k, ++j) lanes[j] += to_float(x[k]);
        for (int j = 0; j < 8; ++j) lanes[j] += lanes[j + 8];
        for (int j = 0; j < 4; ++j) lanes[j] += lanes[j + 4];
        l.minus_sum(tile, g, c) = -((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
      }
    }
  }

  // ------------------------------------------------------------------------------------------------ weights

  // The pairs of one chunk's dwords in the order q, i, each V apart.
  template <int BITS>
  static void decode(const D* dwords, W* out) {
    decode_fields<BITS>(dwords, out, make_ints<16 / BITS>());
  }

  template <int BITS, int... i>
  static void decode_fields(const D* dwords, W* out, ints<i...>) {
    RTN_UNROLL for (int q = 0; q < 4; ++q) ((out[(q * (16 / BITS) + i) * V] = I::template decode<BITS, i>(dwords[q])), ...);
  }

  // ------------------------------------------------------------------------------------------------ the inner loop

  // sums[c][v] += x . w over chunks [begin, end), for T tokens; weights decoded on the way, or read from `decoded`. `scales` begin with
  // those of the first chunk's group.
  template <int T, int BITS, bool DECODED, class Frame>
  static void tile(const Frame& l, const typename Frame::Rows& r, const W* decoded, const float* scales, int64_t begin, int64_t end, const X* x, float* sums, const typename Frame::Next& next) {
    constexpr int FIELDS = 16 / BITS, PAIRS = 4 * FIELDS;
    // With few tokens, more sums than tokens: one dot product takes several cycles, and the next may not wait for it.
    constexpr int S = T * V >= 8 ? 1 : T * V >= 4 ? 2 : 4;
    // Sums of few enough tokens stay in registers, beside those of the group.
    constexpr bool KEPT = DECODED && T <= I::MANY;
    D dwords[V][L];
    F kept[T][V];
    if (KEPT) RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) kept[t][v] = I::load(sums + t * l.R + v * L);
    const uint8_t* lines = nullptr;
    x += begin * FIELDS * T;
    for (int64_t c = begin; c < end;) {
      const int64_t group = c / l.group_chunks;
      const int64_t stop = (group + 1) * l.group_chunks < end ? (group + 1) * l.group_chunks : end;
      F p[T][V][S];
      RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) RTN_UNROLL for (int s = 0; s < S; ++s) p[t][v][s] = I::zero();
      for (; c < stop; ++c, x += FIELDS * T) {
        const int at = DECODED ? 0 : int((c - begin) % l.CHUNKS_AT_ONCE);
        if (!DECODED && at == 0) l.transpose(r, c, dwords);
        if (DECODED) next.prefetch(r, begin, c);
        if (!DECODED) lines = c % 4 == 0 ? l.ahead(r, c) : lines + l.R / 4 * l.pitch;
        chunk<T, BITS, DECODED, S, Frame>(dwords, 4 * at, decoded, x, lines, l.pitch, p, make_ints<PAIRS>());
        if (DECODED) decoded += PAIRS * V;
      }
      RTN_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = I::load(scales + (group - begin / l.group_chunks) * l.R + v * L);
        RTN_UNROLL for (int t = 0; t < T; ++t) {
          F sum = p[t][v][0];
          RTN_UNROLL for (int s = 1; s < S; ++s) sum = I::add(sum, p[t][v][s]);
          float* to = sums + t * l.R + v * L;
          if (KEPT) kept[t][v] = I::fma(sum, scale, kept[t][v]);
          else I::store(to, I::fma(sum, scale, I::load(to)));
        }
      }
    }
    if (KEPT) RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) I::store(sums + t * l.R + v * L, kept[t][v]);
  }

  template <int T, int BITS, bool DECODED, int S, class Frame, int... pair>
  static inline void chunk(const D (&dwords)[V][L], int first, const W* decoded, const X* x, const uint8_t* lines, int64_t pitch, F (&p)[T][V][S], ints<pair...>) {
    (one_pair<T, BITS, DECODED, S, pair, Frame>(dwords, first, decoded, x, lines, pitch, p), ...);
  }

  template <int T, int BITS, bool DECODED, int S, int PAIR, class Frame>
  static inline void one_pair(const D (&dwords)[V][L], int first, const W* decoded, const X* x, const uint8_t* lines, int64_t pitch, F (&p)[T][V][S]) {
    constexpr int FIELDS = 16 / BITS, Q = PAIR / FIELDS, FIELD = PAIR % FIELDS;
    if constexpr (!DECODED && FIELD == 0) Frame::prefetch(lines, Q, pitch);
    if constexpr (BITS == 8 && !DECODED && T <= I::HALVES) {
      RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) {
        F &a = p[t][v][2 * PAIR % S], &b = p[t][v][(2 * PAIR + 1) % S];
        a = I::dot(a, I::template low_half<FIELD>(dwords[v][first + Q]), x[FIELD * T + t], Q);
        b = I::dot(b, I::template high_half<FIELD>(dwords[v][first + Q]), x[FIELD * T + t], Q);
      }
      return;
    }
    W w[V];
    RTN_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (DECODED) w[v] = decoded[PAIR * V + v];
      else w[v] = I::template decode<BITS, FIELD>(dwords[v][first + Q]);
    }
    RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) p[t][v][PAIR % S] = I::dot(p[t][v][PAIR % S], w[v], x[FIELD * T + t], Q);
  }
};

}  // namespace
}  // namespace rtn
