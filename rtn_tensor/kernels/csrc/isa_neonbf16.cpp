#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "linear.h"
#include "neon.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() { return (getauxval(AT_HWCAP2) & HWCAP2_BF16) && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP); }

// fp16 and fp32 activations have more digits than bf16.
int linear(const rtn_linear_args& a) {
  if (a.int8_x) return Linear<NeonDot, Int8Product>(a)();
  return a.dtype == RTN_BFLOAT16 ? Linear<NeonBf16, FloatProduct>(a)() : Linear<Generic, FloatProduct>(a)();
}
}  // namespace

extern const Isa neonbf16 = {"neonbf16", available, linear, quantize, dequantize};
}  // namespace rtn
