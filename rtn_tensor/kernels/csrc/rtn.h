// The C interface of the CPU library, and what its parts share. No torch or Python headers: one binary serves every version of both.
#pragma once
#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum { RTN_FLOAT32 = 0, RTN_BFLOAT16 = 1, RTN_FLOAT16 = 2, RTN_SCALE8 = 3 };  // the last of scales only: the bits of float8_e4m3fn, times 2^-7
enum { RTN_OK = 0, RTN_NO_MEMORY = -1, RTN_REFUSED = -2 };  // the last: the arguments do not fit one another, and nothing was read or written

// Of the two structs below and of what the functions do. A caller compares it, as a library may be older or newer than what calls it: raise it
// with every change, here and in kernels/cpu.py.
enum { RTN_ABI = 8 };

// y[rows of expert e] = x[rows of expert e] @ w'[e]^T + bias, w' = (q - zero) * S. Strides count elements; the last dim of every array is dense.
// Every field is 8 bytes, so that the caller can pack them without padding.
typedef struct {
  const void* x;         // [M, K]
  const uint8_t* qdata;  // [E, N, 16 * ceil(K * bits / 128)], in the order of rtn_tensor/formats.py
  const void* scale;     // [E, N, ceil(K / group_size)], or [E, N, 1] where group_size is -1
  const void* bias;      // [N] in x's dtype, or null
  void* y;               // [M, N] in x's dtype
  const int32_t* offs;   // [E] cumulative ends of each expert's rows; null means one expert that has them all
  const int8_t* zero;    // as scale; null means 0 everywhere
  int64_t m, n, k, experts;
  int64_t bits, group_size;
  int64_t int8_x;  // 1: x is rounded to int8 first, as reference.rounded_to_int8 does; 0: it is not
  int64_t dtype, scale_dtype;
  int64_t x_stride, y_stride;
  int64_t qdata_stride, qdata_expert_stride;
  int64_t scale_stride, scale_expert_stride;
  int64_t zero_stride, zero_expert_stride;
  int64_t threads;
  // How large the arrays are, whatever the numbers above say: the sizes of qdata, scale and zero, and the elements of bias and offs.
  int64_t qdata_experts, qdata_rows, qdata_bytes;
  int64_t scale_experts, scale_rows, scale_groups;
  int64_t zero_experts, zero_rows, zero_groups;
  int64_t bias_size, offs_size;
} rtn_linear_args;

// w [rows, K] <-> qdata, scale and, unless it is null, zero, bit for bit as rtn_tensor/reference.py.
typedef struct {
  void* w;
  uint8_t* qdata;
  void* scale;
  int8_t* zero;
  const int64_t* indices;  // dequantize: row of the planes for each row of w, or null
  int64_t rows, k;
  int64_t bits, group_size;
  int64_t dtype, scale_dtype;
  int64_t w_stride, qdata_stride, scale_stride, zero_stride;
  int64_t scale_method;  // quantize: its index in config.SCALE_METHODS
  int64_t threads;
  int64_t qdata_rows, qdata_bytes, scale_rows, scale_groups, zero_rows, zero_groups;  // how large the planes are
} rtn_planes_args;

int64_t rtn_abi(void);                    // RTN_ABI
const char* rtn_isa(void);                // the instruction set in use
int rtn_set_isa(const char* name);        // forces one; 0, or -1 where this build or machine lacks it
int rtn_has_threads(void);                // whether the process's OpenMP runtime was found
// Whether rtn_linear rounds (q - zero) S, and activations of int8, to the dtype of x first; where not, it keeps integers exact and scales fp32
// sums.
int rtn_rounds_weight(int64_t m, int64_t experts, int64_t group_size, int64_t dtype, int64_t int8_x);
int rtn_linear(const rtn_linear_args*);   // each returns RTN_OK, RTN_NO_MEMORY or RTN_REFUSED
int rtn_quantize(const rtn_planes_args*);
int rtn_dequantize(const rtn_planes_args*);
int rtn_register(void);                   // gives torch's dispatcher rtn::linear on CPU tensors; 0, or -1 where this torch cannot take it
int rtn_define(void);                     // the same, and the op itself, in a process that has no Python package
void rtn_direct(int on);                  // whether what was registered runs rtn_linear, or hands every call to rtn_python::linear

#pragma GCC visibility pop
#ifdef __cplusplus
}

namespace rtn {

struct Isa {
  const char* name;
  bool (*available)();
  int (*linear)(const rtn_linear_args&);
  int (*quantize)(const rtn_planes_args&);
  int (*dequantize)(const rtn_planes_args&);
  bool (*rounds_weight)(int64_t m, int64_t experts, int64_t group_size, int64_t dtype, int64_t int8_x) = nullptr;  // null: never
};

// Runs fn(context, i) for i in [0, n) on at most `threads` threads, each of them taking neighbours in turn.
void parallel_for(int64_t threads, int64_t n, void (*fn)(void*, int64_t), void* context);

// 64-byte aligned memory of the calling thread, kept from call to call; null where there is none. Slots do not overlap.
enum Slot { PACKED_X, SCALES, WEIGHTS, SUMS, SLOTS };
void* scratch(Slot slot, int64_t bytes);

// Gives back what the calling thread has in a slot, where it is too much to keep.
void shrink(Slot slot);

}  // namespace rtn
#endif
