// Chooses the instruction set, once, by what the processor has; and refuses arguments by which a kernel would leave its arrays.
#include "rtn.h"

#include <string.h>

#include <atomic>

namespace rtn {

extern const Isa amx, avx512bf16, avx512vnni, avx512, avxvnni, avx2, neoni8mm, neonbf16, neondot, generic;

namespace {
// Fastest first; the last runs anywhere.
const Isa* const ISAS[] = {
#ifdef __x86_64__
    &amx, &avx512bf16, &avx512vnni, &avx512, &avxvnni, &avx2,
#elif defined(__aarch64__) && defined(__linux__)
    &neoni8mm, &neonbf16, &neondot,
#endif
    &generic};

const Isa* fastest() {
  for (const Isa* isa : ISAS)
    if (isa->available()) return isa;
  return nullptr;
}

std::atomic<const Isa*> chosen{fastest()};

// So large that it never occurs, and so small that sums and products of a few of them do not overflow.
constexpr int64_t LIMIT = int64_t(1) << 56, GROUP_LIMIT = int64_t(1) << 30;

bool in(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

bool is_dtype(int64_t dtype) { return in(dtype, RTN_FLOAT32, RTN_FLOAT16); }
bool is_scale_dtype(int64_t dtype) { return in(dtype, RTN_FLOAT32, RTN_SCALE8); }

// Whether a row of a weight of k columns has so many bytes and scales.
bool row_fits(int64_t k, int64_t bits, int64_t group_size, int64_t bytes, int64_t groups) {
  if (!in(k, 0, LIMIT) || (bits != 4 && bits != 8)) return false;
  if (group_size != -1 && (!in(group_size, 32, GROUP_LIMIT) || group_size % 32)) return false;
  return bytes == (k * bits + 127) / 128 * 16 && groups == (group_size == -1 ? 1 : (k + group_size - 1) / group_size);
}

bool fits(const rtn_linear_args& a) {
  const int64_t experts = a.offs ? a.experts : 1;
  if (!in(a.m, 0, LIMIT) || !in(a.n, 0, LIMIT) || !in(experts, 0, LIMIT) || a.threads < 1 || !in(a.int8_x, 0, 1)) return false;
  if (!is_dtype(a.dtype) || !is_scale_dtype(a.scale_dtype)) return false;
  if (!row_fits(a.k, a.bits, a.group_size, a.qdata_bytes, a.scale_groups)) return false;
  if (a.qdata_rows != a.n || a.scale_rows != a.n || a.bias_size != (a.bias ? a.n : 0)) return false;
  if (a.zero ? a.zero_experts != experts || a.zero_rows != a.n || a.zero_groups != a.scale_groups : a.zero_experts || a.zero_rows || a.zero_groups) return false;
  if (a.zero_stride < 0 || a.zero_expert_stride < 0) return false;
  if (a.qdata_experts != experts || a.scale_experts != experts || a.offs_size != (a.offs ? experts : 0)) return false;
  if (a.x_stride < 0 || a.y_stride < a.n || a.qdata_stride < 0 || a.scale_stride < 0 || a.qdata_expert_stride < 0 || a.scale_expert_stride < 0) return false;
  if (a.m && a.n && !a.y) return false;
  return !a.m || !a.n || !a.k || !experts || (a.x && a.qdata && a.scale);
}

bool fits(const rtn_planes_args& a) {
  if (!in(a.rows, 0, LIMIT) || !in(a.scale_method, 0, 3) || a.threads < 1 || !is_dtype(a.dtype) || !is_scale_dtype(a.scale_dtype)) return false;
  if (!row_fits(a.k, a.bits, a.group_size, a.qdata_bytes, a.scale_groups) || a.qdata_rows != a.scale_rows) return false;
  if (a.zero ? a.zero_rows != a.scale_rows || a.zero_groups != a.scale_groups : a.zero_rows || a.zero_groups) return false;
  if (a.w_stride < 0 || a.qdata_stride < 0 || a.scale_stride < 0 || a.zero_stride < 0) return false;
  if (a.rows && ((a.k && (!a.w || !a.qdata)) || (a.scale_groups && !a.scale))) return false;
  if (!a.indices) return a.rows == a.qdata_rows;
  for (int64_t i = 0; i < a.rows; ++i)
    if (!in(a.indices[i], 0, a.qdata_rows - 1)) return false;
  return true;
}
}  // namespace
}  // namespace rtn

extern "C" {
const char* rtn_isa(void) { return rtn::chosen.load()->name; }

int rtn_set_isa(const char* name) {
  for (const rtn::Isa* isa : rtn::ISAS) {
    if (strcmp(isa->name, name) == 0 && isa->available()) {
      rtn::chosen = isa;
      return 0;
    }
  }
  return -1;
}

int64_t rtn_abi(void) { return RTN_ABI; }
int rtn_rounds_weight(int64_t m, int64_t experts, int64_t group_size, int64_t dtype, int64_t int8_x) {
  const rtn::Isa& isa = *rtn::chosen.load();
  return isa.rounds_weight && isa.rounds_weight(m, experts, group_size, dtype, int8_x);
}
int rtn_linear(const rtn_linear_args* a) {
  if (!rtn::fits(*a)) return RTN_REFUSED;
  // More activations than any memory holds: what is packed of them could not be counted.
  return a->k && a->m > rtn::LIMIT / (a->k + 128) ? RTN_NO_MEMORY : rtn::chosen.load()->linear(*a);
}
int rtn_quantize(const rtn_planes_args* a) {
  const bool makes_zero = a->scale_method == 3 && a->rows && a->scale_groups;  // as config.SCALE_METHODS has "minmax"
  if (!rtn::fits(*a) || a->indices || (makes_zero && !a->zero) || (a->scale_method != 3 && a->zero)) return RTN_REFUSED;
  return rtn::chosen.load()->quantize(*a);
}
int rtn_dequantize(const rtn_planes_args* a) { return rtn::fits(*a) ? rtn::chosen.load()->dequantize(*a) : RTN_REFUSED; }
}
