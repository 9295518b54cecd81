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

int linear(const rtn_linear_args& a) {
  // Activations in pieces of 32 with a scale each would leave most of the time to scaling.
  if (a.int8_x || a.dtype != RTN_BFLOAT16 || a.m < 3 * (a.offs ? a.experts : 1)) return avx512bf16.linear(a);
  return Linear<Amx, AmxProduct>(a)();
}
}  // namespace

extern const Isa amx = {"amx", available, linear, quantize, dequantize};
}  // namespace rtn
