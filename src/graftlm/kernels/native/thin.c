/* Products with a thin side, of bfloat16 matrices on a CPU: what low-rank factors add to an output, and the gradients
 * of the factors. `adapted_products.py` beside this folder has the definitions.
 *
 * Wide matrices are read once, in strips of 32 columns. Each value is summed in one order by one thread, whatever their
 * number. Called by thin_cpu.py. */

#include "tiles.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

#if !defined(WIDE)
int graft_thin_state(void) { return 0; }
#else
#define DEEPEST 3 /* steps of 32 ranks: thin_cpu.py passes no more */
#define BLOCK 3   /* groups of tokens whose part of a strip is packed at a time */

/* 0: this code is of no use on this processor. So it is with instructions for bfloat16 but no matrix unit: the library
   behind torch is faster there. 1: wide registers serve, 2: a matrix unit serves. */
int graft_thin_state(void) {
    if (allow_tiles()) return 2;
#if defined(__AVX512BF16__)
    return 0;
#else
    return 1;
#endif
}

/* A matrix of `columns` columns, `row` values from one row to the next. */
typedef struct {
    uint16_t *at;
    int64_t rows, columns, row;
} Matrix;

/* 32 rows of b from row `first` on as tiles on the right, [deep][2]: the even rows, then the odd ones. */
static void pack_factor(const Matrix *b, int64_t first, uint16_t *to) {
    uint16_t plain[TILE] __attribute__((aligned(64)));
    for (int64_t step = 0; 32 * step < b->columns; step++) {
        __mmask32 some = columns_of(b->columns - 32 * step);
        for (int64_t odd = 0; odd < 2; odd++, to += TILE) {
            for (int64_t i = 0; i < 16; i++) {
                int64_t row = first + 2 * i + odd;
                __m512i values = _mm512_setzero_si512();
                if (row < b->rows) values = _mm512_maskz_loadu_epi16(some, b->at + row * b->row + 32 * step);
                _mm512_store_si512(plain + 32 * i, values);
            }
            put_turned(to, plain);
        }
    }
}

/* Adds `scale` times sums, tiles of even and of odd columns, to up to 32 rows of one strip of y. */
static void add_sums(const float *sums, __m512 scale, int64_t count, __mmask32 some, uint16_t *y, int64_t row) {
    __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                     20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i high = _mm512_set1_epi32(-65536);
    for (int64_t i = 0; i < count; i++, y += row) {
        const float *sum = sums + i / 16 * 512 + i % 16 * 16;
        __m512i old = _mm512_maskz_loadu_epi16(some, y);
        __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(old, 16));
        __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(old, high));
        even = _mm512_fmadd_ps(scale, _mm512_load_ps(sum), even);
        odd = _mm512_fmadd_ps(scale, _mm512_load_ps(sum + 256), odd);
        _mm512_mask_storeu_epi16(y, some, _mm512_permutexvar_epi16(order, rounded(even, odd)));
        _mm_prefetch((const char *)(y + 32), _MM_HINT_T0);
    }
}

/* y += scale * s b^T: y [T, N], s [T, r], b [N, r]. `memory`: 2048 bytes for every 32 of N, times r / 32, both
   rounded up; aligned to 64. */
void graft_add_low_rank(const Matrix *y, const Matrix *s, const Matrix *b, float scale, uint16_t *memory, int threads) {
    (void)threads;
    int64_t deep = (s->columns + 31) / 32, strips = groups_of(y->columns);
    __m512 factor = _mm512_set1_ps(scale);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint16_t rows[2 * TILE * DEEPEST] __attribute__((aligned(64)));
        float sums[1024] __attribute__((aligned(64)));
        begin();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < strips; n++) pack_factor(b, 32 * n, memory + 2 * TILE * deep * n);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups_of(y->rows); group++) {
            int64_t first = GROUP * group, count = least(GROUP, y->rows - first);
            pack(s->at + first * s->row, s->row, count, s->columns, (Packed){.rows = rows});
            Side left = {rows, deep * TILE, TILE};
            for (int64_t n = 0; n < strips; n++) {
                Side right = {memory + 2 * TILE * deep * n, TILE, 2 * TILE};
                multiply(left, right, deep, (Sums){sums, 512, 256}, 0);
                add_sums(sums, factor, count, columns_of(y->columns - 32 * n), y->at + first * y->row + 32 * n, y->row);
            }
        }
        end();
    }
}

/* 32 rows of a strip as tiles on the right. Pairs of rows are interleaved within each 128 bits, so that the tiles hold
   columns 0-3, 8-11, ... and 4-7, 12-15, ... */
static void pack_strip(const uint16_t *from, int64_t row, int64_t count, __mmask32 some, uint16_t *to) {
    for (int64_t i = 0; i < GROUP; i += 2, to += 32) {
        __m512i one = _mm512_setzero_si512(), other = one;
        if (i < count) one = _mm512_maskz_loadu_epi16(some, from + i * row);
        if (i + 1 < count) other = _mm512_maskz_loadu_epi16(some, from + (i + 1) * row);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(one, other));
        _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(one, other));
    }
}

/* `multiply` where the lower of the two tiles on the left has nothing but zeros; then its sums are of no use. */
static inline __attribute__((always_inline)) void multiply_upper(Side left, Side right, int64_t steps, Sums to,
                                                                 int add) {
#if defined(TILES)
    if (has_tiles) {
        __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are read from memory */
        if (add) {
            _tile_loadd(0, to.at, 64);
            _tile_loadd(1, to.at + to.across, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        for (int64_t i = 0; i < steps; i++, left.at += left.step, right.at += right.step) {
            _tile_loadd(4, left.at, 64);
            _tile_loadd(6, right.at, 64);
            _tile_loadd(7, right.at + right.beside, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, to.at, 64);
        _tile_stored(1, to.at + to.across, 64);
        __asm__ volatile("" ::: "memory");
        return;
    }
#endif
    multiply_wide(left, right, steps, to, add);
}

/* Columns in order, times `scale`, into a strip of out, [ranks, row]. */
static void put_sums(const float *sums, __m512 scale, int64_t ranks, int64_t left, float *out, int64_t row) {
    __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __mmask32 some = columns_of(left);
    for (int64_t i = 0; i < ranks; i++, out += row) {
        const float *sum = sums + i / 16 * 512 + i % 16 * 16;
        __m512 low = _mm512_mul_ps(scale, _mm512_load_ps(sum)), high = _mm512_mul_ps(scale, _mm512_load_ps(sum + 256));
        _mm512_mask_storeu_ps(out, (__mmask16)some, _mm512_permutex2var_ps(low, first, high));
        _mm512_mask_storeu_ps(out + 16, (__mmask16)(some >> 16), _mm512_permutex2var_ps(low, second, high));
    }
}

/* Columns as rows, times `scale`, into a strip of out, [columns, row]. */
static void put_sums_turned(const float *sums, __m512 scale, int64_t ranks, int64_t left, float *out, int64_t row) {
    for (int64_t tile = 0; tile < 4; tile++) { /* two of ranks, by two of columns */
        __mmask16 some = (__mmask16)columns_of(most(0, ranks - tile / 2 * 16));
        __m512i value[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            value[i] = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_load_ps(sums + 256 * tile + 16 * i)));
        transpose(value);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            int64_t column = i / 4 * 8 + i % 4 + tile % 2 * 4;
            if (column < left && some) _mm512_mask_storeu_epi32(out + column * row + tile / 2 * 16, some, value[i]);
        }
    }
}

/* out = scale * s^T grad: s [T, r], grad [T, N], out in float32, [r, N] or, `turned`, [N, r]. `memory`, aligned to
   64: r / 32 times 2048 bytes for every 32 of T and 4096 for every 32 of N, all rounded up. */
void graft_thin_gradient(const Matrix *s, const Matrix *grad, float scale, float *out, int turned, uint16_t *memory,
                         int threads) {
    (void)threads;
    int64_t deep = (s->columns + 31) / 32, groups = groups_of(s->rows), strips = groups_of(grad->columns);
    int64_t size = 2 * TILE * deep; /* of a packed group of s */
    float *sums = (float *)(memory + groups * size);
    __m512 factor = _mm512_set1_ps(scale);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint16_t packed[2 * TILE * BLOCK] __attribute__((aligned(64)));
        int64_t thread = 0, all = 1;
#if defined(_OPENMP)
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        int64_t begun = strips * thread / all, ended = strips * (thread + 1) / all;
        begin();
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++)
            pack(s->at + GROUP * group * s->row, s->row, s->rows - GROUP * group, s->columns,
                 (Packed){.columns = memory + group * size});
        for (int64_t group = 0; group < groups; group += BLOCK) {
            int64_t here = least(BLOCK, groups - group);
            for (int64_t n = begun; n < ended; n++) {
                for (int64_t i = 0, row = GROUP * group; i < here; i++, row += GROUP)
                    pack_strip(grad->at + row * grad->row + 32 * n, grad->row, grad->rows - row,
                               columns_of(grad->columns - 32 * n), packed + 2 * TILE * i);
                for (int64_t step = 0; step < deep; step++) {
                    Side left = {memory + group * size + 2 * TILE * step, TILE, size};
                    Side right = {packed, TILE, 2 * TILE};
                    Sums to = {sums + 1024 * (n * deep + step), 512, 256};
                    if (s->columns - 32 * step > 16) multiply(left, right, here, to, group > 0);
                    else multiply_upper(left, right, here, to, group > 0);
                }
            }
        }
        end();
        for (int64_t n = begun; n < ended; n++)
            for (int64_t step = 0; step < deep; step++) {
                const float *from = sums + 1024 * (n * deep + step);
                int64_t rank = 32 * step, column = 32 * n, row = turned ? s->columns : grad->columns;
                int64_t ranks = least(32, s->columns - rank), left = grad->columns - column;
                if (turned) put_sums_turned(from, factor, ranks, left, out + column * row + rank, row);
                else put_sums(from, factor, ranks, left, out + rank * row + column, row);
            }
    }
}
#endif
