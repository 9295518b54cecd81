// AMX: bf16 activations times weights that are decoded to bf16, in tiles of 16 rows of 64 bytes; for so many tokens that decoding pays.
//
// Tokens are rows of the first operand, 32 columns each, and rows of the weight are columns of the second, whose rows are pairs of neighbours
// in k: what FloatProduct decodes, in order. Tile registers: sums of (tokens, rows) in 0 to 3, tokens in 4 and 5, weights in 6 and 7.
//
// AmxProduct keeps integers exact and scales each group's sum in fp32, as elsewhere. AmxScaled is for more tokens, of which each takes its part
// in that: its weights are scaled and rounded to bf16 as they are decoded, and so the sums stay in tile registers from group to group. So are
// int8 activations, whose 32 columns have a scale of their own: scaled after each product, they gained a tenth over AVX-512 VNNI.
#pragma once
#include "avx512.h"
#include "float_product.h"
#include "int8_product.h"

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

  // The pair that `decode` gives, less the zero points and times the scales, rounded.
  template <int BITS, int i, bool ZERO>
  static W scaled(D dword, F scale, F zero) {
    F even = widen<BITS, i, 0>(dword), odd = widen<BITS, i, 1>(dword);
    if (ZERO) even = _mm512_sub_ps(even, zero), odd = _mm512_sub_ps(odd, zero);
    const __m512i both = __m512i(_mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scale), _mm512_mul_ps(even, scale)));
    const __m512i paired = _mm512_set_epi32(
        0x001F000F, 0x001E000E, 0x001D000D, 0x001C000C, 0x001B000B, 0x001A000A, 0x00190009, 0x00180008,
        0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002, 0x00110001, 0x00100000);
    return _mm512_permutexvar_epi16(paired, both);
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

  // The tile registers keep their shapes from a session's first product to its end: to set them for each product took a tenth of the time of
  // 4 to 24 tokens.
  struct Session {
    ~Session() {
      configured = 0;
      _tile_release();
    }
  };
  static inline thread_local int configured = 0;  // tokens

  static void configure(int tokens) {
    if (tokens == configured) return;
    configured = tokens;
    Config config;
    const int first = tokens < HALF ? tokens : HALF, rest = tokens > HALF ? tokens - HALF : HALF;
    const int rows[8] = {first, first, rest, rest, first, rest, 16, 16};
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = uint8_t(rows[t]);
    asm volatile("" : : "r"(&config) : "memory");  // GCC takes the first 8 bytes for all that is read
    _tile_loadconfig(&config);
  }

  // The sums of a tile in registers. TWO: it has more tokens than a register has rows.
  static constexpr int SUMS_BYTES = R * sizeof(float);

  template <bool TWO>
  static void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  template <bool TWO>
  static void load_sums(const float* from) {
    _tile_loadd(0, from, SUMS_BYTES);
    _tile_loadd(1, from + L, SUMS_BYTES);
    if (TWO) {
      _tile_loadd(2, from + HALF * R, SUMS_BYTES);
      _tile_loadd(3, from + HALF * R + L, SUMS_BYTES);
    }
  }

  template <bool TWO>
  static void store_sums(float* to) {
    _tile_stored(0, to, SUMS_BYTES);
    _tile_stored(1, to + L, SUMS_BYTES);
    if (TWO) {
      _tile_stored(2, to + HALF * R, SUMS_BYTES);
      _tile_stored(3, to + HALF * R + L, SUMS_BYTES);
    }
  }

  template <bool TWO>
  static void add_products(const W* decoded, const X* x) {
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
  }

  // As FloatProduct's tile.
  template <int BITS, bool TWO, class Frame>
  static void multiply(const Frame& l, const typename Frame::Rows& r, const W* decoded, const float* scales, int64_t begin, int64_t end, const X* x, int tokens, float* sums, const typename Frame::Next& next) {
    constexpr int CHUNKS = chunks_together<BITS>();
    alignas(64) float of_group[I::C * R];
    configure(tokens);
    x += begin / CHUNKS * tokens;
    for (int64_t c = begin; c < end; scales += R) {
      const int64_t group_end = (c / l.group_chunks + 1) * l.group_chunks, stop = group_end < end ? group_end : end;
      zero_sums<TWO>();
      tiles_touch_memory();
      for (; c < stop; c += CHUNKS) {
        RTN_UNROLL for (int j = 0; j < CHUNKS; ++j) next.prefetch(r, begin, c + j);
        add_products<TWO>(decoded, x);
        decoded += HALF * V;
        x += tokens;
      }
      store_sums<TWO>(of_group);
      tiles_touch_memory();
      RTN_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = I::load(scales + v * L);
        for (int at = v * L; at < tokens * R; at += R) I::store(sums + at, I::fma(I::load(of_group + at), scale, I::load(sums + at)));
      }
    }
  }
};

template <class I>
struct AmxScaled : AmxProduct<I> {
  using Base = AmxProduct<I>;
  using typename Base::D;
  using typename Base::F;
  using typename Base::W;
  using typename Base::X;
  static constexpr int L = I::L, V = I::V, R = L * V, HALF = 16;
  static constexpr bool SCALED = true;
  // 20 KiB of decoded weights and as many of 32 tokens, which share L1: 256 and 512 columns take 1.1 times as long with 512 tokens. 4 blocks
  // take 1.1 times as long where those tokens are more than L2 holds (K = 4096), and 0.92 times where they are not (K = 576).
  static constexpr int64_t K_BLOCK = 320, BLOCKS = 8;

  template <class T, class Frame>
  static void pack(const Frame& l, const typename Frame::Tile& tile, X* out) {
    if (!l.a.int8_x) return Base::template pack<T>(l, tile, out);
    each_piece<T>(l, tile, [&](const T* from, int64_t, int64_t) {
      float q[X::COLUMNS];
      const float scale = round_piece(from, q);
      for (int j = 0; j < X::COLUMNS; ++j) out->k[j] = from_float<bf16>(q[j] * scale);
      ++out;
    });
  }

  template <int BITS>
  static void decode(const D* dwords, const float* scales, const float* zeros, W* out) {
    if (zeros) decode_fields<BITS, true>(dwords, I::load(scales), I::load(zeros), out, make_ints<16 / BITS>());
    else decode_fields<BITS, false>(dwords, I::load(scales), I::zero(), out, make_ints<16 / BITS>());
  }

  template <int BITS, bool ZERO, int... i>
  static void decode_fields(const D* dwords, F scale, F zero, W* out, ints<i...>) {
    RTN_UNROLL for (int q = 0; q < 4; ++q) ((out[(4 * i + q) * V] = I::template scaled<BITS, i, ZERO>(dwords[q], scale, zero)), ...);
  }

  // sums[c][v] = or, after the first step, += x . w over chunks [begin, end), for T tokens.
  template <int T, int BITS, bool DECODED, class Frame>
  static void tile(const Frame&, const typename Frame::Rows& r, const W* decoded, const float*, int64_t begin, int64_t end, const X* x, float* sums, const typename Frame::Next& next) {
    multiply<BITS, (T > HALF)>(r, decoded, begin, end, x, T, sums, next);
  }

  template <int BITS, bool TWO, class Rows, class Next>
  static void multiply(const Rows& r, const W* decoded, int64_t begin, int64_t end, const X* x, int tokens, float* sums, const Next& next) {
    constexpr int CHUNKS = Base::template chunks_together<BITS>();
    Base::configure(tokens);
    x += begin / CHUNKS * tokens;
    tiles_touch_memory();
    if (begin) Base::template load_sums<TWO>(sums);
    else Base::template zero_sums<TWO>();
    for (int64_t c = begin; c < end; c += CHUNKS) {
      RTN_UNROLL for (int j = 0; j < CHUNKS; ++j) next.prefetch(r, begin, c + j);
      Base::template add_products<TWO>(decoded, x);
      decoded += HALF * V;
      x += tokens;
    }
    Base::template store_sums<TWO>(sums);
    tiles_touch_memory();
  }
};

}  // namespace
}  // namespace rtn
