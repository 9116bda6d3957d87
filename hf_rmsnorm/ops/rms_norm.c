/* RMSNorm and pRMSNorm on the CPU, with an optional residual add; the formulas are in reference.py.
 *
 * rms_norm_rows.h is the code, included once per pair of dtypes (of x, and of y and dy). Sums run
 * over vectors in an order that depends on the sizes alone, never on the number of threads. */

#if defined(__linux__)
#define _DEFAULT_SOURCE
#include <errno.h>
#include <sys/mman.h>
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))

/* Outputs of STREAM_BYTES are in no cache when they are read next. Writing them past the caches
 * spares reading the lines that are overwritten. Below, the next reader would miss them.
 *
 * From MAPPED_BYTES on, glibc has the system map memory for every tensor anew, and the page faults
 * take longer than the norm. Huge pages make them few; fresh pages are in the caches as it is. */
#define STREAM_BYTES (8 << 20)
#define MAPPED_BYTES (32 << 20)

#if defined(__SSE2__)
#include <immintrin.h>
INLINE void stream(void *to, const void *from, size_t bytes) {
#if BYTES == 64
  if (bytes == 64) {
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
    return;
  }
#endif
#if BYTES >= 32
  if (bytes == 32) {
    _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
    return;
  }
#endif
  if (bytes == 16)
    _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
  else
    memcpy(to, from, bytes);
}
#define END_STREAM() _mm_sfence()
#else
INLINE void stream(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
#define END_STREAM() ((void)0)
#endif
INLINE void put_bytes(void *to, const void *from, size_t bytes, int past_caches) {
  if (past_caches)
    stream(to, from, bytes);
  else
    memcpy(to, from, bytes);
}
/* Readies memory for an output; whether to write it past the caches. */
INLINE int prepare(void *p, size_t row_bytes, ptrdiff_t rows) {
  const size_t bytes = row_bytes * rows;
  if (bytes < MAPPED_BYTES)
    return bytes >= STREAM_BYTES && ((uintptr_t)p | row_bytes) % BYTES == 0;
#ifdef MADV_HUGEPAGE
  const uintptr_t huge = 2 << 20, start = ((uintptr_t)p + huge - 1) & ~(huge - 1);
  const int error = errno;
  madvise((void *)start, (((uintptr_t)p + bytes) & ~(huge - 1)) - start, MADV_HUGEPAGE);
  errno = error; /* a system without them goes on with small pages */
#endif
  return 0;
}

typedef float vec_f32 __attribute__((vector_size(BYTES)));
typedef double vec_f64 __attribute__((vector_size(BYTES)));
typedef uint32_t vec_u32 __attribute__((vector_size(BYTES)));
typedef uint16_t vec_u16 __attribute__((vector_size(BYTES / 2)));
typedef uint16_t bf16;

INLINE vec_f32 load_f32(const float *p) {
  vec_f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_f32(float *p, vec_f32 v) { memcpy(p, &v, sizeof v); }

INLINE vec_f64 load_f64(const double *p) {
  vec_f64 v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_f64(double *p, vec_f64 v) { memcpy(p, &v, sizeof v); }

INLINE vec_f32 load_bf16(const bf16 *p) {
  vec_u16 u;
  memcpy(&u, p, sizeof u);
  return (vec_f32)(__builtin_convertvector(u, vec_u32) << 16);
}
INLINE void store_bf16(bf16 *p, vec_f32 v) {
  vec_u32 u = (vec_u32)v;
  vec_u32 nearest_even = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  vec_u32 is_nan = (vec_u32)(v != v);
  vec_u16 out = __builtin_convertvector((nearest_even & ~is_nan) | (0x7FC0 & is_nan), vec_u16);
  memcpy(p, &out, sizeof out);
}

#define PASTE3(a, b, c) a##b##_##c
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define PASTE(a, b, c) PASTE3(a, b, c)

#define C float
#define VEC vec_f32
#define SQRT sqrtf

#define T float
#define T_NAME f32
#define OUT float
#define OUT_NAME f32
#include "rms_norm_rows.h"

#define T float
#define T_NAME f32
#define OUT bf16
#define OUT_NAME bf16
#include "rms_norm_rows.h"

#define T bf16
#define T_NAME bf16
#define OUT bf16
#define OUT_NAME bf16
#define ROUNDS 1
#include "rms_norm_rows.h"

#define T bf16
#define T_NAME bf16
#define OUT float
#define OUT_NAME f32
#define ROUNDS 1
#include "rms_norm_rows.h"

#if defined(__F16C__)
#define HAS_F16
typedef uint16_t f16;
#if BYTES == 64
INLINE vec_f32 load_f16(const f16 *p) {
  return (vec_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void store_f16(f16 *p, vec_f32 v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE vec_f32 load_f16(const f16 *p) {
  return (vec_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE void store_f16(f16 *p, vec_f32 v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#elif defined(__FLT16_MAX__)
#define HAS_F16
typedef _Float16 f16;
typedef f16 vec_f16 __attribute__((vector_size(BYTES / 2)));
INLINE vec_f32 load_f16(const f16 *p) {
  vec_f16 h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vec_f32);
}
INLINE void store_f16(f16 *p, vec_f32 v) {
  vec_f16 h = __builtin_convertvector(v, vec_f16);
  memcpy(p, &h, sizeof h);
}
#endif

#ifdef HAS_F16
#define T float
#define T_NAME f32
#define OUT f16
#define OUT_NAME f16
#include "rms_norm_rows.h"

#define T f16
#define T_NAME f16
#define OUT f16
#define OUT_NAME f16
#define ROUNDS 1
#include "rms_norm_rows.h"

#define T f16
#define T_NAME f16
#define OUT float
#define OUT_NAME f32
#define ROUNDS 1
#include "rms_norm_rows.h"
#endif

#undef C
#undef VEC
#undef SQRT
#define C double
#define VEC vec_f64
#define SQRT sqrt

#define T double
#define T_NAME f64
#define OUT double
#define OUT_NAME f64
#include "rms_norm_rows.h"
