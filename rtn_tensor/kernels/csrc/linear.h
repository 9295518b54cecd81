// The blocked product, written once over an instruction set `I` and a `Product`, which packs activations, decodes weights and multiplies
// (float_product.h, int8_product.h, amx.h):
//
//   I::L             rows of the weight in one vector of 32-bit lanes
//   I::V             vectors of rows in a block
//   I::C             most tokens in a tile, whose C * V sums live in registers; MANY where a block of rows has several tiles
//   I::F, I::D       vectors of float sums, of packed dwords
//   transpose(rows, offset, dwords, out)   out[d] = dword d of every row, zero from `dwords` on
//   all(x)           x in every lane
//
// A Product's decoded weights are integers, whose sums over a group are scaled in fp32; or, where it is SCALED, (q - zero) S, rounded. What it
// sets up for a thread's blocks of rows is a Session.
//
// Where there are zero points and integers, the sums begin at -(S zero) (the sum of x over the group), summed over the groups; the last is found once for
// all rows.
#pragma once
#include <string.h>

#include <atomic>
#include <type_traits>

#include "convert.h"
#include "float_product.h"
#include "int8_product.h"
#include "rtn.h"

namespace rtn {
namespace {

template <class I, template <class> class Of>
struct Linear {
  using Product = Of<I>;
  static constexpr int L = I::L, V = I::V, C = I::C, R = L * V;
  static constexpr int CHUNKS_AT_ONCE = L / 4;  // a transpose covers L dwords of each row
  // Where there are more tokens than one tile, columns of a block of rows are decoded into L2 and used by so many tokens. At M = 512 half of
  // it costs 3 %.
  static constexpr int64_t M_BLOCK = 528;
  static constexpr int64_t AHEAD = 48;  // chunks from what is multiplied to what is prefetched
  using F = typename I::F;
  using D = typename I::D;
  using W = typename Product::W;
  using X = typename Product::X;

  const rtn_linear_args& a;
  const int64_t chunks, chunk_k, group_chunks, groups, row_blocks, pitch;
  int64_t tiles = 0;
  X* packed = nullptr;
  float* minus_sums = nullptr;  // of x over each group, a tile's by group and token, as `packed` has them; null without zero points
  std::atomic<bool> failed{false};

  // One run of tokens that use the same expert, cut into tiles of about equal size.
  struct Tile {
    int64_t row, tokens, expert;
  };
  Tile* tile_list = nullptr;

  explicit Linear(const rtn_linear_args& args)
      : a(args),
        chunks((args.k * args.bits + 127) / 128),
        chunk_k(128 / args.bits),
        group_chunks(args.group_size == -1 ? (chunks ? chunks : 1) : args.group_size * args.bits / 128),
        groups((chunks + group_chunks - 1) / group_chunks),
        row_blocks((args.n + R - 1) / R),
        pitch(chunks < AHEAD ? 64 : args.qdata_stride) {}

  int64_t x_pieces() const { return (chunks * chunk_k + Product::COLUMNS - 1) / Product::COLUMNS; }

  // ------------------------------------------------------------------------------------------------ activations

  template <class T>
  const T* row_of(int64_t row) const {
    return static_cast<const T*>(a.x) + row * a.x_stride;
  }

  float& minus_sum(const Tile& tile, int64_t group, int64_t token) const { return minus_sums[tile.row * groups + group * tile.tokens + token]; }

  static void pack_tile(void* self, int64_t t) {
    Linear& l = *static_cast<Linear*>(self);
    const Tile& tile = l.tile_list[t];
    X* out = l.packed + tile.row * l.x_pieces();
    switch (l.a.dtype) {
      case RTN_FLOAT32: return Product::template pack<float>(l, tile, out);
      case RTN_BFLOAT16: return Product::template pack<bf16>(l, tile, out);
      default: return Product::template pack<fp16>(l, tile, out);
    }
  }

  // ------------------------------------------------------------------------------------------------ weights

  struct Rows {
    const uint8_t* q[R];
    int64_t n0, valid, expert;
  };

  Rows rows_of(int64_t expert, int64_t block) const {
    Rows r;
    r.expert = expert;
    r.n0 = block * R;
    r.valid = a.n - r.n0 < R ? a.n - r.n0 : R;
    const uint8_t* base = a.qdata + expert * a.qdata_expert_stride;
    // Rows past the last repeat it; their sums are not stored.
    for (int j = 0; j < R; ++j) r.q[j] = base + (r.n0 + (j < r.valid ? j : r.valid - 1)) * a.qdata_stride;
    return r;
  }

  template <class T>
  static float number_in(uint32_t dword, int which) {
    if (sizeof(T) == 4) return as_float(dword);
    T number;
    if constexpr (std::is_same<T, int8_t>::value) return float(int32_t(dword << (24 - 8 * which)) >> 24);
    const typename std::conditional<sizeof(T) == 1, uint8_t, uint16_t>::type bits = dword >> (8 * sizeof(T) * which);
    memcpy(&number, &bits, sizeof(number));
    return to_float(number);
  }

  // The scales, or zero points, of groups [first, first + count), in fp32: out[group - first][row]. Written one by one, across rows, the
  // scales took a quarter of a product with one token.
  template <class T>
  void widen(const T* plane, int64_t stride, const Rows& r, int64_t first, int64_t count, float* out) const {
    constexpr int EACH = 4 / sizeof(T);  // numbers a dword
    const uint8_t* at[R];
    for (int j = 0; j < R; ++j) at[j] = reinterpret_cast<const uint8_t*>(plane + (r.n0 + (j < r.valid ? j : r.valid - 1)) * stride + first);
    const int64_t whole = count / EACH;
    for (int64_t d = 0; d < whole; d += L) {
      const int dwords = whole - d < L ? int(whole - d) : L;
      for (int v = 0; v < V; ++v) {
        D columns[L];
        I::transpose(at + v * L, d * 4, dwords, columns);
        for (int j = 0; j < dwords; ++j) {
          uint32_t dword[L];
          memcpy(dword, &columns[j], sizeof(dword));
          for (int e = 0; e < EACH; ++e) {
            float* to = out + ((d + j) * EACH + e) * R + v * L;
            for (int l = 0; l < L; ++l) to[l] = number_in<T>(dword[l], e);
          }
        }
      }
    }
    for (int64_t g = whole * EACH; g < count; ++g) {  // those that fill no dword
      for (int j = 0; j < R; ++j) {
        T last;
        memcpy(&last, at[j] + g * sizeof(T), sizeof(T));
        out[g * R + j] = to_float(last);
      }
    }
  }

  template <class T>
  void widen_scales(const Rows& r, int64_t first, int64_t count, float* out) const {
    widen(static_cast<const T*>(a.scale) + r.expert * a.scale_expert_stride, a.scale_stride, r, first, count, out);
  }

  void widen_scales(const Rows& r, int64_t first, int64_t count, float* out) const {
    switch (a.scale_dtype) {
      case RTN_FLOAT32: return widen_scales<float>(r, first, count, out);
      case RTN_BFLOAT16: return widen_scales<bf16>(r, first, count, out);
      case RTN_SCALE8: return widen_scales<scale8>(r, first, count, out);
      default: return widen_scales<fp16>(r, first, count, out);
    }
  }

  // Memory for the scales of `count` groups of a block of rows, and after them for their zero points, where there are any.
  float* scales_for(int64_t count) const { return static_cast<float*>(scratch(SCALES, R * count * (a.zero ? 2 : 1) * sizeof(float))); }

  // ------------------------------------------------------------------------------------------------ zero points

  // Zero points of groups [first, first + count): out[group - first][row].
  void widen_zeros(const Rows& r, int64_t first, int64_t count, float* out) const {
    widen(a.zero + r.expert * a.zero_expert_stride, a.zero_stride, r, first, count, out);
  }

  // What zero points stand for, S zero.
  static void times_scales(float* zeros, const float* scales, int64_t count) {
    for (int64_t i = 0; i < count * R; ++i) zeros[i] *= scales[i];
  }

  // sums[token][v] -= (S zero) . (the sums of x) over groups [begin, begin + count) of a tile; `zeros` begin with the first of them.
  void shift(const Tile& tile, int64_t begin, int64_t count, const float* zeros, float* sums) const {
    const float* x = minus_sums + tile.row * groups + begin * tile.tokens;
    int64_t t = 0;
    for (; t + 4 <= tile.tokens; t += 4) shift_tokens<4>(x + t, tile.tokens, count, zeros, sums + t * R);
    for (; t < tile.tokens; ++t) shift_tokens<1>(x + t, tile.tokens, count, zeros, sums + t * R);
  }

  template <int T>
  static void shift_tokens(const float* x, int64_t x_stride, int64_t count, const float* zeros, float* sums) {
    F sum[T][V];
    RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = I::load(sums + t * R + v * L);
    for (; count; --count, zeros += R, x += x_stride) {
      RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = I::fma(I::load(zeros + v * L), I::all(x[t]), sum[t][v]);
    }
    RTN_UNROLL for (int t = 0; t < T; ++t) RTN_UNROLL for (int v = 0; v < V; ++v) I::store(sums + t * R + v * L, sum[t][v]);
  }

  void transpose(const Rows& r, int64_t chunk, D (&dwords)[V][L]) const {
    const int64_t left = (chunks - chunk) * 4;
    RTN_UNROLL for (int v = 0; v < V; ++v) I::transpose(r.q + v * L, chunk * 16, left < L ? int(left) : L, dwords[v]);
  }

  // `scales` and `zeros` (null: there are none) begin with those of the first chunk's group.
  template <int BITS>
  void decode_block(const Rows& r, int64_t begin, int64_t end, const float* scales, const float* zeros, W* out) const {
    constexpr int EACH = Product::template per_chunk<BITS>() * V;
    D dwords[V][L];
    int64_t left = group_chunks - begin % group_chunks;  // of the chunk's group
    for (int64_t c = begin; c < end; ++c) {
      const int at = int((c - begin) % CHUNKS_AT_ONCE);
      if (at == 0) transpose(r, c, dwords);
      if constexpr (Product::SCALED) {
        if (left-- == 0) {
          left = group_chunks - 1;
          scales += R;
          if (zeros) zeros += R;
        }
        if (c >= chunks) memset(out, 0, EACH * sizeof(W));  // past the end of the row, where there are no scales
        else
          for (int v = 0; v < V; ++v) Product::template decode<BITS>(dwords[v] + 4 * at, scales + v * L, zeros ? zeros + v * L : nullptr, out + v);
      } else {
        for (int v = 0; v < V; ++v) Product::template decode<BITS>(dwords[v] + 4 * at, out + v);
      }
      out += EACH;
    }
  }

  // The first of the R lines, `pitch` bytes apart, that are to be prefetched during the four chunks from `c` on. Of long rows one line each,
  // further along, or, past the end, at the beginning of the rows of the next block; of short ones a run of memory two blocks on.
  const uint8_t* ahead(const Rows& r, int64_t c) const {
    if (chunks < AHEAD) return r.q[0] + 2 * R * a.qdata_stride + c * (16 * R);
    return r.q[0] + (c + AHEAD < chunks ? (c + AHEAD) * 16 : R * a.qdata_stride + (c + AHEAD - chunks) * 16);
  }

  // Rows one beside the other are too many streams for the hardware to follow, and share too few sets of L1: so lines to come are brought to
  // L2 meanwhile, a few with every dword, as the arithmetic would otherwise wait for them in one go. At M = 1 it doubles the speed. To take
  // them from the same rows is 1.1 to 1.3 times as fast as from one run of memory two blocks on; 32 or 128 chunks ahead cost up to 5 %.
  static void prefetch(const uint8_t* lines, int q, int64_t pitch) {
    RTN_UNROLL for (int j = 0; j < 4 * R; j += 64) __builtin_prefetch(lines + (4 * R * q + j) / 64 * pitch, 0, 2);
  }

  // What a tile whose weights are decoded brings to L2 of those that will be decoded next: of rows [first, last) what lies `offset` bytes on.
  // Brought while they were decoded, they were waited for: with 16 tokens a quarter of the time.
  struct Next {
    int64_t offset;
    int first, last;

    // A part, of the chunk `c` of a step that begins with `begin`: a line of every fourth row, which covers four chunks.
    void prefetch(const Rows& r, int64_t begin, int64_t c) const {
      const int64_t line = offset + (c - begin) / 4 * 64;
      for (int j = first + int((c - begin) % 4); j < last; j += 4) __builtin_prefetch(r.q[j] + line, 0, 2);
    }
  };

  using TileFn = void (*)(const Linear&, const Rows&, const W*, const float*, int64_t, int64_t, const X*, float*, const Next&);

  template <int BITS, bool DECODED, int... t>
  static TileFn pick(int64_t tokens, ints<t...>) {
    static constexpr TileFn table[] = {Product::template tile<t + 1, BITS, DECODED, Linear>...};
    return table[tokens - 1];
  }

  // ------------------------------------------------------------------------------------------------ blocks

  template <class T>
  void store(const Rows& r, int64_t row, int64_t tokens, const float* sums) const {
    T* y = static_cast<T*>(a.y) + r.n0;
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + r.n0 : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
      T* to = y + (row + t) * a.y_stride;
      const float* from = sums + t * R;
      for (int64_t j = 0; j < r.valid; ++j) to[j] = from_float<T>(bias ? from[j] + to_float(bias[j]) : from[j]);
    }
  }

  void store(const Rows& r, int64_t row, int64_t tokens, const float* sums) const {
    switch (a.dtype) {
      case RTN_FLOAT32: return store<float>(r, row, tokens, sums);
      case RTN_BFLOAT16: return store<bf16>(r, row, tokens, sums);
      default: return store<fp16>(r, row, tokens, sums);
    }
  }

  // One tile: each weight is used once, as it is decoded.
  template <int BITS>
  bool few(const Tile& t, int64_t row_block) {
    const Rows r = rows_of(t.expert, row_block);
    float* scales = scales_for(groups);
    if (!scales) return false;
    alignas(64) float sums[C * R];
    memset(sums, 0, t.tokens * R * sizeof(float));
    widen_scales(r, 0, groups, scales);
    if (a.zero) {
      float* zeros = scales + groups * R;
      widen_zeros(r, 0, groups, zeros);
      times_scales(zeros, scales, groups);
      shift(t, 0, groups, zeros, sums);
    }
    pick<BITS, false>(t.tokens, make_ints<C>())(*this, r, nullptr, scales, 0, chunks, packed + t.row * x_pieces(), sums, Next{});
    store(r, t.row, t.tokens, sums);
    return true;
  }

  // Tiles [first, last) of one expert, over blocks of rows [begin, end): a step along K of all of them, as the tokens' part of it stays in L2.
  template <int BITS>
  bool many(int64_t first, int64_t last, int64_t begin, int64_t end) {
    constexpr int64_t STEP = Product::K_BLOCK * BITS / 128;
    const int64_t row = tile_list[first].row, tokens = tile_list[last - 1].row + tile_list[last - 1].tokens - row;
    float* scales = scales_for(STEP / group_chunks + 2);
    float* sums = static_cast<float*>(scratch(SUMS, (end - begin) * tokens * R * sizeof(float)));
    W* decoded = static_cast<W*>(scratch(WEIGHTS, STEP * Product::template per_chunk<BITS>() * V * sizeof(W)));
    if (!scales || !sums || !decoded) return false;
    if (!Product::SCALED || !chunks) memset(sums, 0, (end - begin) * tokens * R * sizeof(float));
    for (int64_t c = 0; c < chunks; c += STEP) {
      const int64_t stop = c + STEP < chunks ? c + STEP : chunks, group = c / group_chunks;
      for (int64_t b = begin; b < end; ++b) {
        const Rows r = rows_of(tile_list[first].expert, b);
        // What is decoded next: the rows below, or the first rows further on; at the last, the rows below again.
        const int64_t below = R * a.qdata_stride;
        const int64_t next = b + 1 < end ? below + c * 16 : stop < chunks ? stop * 16 - (b - begin) * below : below;
        constexpr int TOGETHER = Product::template chunks_together<BITS>();
        const int64_t count = (stop - 1) / group_chunks + 1 - group;
        widen_scales(r, group, count, scales);
        float* zeros = a.zero ? scales + count * R : nullptr;
        if (zeros) widen_zeros(r, group, count, zeros);
        decode_block<BITS>(r, c, (stop + TOGETHER - 1) / TOGETHER * TOGETHER, scales, zeros, decoded);
        float* to = sums + (b - begin) * tokens * R;
        if (zeros && !Product::SCALED) {
          times_scales(zeros, scales, count);
          const int64_t begun = c > group * group_chunks;  // in the step before, which had its part for the whole of it
          for (int64_t t = first; t < last; ++t) shift(tile_list[t], group + begun, count - begun, zeros + begun * R, to + (tile_list[t].row - row) * R);
        }
        for (int64_t t = first; t < last; ++t) {
          const Tile& tile = tile_list[t];
          const Next part = {next, int(R * (t - first) / (last - first)), int(R * (t - first + 1) / (last - first))};
          pick<BITS, true>(tile.tokens, make_ints<C>())(*this, r, decoded, scales, c, stop, packed + tile.row * x_pieces(), to + (tile.row - row) * R, part);
        }
      }
    }
    for (int64_t b = begin; b < end; ++b) store(rows_of(tile_list[first].expert, b), row, tokens, sums + (b - begin) * tokens * R);
    return true;
  }

  struct Run {
    int64_t first, last;  // tiles of one expert, M_BLOCK tokens at most
  };
  Run* run_list = nullptr;

  // Blocks of rows that a thread takes at once: neighbours, so that what it prefetches is its own.
  int64_t at_once = 1;

  template <int BITS>
  void run_blocks(const Run& run, int64_t begin, int64_t end) {
    bool done = true;
    [[maybe_unused]] const typename Product::Session session;
    if (Product::ALWAYS_DECODED || run.last - run.first > 1) done = many<BITS>(run.first, run.last, begin, end);
    else if constexpr (!Product::ALWAYS_DECODED)
      for (int64_t b = begin; b < end; ++b) done &= few<BITS>(tile_list[run.first], b);
    if (!done) failed = true;
  }

  static void run_turn(void* self, int64_t i) {
    Linear& l = *static_cast<Linear*>(self);
    const int64_t turns = (l.row_blocks + l.at_once - 1) / l.at_once, begin = i % turns * l.at_once;
    const int64_t end = begin + l.at_once < l.row_blocks ? begin + l.at_once : l.row_blocks;
    const Run& run = l.run_list[i / turns];
    if (l.a.bits == 4) l.template run_blocks<4>(run, begin, end);
    else l.template run_blocks<8>(run, begin, end);
  }

  int operator()() {
    if (a.m == 0 || a.n == 0) return 0;
    const int64_t experts = a.offs ? a.experts : 1;
    // At most one tile and one run more than full ones would need, an expert.
    const int64_t most = a.m / I::MANY + experts + a.m / M_BLOCK + 1;
    const int64_t x_bytes = (a.m * x_pieces() * int64_t(sizeof(X)) + 63) / 64 * 64;
    const int64_t sum_bytes = a.zero && !Product::SCALED ? a.m * groups * int64_t(sizeof(float)) : 0;
    char* memory = static_cast<char*>(scratch(PACKED_X, x_bytes + (most + 1) * (sizeof(Tile) + sizeof(Run)) + sum_bytes));
    if (!memory) return RTN_NO_MEMORY;
    packed = reinterpret_cast<X*>(memory);
    tile_list = reinterpret_cast<Tile*>(memory + x_bytes);
    run_list = reinterpret_cast<Run*>(tile_list + most + 1);
    if (sum_bytes) minus_sums = reinterpret_cast<float*>(run_list + most + 1);
    int64_t runs = 0;
    int64_t row = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t end = !a.offs ? a.m : a.offs[e] < a.m ? a.offs[e] : a.m;
      while (row < end) {
        const int64_t size = end - row < M_BLOCK ? end - row : M_BLOCK;
        const int64_t width = size > C ? I::MANY : C, count = (size + width - 1) / width, tokens = (size + count - 1) / count;
        run_list[runs].first = tiles;
        for (int64_t done = 0; done < size; done += tokens) tile_list[tiles++] = {row + done, size - done < tokens ? size - done : tokens, e};
        run_list[runs++].last = tiles;
        row += size;
      }
    }
    parallel_for(a.m * a.k < 32768 ? 1 : a.threads, tiles, pack_tile, this);
    // Turns of BLOCKS or fewer, such that every thread gets as many.
    const int64_t turns = a.threads * ((row_blocks + Product::BLOCKS * a.threads - 1) / (Product::BLOCKS * a.threads));
    at_once = (row_blocks + turns - 1) / turns;
    parallel_for(a.threads, runs * ((row_blocks + at_once - 1) / at_once), run_turn, this);
    const int64_t size = a.dtype == RTN_FLOAT32 ? 4 : 2;
    for (; row < a.m; ++row) memset(static_cast<char*>(a.y) + row * a.y_stride * size, 0, a.n * size);  // of no expert
    shrink(PACKED_X);  // alone of all slots it grows with the tokens: 136 MB of [16384, 4096]
    return failed ? RTN_NO_MEMORY : RTN_OK;
  }
};

}  // namespace
}  // namespace rtn
