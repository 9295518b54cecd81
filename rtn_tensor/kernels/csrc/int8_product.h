// The product of activations that are rounded to int8, 32 at a time with a scale of their own (reference.rounded_to_int8), over an instruction
// set `I` (linear.h names the rest of what one has):
//
//   I::N             vectors of int32 sums, one per row
//   offset<BITS>()                         what operand<...> adds to each weight: 8 or 128 where the instruction takes unsigned bytes, or 0
//   operand<BITS, h>(dword)                the half h of an int4 dword's eight weights, or an int8 dword's four, as bytes
//   dot<BITS>(sum, operand, x)             sum + the four products of bytes, per row; x has the same four of one token, as signed bytes
//   splat(x), to_float(sum)
//   TWO_BY_TWO       whether it multiplies two rows by two tokens, eight products of bytes at a time:
//     zip(a, b, h)     of two operands that follow in k, those of the half h of the rows: row, row of a, b, a, b
//     dot(sum, zipped, x, y)   sum + two rows times two tokens, each with its eight bytes at x and y
//     unzip(s, u, t)   token t of two, of the sums of both halves of the rows
//
// A dword of int4 has the fields 0 and 2 of words 2q and 2q + 1 in the low halves of its bytes, and the fields 1 and 3 in the high ones: so
// weights become bytes by a mask (and a shift), and the activations lie once in the order that this gives. A chunk of int4 has 32 weights,
// which are a piece; one of int8 half of them. Integer sums are exact, so all orders agree; a piece's is scaled in fp32, and so are a group's.
#pragma once
#include "convert.h"
#include "rtn.h"

namespace rtn {
namespace {

// 32 activations of one token, q * scale.
struct Int8Piece {
  int32_t dword[8];  // four integers each, in the order of `operand`
  int32_t start;     // minus the sum of q times what is added to each weight
  float scale;
};

// Of 32 activations the integers, as floats, and their scale: NaN where one of them is NaN or inf.
template <class T>
float round_piece(const T* from, float (&q)[32]) {
  uint32_t largest = 0;  // as bits, of which those of NaN are above those of inf
  for (int j = 0; j < 32; ++j) q[j] = to_float(from[j]);
  for (int j = 0; j < 32; ++j) {
    const uint32_t magnitude = as_bits(q[j]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7F800000) {
    memset(q, 0, sizeof(q));
    return as_float(0x7FC00000);
  }
  float most = as_float(largest);
  const float scale = most / 127.0f;
  if (most < 0x1p-60f) {  // or the inverse would overflow
    for (int j = 0; j < 32; ++j) q[j] *= 0x1p60f;
    most *= 0x1p60f;
  }
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (int j = 0; j < 32; ++j) q[j] = __builtin_rintf(q[j] * inverse);
  return scale;
}

// fn(32 activations, piece, token) for each of a tile's tokens, by pieces. Zero past K.
template <class T, class Frame, class Fn>
void each_piece(const Frame& l, const typename Frame::Tile& tile, Fn fn) {
  const T* x = l.template row_of<T>(tile.row);
  const int64_t pieces = l.x_pieces();
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t c = 0; c < tile.tokens; ++c) {
      const int64_t left = l.a.k - 32 * p;
      const T* from = x + c * l.a.x_stride + 32 * p;
      T some[32] = {};
      if (left < 32) memcpy(some, from, left * sizeof(T)), from = some;
      fn(from, p, c);
    }
  }
}

template <class I>
struct Int8Product {
  static constexpr int L = I::L, V = I::V;
  static constexpr int COLUMNS = 32;
  static constexpr int64_t BLOCKS = 4;
  static constexpr bool ALWAYS_DECODED = false;
  static constexpr bool SCALED = false;
  struct Session {};
  static constexpr int64_t K_BLOCK = 2048;  // 64 KiB, as bytes
  using F = typename I::F;
  using D = typename I::D;
  using N = typename I::N;
  using W = typename I::W;
  using X = Int8Piece;

  template <int BITS>
  static constexpr int per_chunk() {  // operands of a row
    return 32 / BITS;
  }
  template <int BITS>
  static constexpr int chunks_together() {
    return 1;
  }

  // ------------------------------------------------------------------------------------------------ activations

  template <class T, class Frame>
  static void pack(const Frame& l, const typename Frame::Tile& tile, X* out) {
    const int64_t group = l.group_chunks * l.chunk_k;
    if (l.minus_sums)
      for (int64_t g = 0; g < l.groups; ++g)
        for (int64_t c = 0; c < tile.tokens; ++c) l.minus_sum(tile, g, c) = 0;
    each_piece<T>(l, tile, [&](const T* from, int64_t p, int64_t c) {
      const int32_t sum = l.a.bits == 4 ? round<4>(from, *out) : round<8>(from, *out);
      if (l.minus_sums) l.minus_sum(tile, 32 * p / group, c) -= out->scale * float(sum);
      ++out;
    });
  }

  // The sum of the integers.
  template <int BITS, class T>
  static int32_t round(const T* from, X& out) {
    float floats[32];
    out.scale = round_piece(from, floats);
    int8_t q[32];
    int32_t sum = 0;
    for (int j = 0; j < 32; ++j) {
      const int32_t integer = int32_t(floats[j]);
      sum += integer;
      q[j] = int8_t(integer);
    }
    // Bytes as `operand` has the weights: of int4 each of the first half beside its like of the second, of int8 so in each half.
    int8_t ordered[32];
    if (BITS == 4) {
      for (int j = 0; j < 16; ++j) ordered[2 * j] = q[j], ordered[2 * j + 1] = q[16 + j];
    } else {
      for (int h = 0; h < 32; h += 16)
        for (int j = 0; j < 8; ++j) ordered[h + 2 * j] = q[h + j], ordered[h + 2 * j + 1] = q[h + 8 + j];
    }
    memcpy(out.dword, ordered, sizeof(ordered));
    out.start = -sum * I::template offset<BITS>();
    return sum;
  }

  // ------------------------------------------------------------------------------------------------ weights

  template <int BITS>
  static W operand(D dword, int h) {
    if constexpr (BITS == 8) return I::template operand<8, 0>(dword);
    else return h ? I::template operand<4, 1>(dword) : I::template operand<4, 0>(dword);
  }

  // The operands of one chunk's dwords, in the order of the activations, each V apart.
  template <int BITS>
  static void decode(const D* dwords, W* out) {
    RTN_UNROLL for (int h = 0; h < 8 / BITS; ++h) {
      if constexpr (I::TWO_BY_TWO) {
        RTN_UNROLL for (int q = 0; q < 4; q += 2) RTN_UNROLL for (int half = 0; half < 2; ++half)
          out[(4 * h + q + half) * V] = I::zip(operand<BITS>(dwords[q], h), operand<BITS>(dwords[q + 1], h), half);
      } else {
        RTN_UNROLL for (int q = 0; q < 4; ++q) out[(4 * h + q) * V] = operand<BITS>(dwords[q], h);
      }
    }
  }

  // ------------------------------------------------------------------------------------------------ the inner loop

  // As FloatProduct has it.
  template <int T, int BITS, bool DECODED, class Frame>
  static void tile(const Frame& l, const typename Frame::Rows& r, const W* decoded, const float* scales, int64_t begin, int64_t end, const X* x, float* sums, const typename Frame::Next& next) {
    constexpr int CHUNKS = BITS / 4;  // of a piece
    constexpr bool PAIRS = DECODED && I::TWO_BY_TWO;
    constexpr int SUMS = PAIRS ? (T + 1) / 2 * 2 : T;  // the last of an odd number of tokens is multiplied with itself
    D dwords[V][L];
    const uint8_t* lines = nullptr;
    x += begin / CHUNKS * T;
    int64_t stop = (begin / l.group_chunks + 1) * l.group_chunks;
    for (int64_t c = begin; c < end; stop += l.group_chunks, scales += l.R) {
      if (stop > end) stop = end;
      F of_group[T][V];
      RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) of_group[t][v] = I::zero();
      for (; c < stop; x += T) {
        N p[SUMS][V];
        RTN_UNROLL for (int t = 0; t < SUMS; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) p[t][v] = I::splat(PAIRS ? 0 : x[t].start);
        RTN_UNROLL for (int half = 0; half < CHUNKS; ++half) {
          if (half && c == stop) break;  // a row of an odd number of chunks
          const int at = DECODED ? 0 : int((c - begin) % l.CHUNKS_AT_ONCE);
          if (!DECODED && at == 0) l.transpose(r, c, dwords);
          if (DECODED) next.prefetch(r, begin, c);
          if (!DECODED) lines = c % 4 == 0 ? l.ahead(r, c) : lines + l.R / 4 * l.pitch;
          if constexpr (PAIRS) two_by_two<T, BITS>(decoded, x, half, p);
          else RTN_UNROLL for (int q = 0; q < 4; ++q) {
            if (!DECODED) Frame::prefetch(lines, q, l.pitch);
            RTN_UNROLL for (int h = 0; h < 8 / BITS; ++h) {
              W w[V];
              RTN_UNROLL for (int v = 0; v < V; ++v) w[v] = DECODED ? decoded[(4 * h + q) * V + v] : operand<BITS>(dwords[v][4 * at + q], h);
              RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) p[t][v] = I::template dot<BITS>(p[t][v], w[v], x[t].dword[4 * (h + half) + q]);
            }
          }
          if (DECODED) decoded += per_chunk<BITS>() * V;
          ++c;
        }
        RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) of_group[t][v] = I::fma(I::to_float(sum_of<PAIRS>(p, t, v)), I::all(x[t].scale), of_group[t][v]);
      }
      // To memory and back: there are not registers enough for two sums of every token and the integers. Without what keeps GCC from trying,
      // groups of 32 took 1.4 times as long, and of 128 1.1 times.
      RTN_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = I::load(scales + v * L);
        RTN_UNROLL for (int t = 0; t < T; ++t) {
          float* to = sums + t * l.R + v * L;
          I::store(to, I::fma(of_group[t][v], scale, I::load(to)));
        }
      }
      asm volatile("" : : : "memory");
    }
  }

  // One chunk, into p[t][v] and p[t + 1][v]: tokens t and t + 1 of the first half of the rows, and of the second.
  template <int T, int BITS, int SUMS>
  static inline void two_by_two(const W* decoded, const X* x, int half, N (&p)[SUMS][V]) {
    RTN_UNROLL for (int h = 0; h < 8 / BITS; ++h) RTN_UNROLL for (int q = 0; q < 4; q += 2) RTN_UNROLL for (int t = 0; t < T; t += 2) {
      const int at = 4 * (h + half) + q;
      const int32_t *one = x[t].dword + at, *other = x[t + 1 < T ? t + 1 : t].dword + at;
      RTN_UNROLL for (int v = 0; v < V; ++v) RTN_UNROLL for (int part = 0; part < 2; ++part)
        p[t + part][v] = I::dot(p[t + part][v], decoded[(4 * h + q + part) * V + v], one, other);
    }
  }

  template <bool PAIRS, int SUMS>
  static N sum_of(const N (&p)[SUMS][V], int t, int v) {
    if constexpr (PAIRS) return I::unzip(p[t / 2 * 2][v], p[t / 2 * 2 + 1][v], t % 2);
    else return p[t][v];
  }
};

}  // namespace
}  // namespace rtn
