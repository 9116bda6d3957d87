/* Forward and backward for x of dtype T, and y and dy of dtype OUT, computed in C (VEC at a time).
 * ROUNDS is defined where T is narrower than C. Included by rms_norm.c, which explains the rest. */

#define LANES ((ptrdiff_t)(sizeof(VEC) / sizeof(C)))
#define FN(name) PASTE(name, T_NAME, OUT_NAME)
#define LOAD_T JOIN(load_, T_NAME)
#define STORE_T JOIN(store_, T_NAME)
#define LOAD_OUT JOIN(load_, OUT_NAME)
#define STORE_OUT JOIN(store_, OUT_NAME)

/* The first `n` lanes; the others read as zero and are not written. n is a constant but at the end
 * of a row, so that inlining leaves plain vector loads and stores. */
INLINE VEC FN(get_)(const T *p, ptrdiff_t n) {
  if (n >= LANES) return LOAD_T(p);
  T part[sizeof(VEC) / sizeof(C)] = {0};
  memcpy(part, p, n * sizeof(T));
  return LOAD_T(part);
}
INLINE void FN(put_)(T *p, VEC v, ptrdiff_t n, int past_caches) {
  T part[sizeof(VEC) / sizeof(C)];
  STORE_T(part, v);
  if (n >= LANES)
    put_bytes(p, part, sizeof part, past_caches);
  else
    memcpy(p, part, n * sizeof(T));
}
INLINE VEC FN(get_out_)(const OUT *p, ptrdiff_t n) {
  if (n >= LANES) return LOAD_OUT(p);
  OUT part[sizeof(VEC) / sizeof(C)] = {0};
  memcpy(part, p, n * sizeof(OUT));
  return LOAD_OUT(part);
}
INLINE void FN(put_out_)(OUT *p, VEC v, ptrdiff_t n, int past_caches) {
  OUT part[sizeof(VEC) / sizeof(C)];
  STORE_OUT(part, v);
  if (n >= LANES)
    put_bytes(p, part, sizeof part, past_caches);
  else
    memcpy(p, part, n * sizeof(OUT));
}
INLINE VEC FN(get_c_)(const C *p, ptrdiff_t n) {
  VEC v = {0};
  if (n >= LANES)
    memcpy(&v, p, sizeof v);
  else
    memcpy(&v, p, n * sizeof(C));
  return v;
}
INLINE void FN(put_c_)(C *p, VEC v, ptrdiff_t n) {
  if (n >= LANES)
    memcpy(p, &v, sizeof v);
  else
    memcpy(p, &v, n * sizeof(C));
}

/* For weights and biases. */
void FN(widen_)(const T *from, C *to, ptrdiff_t n) {
  ptrdiff_t j = 0;
  for (; j + LANES <= n; j += LANES) FN(put_c_)(to + j, FN(get_)(from + j, LANES), LANES);
  if (j < n) FN(put_c_)(to + j, FN(get_)(from + j, n - j), n - j);
}

INLINE VEC FN(rounded_)(VEC v) {
#ifdef ROUNDS
  T narrow[sizeof(VEC) / sizeof(C)];
  STORE_T(narrow, v);
  v = LOAD_T(narrow);
#endif
  return v;
}

INLINE C FN(total_)(VEC a, VEC b, VEC c, VEC d) {
  VEC v = (a + b) + (c + d);
  C sum = 0;
  for (ptrdiff_t i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

INLINE C FN(sum_of_squares_)(const T *x, ptrdiff_t n) {
  VEC a = {0}, b = {0}, c = {0}, d = {0};
  ptrdiff_t j = 0;
  for (; j + 4 * LANES <= n; j += 4 * LANES) {
    VEC xa = LOAD_T(x + j), xb = LOAD_T(x + j + LANES);
    VEC xc = LOAD_T(x + j + 2 * LANES), xd = LOAD_T(x + j + 3 * LANES);
    a += xa * xa;
    b += xb * xb;
    c += xc * xc;
    d += xd * xd;
  }
  for (; j + LANES <= n; j += LANES) {
    VEC xa = LOAD_T(x + j);
    a += xa * xa;
  }
  if (j < n) {
    VEC xa = FN(get_)(x + j, n - j);
    b += xa * xa;
  }
  return FN(total_)(a, b, c, d);
}

INLINE void FN(add_tile_)(const T *x, const T *residual, T *summed, ptrdiff_t j, ptrdiff_t n) {
  FN(put_)(summed + j, FN(get_)(x + j, n) + FN(get_)(residual + j, n), n, 0);
}

INLINE void FN(y_tile_)(const T *x, C rstd, const C *weight, C offset, const C *bias, int llama,
                        OUT *y, ptrdiff_t j, ptrdiff_t n, int past_caches) {
  VEC v = FN(get_)(x + j, n) * rstd;
  if (llama) v = FN(rounded_)(v);
  if (weight) v *= FN(get_c_)(weight + j, n) + offset;
  if (bias) v += FN(get_c_)(bias + j, n);
  FN(put_out_)(y + j, v, n, past_caches);
}

/* Strides are in elements. residual, weight, bias and rstd may be NULL; summed goes with residual. */
void FN(forward_)(const T *x, const T *residual, const C *weight, const C *bias, OUT *y, T *summed,
                  C *rstd, ptrdiff_t rows, ptrdiff_t hidden, ptrdiff_t k, ptrdiff_t x_stride,
                  ptrdiff_t residual_stride, double eps, double offset, int llama, int threads) {
  const int past_caches = prepare(y, hidden * sizeof(OUT), rows);
  if (residual) prepare(summed, hidden * sizeof(T), rows);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (ptrdiff_t i = 0; i < rows; i++) {
    const T *row = x + i * x_stride;
    ptrdiff_t j = 0;
    if (residual) {
      const T *other = residual + i * residual_stride;
      T *sum = summed + i * hidden;
      for (; j + LANES <= hidden; j += LANES) FN(add_tile_)(row, other, sum, j, LANES);
      if (j < hidden) FN(add_tile_)(row, other, sum, j, hidden - j);
      row = sum;
    }
    const C r = 1 / SQRT(FN(sum_of_squares_)(row, k) / (C)k + (C)eps);
    if (rstd) rstd[i] = r;
    OUT *out = y + i * hidden;
#define TILE(n, past_caches) \
  FN(y_tile_)(row, r, weight, offset, bias, llama, out, j, n, past_caches)
    j = 0;
    if (past_caches) {
      for (; j + LANES <= hidden; j += LANES) TILE(LANES, 1);
      END_STREAM();
    }
    for (; j + LANES <= hidden; j += LANES) TILE(LANES, 0);
    if (j < hidden) TILE(hidden - j, 0);
#undef TILE
  }
}

INLINE VEC FN(pull_tile_)(const OUT *dy, const T *x, const C *weight, C offset, ptrdiff_t j,
                          ptrdiff_t n) {
  VEC g = FN(get_out_)(dy + j, n);
  if (weight) g *= FN(get_c_)(weight + j, n) + offset;
  return g * FN(get_)(x + j, n);
}

/* Sum over the row of (offset + weight) * dy * x. */
INLINE C FN(pull_)(const OUT *dy, const T *x, const C *weight, C offset, ptrdiff_t hidden) {
  VEC a = {0}, b = {0}, c = {0}, d = {0};
  ptrdiff_t j = 0;
  for (; j + 4 * LANES <= hidden; j += 4 * LANES) {
    a += FN(pull_tile_)(dy, x, weight, offset, j, LANES);
    b += FN(pull_tile_)(dy, x, weight, offset, j + LANES, LANES);
    c += FN(pull_tile_)(dy, x, weight, offset, j + 2 * LANES, LANES);
    d += FN(pull_tile_)(dy, x, weight, offset, j + 3 * LANES, LANES);
  }
  for (; j + LANES <= hidden; j += LANES) a += FN(pull_tile_)(dy, x, weight, offset, j, LANES);
  if (j < hidden) b += FN(pull_tile_)(dy, x, weight, offset, j, hidden - j);
  return FN(total_)(a, b, c, d);
}

/* `inside` lanes of this tile belong to the statistic. */
INLINE void FN(dx_tile_)(const OUT *dy, const T *ds, const T *x, const C *weight, C offset, C rstd,
                         C pull, int llama, T *dx, C *dw, C *db, ptrdiff_t j, ptrdiff_t n,
                         ptrdiff_t inside, int past_caches) {
  VEC g = FN(get_out_)(dy + j, n);
  const VEC xhat = FN(get_)(x + j, n) * rstd;
  if (db) FN(put_c_)(db + j, FN(get_c_)(db + j, n) + g, n);
  if (dw) {
    const VEC seen = llama ? FN(rounded_)(xhat) : xhat;
    FN(put_c_)(dw + j, FN(get_c_)(dw + j, n) + g * seen, n);
  }
  if (weight) g *= FN(get_c_)(weight + j, n) + offset;
  if (inside >= LANES) {
    g -= xhat * pull;
  } else if (inside > 0) {
    VEC pulled = g - xhat * pull;
    FN(put_c_)((C *)&g, pulled, inside);
  }
  g *= rstd;
  if (ds) g += FN(get_)(ds + j, n);
  FN(put_)(dx + j, g, n, past_caches);
}

INLINE void FN(sum_tile_)(const C *partials, ptrdiff_t blocks, ptrdiff_t hidden, C *out,
                          ptrdiff_t j, ptrdiff_t n) {
  VEC sum = {0};
  for (ptrdiff_t block = 0; block < blocks; block++)
    sum += FN(get_c_)(partials + block * hidden + j, n);
  FN(put_c_)(out + j, sum, n);
}

/* dsummed, weight, dweight and dbias may be NULL. Rows are cut into `blocks` blocks, each with its
 * own row of partial sums; dweight[hidden] and dbias[hidden] are their sums, in order. */
void FN(backward_)(const OUT *dy, const T *dsummed, const T *x, const C *weight, const C *rstd,
                   T *dx, C *dweight, C *dbias, C *dweight_partials, C *dbias_partials,
                   ptrdiff_t rows, ptrdiff_t hidden, ptrdiff_t k, ptrdiff_t dy_stride,
                   ptrdiff_t dsummed_stride, ptrdiff_t x_stride, double offset, int llama,
                   ptrdiff_t blocks, int threads) {
  const int past_caches = prepare(dx, hidden * sizeof(T), rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (ptrdiff_t block = 0; block < blocks; block++) {
      C *dw = dweight ? dweight_partials + block * hidden : NULL;
      C *db = dbias ? dbias_partials + block * hidden : NULL;
      if (dw) memset(dw, 0, hidden * sizeof(C));
      if (db) memset(db, 0, hidden * sizeof(C));
      const ptrdiff_t end = rows * (block + 1) / blocks;
      for (ptrdiff_t i = rows * block / blocks; i < end; i++) {
        const OUT *dy_row = dy + i * dy_stride;
        const T *x_row = x + i * x_stride;
        const T *ds_row = dsummed ? dsummed + i * dsummed_stride : NULL;
        T *dx_row = dx + i * hidden;
        const C r = rstd[i];
        const C pull = FN(pull_)(dy_row, x_row, weight, offset, hidden) * r / (C)k;
#define TILE(n, inside, past_caches)                                                             \
  FN(dx_tile_)(dy_row, ds_row, x_row, weight, offset, r, pull, llama, dx_row, dw, db, j, n, inside, \
               past_caches)
#define TILES(past_caches)                                              \
  for (; j + LANES <= k; j += LANES) TILE(LANES, LANES, past_caches);   \
  if (j < k && j + LANES <= hidden) {                                   \
    TILE(LANES, k - j, past_caches);                                    \
    j += LANES;                                                         \
  }                                                                     \
  for (; j + LANES <= hidden; j += LANES) TILE(LANES, 0, past_caches)
        ptrdiff_t j = 0;
        if (past_caches) {
          TILES(1);
          END_STREAM();
        } else {
          TILES(0);
        }
        if (j < hidden) TILE(hidden - j, k - j, 0);
#undef TILES
#undef TILE
      }
    }
#pragma omp for schedule(static)
    for (ptrdiff_t tile = 0; tile < (hidden + 63) / 64; tile++) {
      const ptrdiff_t end = tile * 64 + 64 < hidden ? tile * 64 + 64 : hidden;
      for (ptrdiff_t j = tile * 64; j < end; j += LANES) {
        if (dweight) FN(sum_tile_)(dweight_partials, blocks, hidden, dweight, j, end - j);
        if (dbias) FN(sum_tile_)(dbias_partials, blocks, hidden, dbias, j, end - j);
      }
    }
  }
}

#undef LANES
#undef FN
#undef LOAD_T
#undef STORE_T
#undef LOAD_OUT
#undef STORE_OUT
#undef T
#undef T_NAME
#undef OUT
#undef OUT_NAME
#undef ROUNDS
