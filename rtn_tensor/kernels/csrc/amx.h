// AMX: bf16 activations times weights that are decoded to bf16, in tiles of 16 rows of 64 bytes; for so many tokens that decoding pays.
//
// Tokens are rows of the first operand, 32 columns each, and rows of the weight are columns of the second, whose rows are pairs of neighbours
// in k: what FloatProduct decodes, in order. Tile registers: sums of (tokens, rows) in 0 to 3, tokens in 4 and 5, weights in 6 and 7. Integers
// stay exact; each group's sum is scaled in fp32, as elsewhere.
#pragma once
#include "avx512.h"
#include "float_product.h"

namespace rtn {
namespace {

// 32 activations of one token.
struct Bf16Row {
  static constexpr int COLUMNS = 32;
  bf16 k[COLUMNS];

  explicit Bf16Row(const bf16* from) { memcpy(k, from, sizeof(k)); }
};

struct Amx : Avx512Bf16 {
  static constexpr int V = 2, C = 32, MANY = 32;
  using X = Bf16Row;

  static X piece(const bf16* from) { return X(from); }
  template <class T>
  static X piece(const T*) {
    __builtin_unreachable();
  }
};

// GCC's tile loads and stores do not say which memory they touch.
inline void tiles_touch_memory() { asm volatile("" : : : "memory"); }

template <class I>
struct AmxProduct : FloatProduct<I> {
  using Base = FloatProduct<I>;
  using typename Base::D;
  using typename Base::F;
  using typename Base::W;
  using typename Base::X;
  static constexpr int L = I::L, V = I::V, R = L * V, HALF = 16;
  static constexpr bool ALWAYS_DECODED = true;
  // 32 KiB of decoded weights, which L1 holds; and 4 blocks take 1.2 times as long with 512 tokens, as these come from L3 as many times more.
  static constexpr int64_t K_BLOCK = 512, BLOCKS = 16;

  // Chunks that one tile of weights covers; those past the end of a row decode to zeros.
  template <int BITS>
  static constexpr int chunks_together() {
    return BITS / 4;
  }

  // The pairs of one chunk's dwords in the order of k, each V apart.
  template <int BITS>
  static void decode(const D* dwords, W* out) {
    decode_fields<BITS>(dwords, out, make_ints<16 / BITS>());
  }

  template <int BITS, int... i>
  static void decode_fields(const D* dwords, W* out, ints<i...>) {
    RTN_UNROLL for (int q = 0; q < 4; ++q) ((out[(4 * i + q) * V] = I::template decode<BITS, i>(dwords[q])), ...);
  }

  template <int T, int BITS, bool DECODED, class Frame>
  static void tile(const Frame& l, const typename Frame::Rows& r, const W* decoded, const float* scales, int64_t begin, int64_t end, const X* x, float* sums, const typename Frame::Next& next) {
    multiply<BITS, (T > HALF)>(l, r, decoded, scales, begin, end, x, T, sums, next);
  }

  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  static void configure(int tokens) {
    Config config;
    const int first = tokens < HALF ? tokens : HALF, rest = tokens > HALF ? tokens - HALF : HALF;
    const int rows[8] = {first, first, rest, rest, first, rest, 16, 16};
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = uint8_t(rows[t]);
    _tile_loadconfig(&config);
  }

  // As FloatProduct's tile; TWO: more tokens than one tile register has rows.
  template <int BITS, bool TWO, class Frame>
  static void multiply(const Frame& l, const typename Frame::Rows& r, const W* decoded, const float* scales, int64_t begin, int64_t end, const X* x, int tokens, float* sums, const typename Frame::Next& next) {
    constexpr int CHUNKS = chunks_together<BITS>();
    constexpr int SUMS_BYTES = R * sizeof(float);
    alignas(64) float of_group[I::C * R];
    configure(tokens);
    x += begin / CHUNKS * tokens;
    for (int64_t c = begin; c < end; scales += R) {
      const int64_t group_end = (c / l.group_chunks + 1) * l.group_chunks, stop = group_end < end ? group_end : end;
      _tile_zero(0);
      _tile_zero(1);
      if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
      }
      tiles_touch_memory();
      for (; c < stop; c += CHUNKS) {
        RTN_UNROLL for (int j = 0; j < CHUNKS; ++j) next.prefetch(r, begin, c + j);
        _tile_loadd(6, decoded, V * 64);
        _tile_loadd(7, decoded + 1, V * 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
          _tile_loadd(5, x + HALF, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        decoded += HALF * V;
        x += tokens;
      }
      _tile_stored(0, of_group, SUMS_BYTES);
      _tile_stored(1, of_group + L, SUMS_BYTES);
      if (TWO) {
        _tile_stored(2, of_group + HALF * R, SUMS_BYTES);
        _tile_stored(3, of_group + HALF * R + L, SUMS_BYTES);
      }
      tiles_touch_memory();
      RTN_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = I::load(scales + v * L);
        for (int at = v * L; at < tokens * R; at += R) I::store(sums + at, I::fma(I::load(of_group + at), scale, I::load(sums + at)));
      }
    }
    _tile_release();
  }
};

}  // namespace
}  // namespace rtn
