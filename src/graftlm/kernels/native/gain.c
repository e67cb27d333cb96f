/* A gain on every column of a matrix, and its gradients: `gain.py` beside this folder is the definition.
 *
 * One pass over memory each way. Sums over rows are kept by blocks of BLOCK rows, whoever computes them, so
 * that they do not depend on how many threads there are. */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include "bfloat16.h"
#include "tiles.h"

enum { BLOCK = 64 };

typedef uint16_t bf16;

#define AS_IS(value) (value)

/* out = x + change * (x - bias); `bias` may be null, `out` may be x. */
#define APPLY(NAME, TYPE, READ, WRITE)                                                               \
    static void NAME(TYPE *out, const TYPE *x, const float *restrict change, const float *restrict bias, \
                     int64_t rows, int64_t columns, int threads) {                                   \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")           \
        for (int64_t row = 0; row < rows; row++) {                                                   \
            const TYPE *from = x + row * columns;                                                    \
            TYPE *to = out + row * columns;                                                          \
            if (bias) {                                                                              \
                _Pragma("GCC ivdep")                                                                 \
                for (int64_t i = 0; i < columns; i++)                                                \
                    to[i] = WRITE(READ(from[i]) + change[i] * (READ(from[i]) - bias[i]));             \
            } else {                                                                                 \
                _Pragma("GCC ivdep")                                                                 \
                for (int64_t i = 0; i < columns; i++)                                                \
                    to[i] = WRITE(READ(from[i]) + change[i] * READ(from[i]));                        \
            }                                                                                        \
        }                                                                                            \
    }

APPLY(apply_bf16, bf16, widened, narrowed)
APPLY(apply_f32, float, AS_IS, AS_IS)

/* out = gain * x, one gain for each row. */
#define APPLY_TO_ROWS(NAME, TYPE, READ, WRITE)                                                       \
    static void NAME(TYPE *restrict out, const TYPE *restrict x, const float *gain, int64_t rows,    \
                     int64_t columns, int threads) {                                                 \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")           \
        for (int64_t row = 0; row < rows; row++) {                                                   \
            const TYPE *restrict from = x + row * columns;                                           \
            TYPE *restrict to = out + row * columns;                                                 \
            const float factor = gain[row];                                                          \
            for (int64_t i = 0; i < columns; i++) to[i] = WRITE(factor * READ(from[i]));             \
        }                                                                                            \
    }

#if defined(WIDE)
/* Even and odd columns apart; the rounding is the processor's own where it has one, a quarter of the time. */
static void rows_bf16(bf16 *out, const bf16 *x, const float *gain, int64_t rows, int64_t columns, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        __m512 factor = _mm512_set1_ps(gain[row]);
        for (int64_t i = 0; i < columns; i += 32) {
            __mmask32 some = columns_of(columns - i);
            __m512i values = _mm512_maskz_loadu_epi16(some, x + row * columns + i);
            __m512 even = _mm512_mul_ps(factor, evens_of(values)), odd = _mm512_mul_ps(factor, odds_of(values));
            _mm512_mask_storeu_epi16(out + row * columns + i, some, interleaved(even, odd));
        }
    }
}
#else
APPLY_TO_ROWS(rows_bf16, bf16, widened, narrowed)
#endif
APPLY_TO_ROWS(rows_f32, float, AS_IS, AS_IS)

/* of_x = grad * gain, and for each block of rows the sums of grad * x, [blocks, columns]; either may be null. */
#define BACKWARD(NAME, TYPE, READ, WRITE)                                                            \
    static void NAME(TYPE *of_x, float *sums, const TYPE *grad, const TYPE *x,                       \
                     const float *restrict gain, int64_t rows, int64_t columns, int threads) {       \
        const int64_t blocks = (rows + BLOCK - 1) / BLOCK;                                           \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")           \
        for (int64_t block = 0; block < blocks; block++) {                                           \
            const int64_t end = (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;             \
            float *restrict total = sums ? sums + block * columns : 0;                               \
            if (total) memset(total, 0, (size_t)columns * sizeof(float));                            \
            for (int64_t row = block * BLOCK; row < end; row++) {                                    \
                const TYPE *restrict g = grad + row * columns;                                       \
                const TYPE *restrict from = x + row * columns;                                       \
                TYPE *restrict to = of_x ? of_x + row * columns : 0;                                 \
                if (total && of_x) {                                                                 \
                    for (int64_t i = 0; i < columns; i++) {                                          \
                        const float wide = READ(g[i]);                                               \
                        total[i] += wide * READ(from[i]);                                            \
                        to[i] = WRITE(wide * gain[i]);                                               \
                    }                                                                                \
                } else if (total) {                                                                  \
                    for (int64_t i = 0; i < columns; i++)                                            \
                        total[i] += READ(g[i]) * READ(from[i]);                                      \
                } else {                                                                             \
                    for (int64_t i = 0; i < columns; i++)                                            \
                        to[i] = WRITE(READ(g[i]) * gain[i]);                                         \
                }                                                                                    \
            }                                                                                        \
        }                                                                                            \
    }

BACKWARD(backward_bf16, bf16, widened, narrowed)
BACKWARD(backward_f32, float, AS_IS, AS_IS)

/* Contiguous [rows, columns] of bfloat16 (2 bytes a value) or float32 (4). */
void graft_gain(void *out, const void *x, const float *change, const float *bias, int64_t rows,
                int64_t columns, int bytes, int threads) {
    if (bytes == 2)
        apply_bf16(out, x, change, bias, rows, columns, threads);
    else
        apply_f32(out, x, change, bias, rows, columns, threads);
}

void graft_gain_on_rows(void *out, const void *x, const float *gain, int64_t rows, int64_t columns, int bytes,
                        int threads) {
    if (bytes == 2)
        rows_bf16(out, x, gain, rows, columns, threads);
    else
        rows_f32(out, x, gain, rows, columns, threads);
}

void graft_gain_backward(void *of_x, float *sums, const void *grad, const void *x, const float *gain,
                         int64_t rows, int64_t columns, int bytes, int threads) {
    if (bytes == 2)
        backward_bf16(of_x, sums, grad, x, gain, rows, columns, threads);
    else
        backward_f32(of_x, sums, grad, x, gain, rows, columns, threads);
}
