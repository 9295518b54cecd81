#include <sys/syscall.h>
#include <unistd.h>

#include "linear.h"
#include "amx.h"
#include "planes.h"

namespace rtn {
extern const Isa avx512bf16;

namespace {
bool available() {
  // Linux lets a process use the tile registers only once it has asked; their state takes 8 KiB a thread.
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && avx512bf16.available() &&
         !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
}

// From so many tokens per expert on, scaling each group's sums takes longer than scaling and rounding its weights: 12 to 16 of groups of 32, 40 to
// 48 of larger ones; and of int8 activations 32, whose sums AVX-512 VNNI scales. Counts up to a power of two are alike, so that a caller may round
// one up.
bool rounds_weight(int64_t m, int64_t experts, int64_t group_size, int64_t dtype, int64_t int8_x) {
  int64_t up = 1;
  while (up < m) up *= 2;
  return dtype == RTN_BFLOAT16 && up > (group_size == 32 && !int8_x ? 16 : 32) * experts;
}

int linear(const rtn_linear_args& a) {
  const int64_t experts = a.offs ? a.experts : 1;
  if (rounds_weight(a.m, experts, a.group_size, a.dtype, a.int8_x)) return Linear<Amx, AmxScaled>(a)();
  if (a.int8_x || a.dtype != RTN_BFLOAT16 || a.m < 3 * experts) return avx512bf16.linear(a);
  return Linear<Amx, AmxProduct>(a)();
}
}  // namespace

extern const Isa amx = {"amx", available, linear, quantize, dequantize, rounds_weight};
}  // namespace rtn
