/* Lengths of the rows of a weight with a low-rank change: `lengths.py` beside this folder is the definition. */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 }; /* ranks at a time */

typedef float Lanes __attribute__((vector_size(4 * LANES)));

/* Up to LANES values, zeros for what is missing. */
static inline void take(Lanes *to, const float *from, int64_t count) {
    memset(to, 0, sizeof *to);
    if (count >= LANES) memcpy(to, from, sizeof *to);
    else memcpy(to, from, (size_t)count * sizeof(float));
}

/* The sum of neighbours' sums. */
static inline float sum_of(const Lanes *lanes) {
    float at[LANES];
    memcpy(at, lanes, sizeof at);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) at[i] += at[i + half];
    return at[0];
}

/* out_n = sqrt(squares_n + sum_j b_nj (2 scale products_nj + scale^2 (b gram)_nj)), never below 0.
   Shapes: out, squares [N], products, b [N, rank], gram [rank, row] with zeros behind the rank, up to a multiple of
   LANES. Each value is summed in one order. */
void graft_changed_lengths(float *out, const float *squares, const float *products, const float *b, const float *gram,
                           float scale, int64_t rows, int64_t rank, int64_t row, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        const float *own = b + n * rank, *product = products + n * rank;
        Lanes sums = {0};
        for (int64_t j = 0; j < rank; j += LANES) {
            Lanes crossed = {0}, some;
            for (int64_t i = 0; i < rank; i++) {
                take(&some, gram + i * row + j, LANES);
                crossed += own[i] * some;
            }
            take(&some, product + j, rank - j);
            crossed = 2 * scale * some + scale * scale * crossed;
            take(&some, own + j, rank - j);
            sums += some * crossed;
        }
        float total = squares[n] + sum_of(&sums);
        out[n] = total < 0 ? 0 : sqrtf(total); /* a NaN stays one */
    }
}
