/* Products with a thin side, of bfloat16 matrices on a CPU: what low-rank factors add to an output, and the gradients
 * of the factors; a gain on the output's columns and the sums for its gradient go along. `thin.py` beside this folder
 * has the definitions.
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
#define ROWS 4    /* tokens whose products with others are summed at a time */

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

/* 32 values for columns, those of the even ones and of the odd ones. */
typedef struct {
    __m512 even, odd;
} Halves;

static inline Halves halves(const float *from, __mmask32 some) {
    __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512 first = _mm512_maskz_loadu_ps((__mmask16)some, from);
    __m512 second = _mm512_maskz_loadu_ps((__mmask16)(some >> 16), from + 16);
    __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    return (Halves){_mm512_permutex2var_ps(first, evens, second), _mm512_permutex2var_ps(first, odds, second)};
}

/* Adds `scale` times sums, tiles of even and of odd columns, to up to 32 rows of one strip of y; with a gain for each
   column, multiplies by it then and adds an offset. */
static inline __attribute__((always_inline)) void add_sums(const float *sums, __m512 scale, const float *gain,
                                                           const float *offset, int64_t count, __mmask32 some,
                                                           uint16_t *y, int64_t row) {
    Halves factor, more;
    if (gain) factor = halves(gain, some), more = halves(offset, some);
    for (int64_t i = 0; i < count; i++, y += row) {
        const float *sum = sums + i / 16 * 512 + i % 16 * 16;
        __m512i old = _mm512_maskz_loadu_epi16(some, y);
        __m512 even = _mm512_fmadd_ps(scale, _mm512_load_ps(sum), evens_of(old));
        __m512 odd = _mm512_fmadd_ps(scale, _mm512_load_ps(sum + 256), odds_of(old));
        if (gain) {
            even = _mm512_fmadd_ps(factor.even, even, more.even);
            odd = _mm512_fmadd_ps(factor.odd, odd, more.odd);
        }
        _mm512_mask_storeu_epi16(y, some, interleaved(even, odd));
        _mm_prefetch((const char *)(y + 32), _MM_HINT_T0);
    }
}

/* y += scale * s b^T; unless `gain` is null, then y = gain * y + offset. Shapes: y [T, N], s [T, r], b [N, r], gain and
   offset [N]. `memory`: 2048 bytes for every 32 of N, times r / 32, both rounded up; aligned to 64. */
void graft_add_low_rank(const Matrix *y, const Matrix *s, const Matrix *b, float scale, const float *gain,
                        const float *offset, uint16_t *memory, int threads) {
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
                __mmask32 some = columns_of(y->columns - 32 * n);
                uint16_t *to = y->at + first * y->row + 32 * n;
                if (gain) add_sums(sums, factor, gain + 32 * n, offset + 32 * n, count, some, to, y->row);
                else add_sums(sums, factor, 0, 0, count, some, to, y->row);
            }
        }
        end();
    }
}

/* A strip of up to 32 rows and columns of a matrix. */
typedef struct {
    const uint16_t *at;
    int64_t row, count;
    __mmask32 some;
} Strip;

static inline Strip strip_of(const Matrix *x, int64_t row, int64_t column) {
    return (Strip){x->at + row * x->row + column, x->row, x->rows - row, columns_of(x->columns - column)};
}

/* Two rows of a strip as pairs of values. They are interleaved within each 128 bits, so that the registers hold columns
   0-3, 8-11, ... and 4-7, 12-15, ... */
typedef struct {
    __m512i low, high;
} Pairs;

static inline Pairs pairs_of(Strip strip, int64_t i) {
    __m512i one = _mm512_setzero_si512(), other = one;
    if (i < strip.count) one = _mm512_maskz_loadu_epi16(strip.some, strip.at + i * strip.row);
    if (i + 1 < strip.count) other = _mm512_maskz_loadu_epi16(strip.some, strip.at + (i + 1) * strip.row);
    return (Pairs){_mm512_unpacklo_epi16(one, other), _mm512_unpackhi_epi16(one, other)};
}

/* 32 rows of a strip as tiles on the right. */
static void pack_strip(Strip strip, uint16_t *to) {
    for (int64_t i = 0; i < GROUP; i += 2, to += 32) {
        Pairs pairs = pairs_of(strip, i);
        _mm512_store_si512(to, pairs.low);
        _mm512_store_si512(to + TILE, pairs.high);
    }
}

/* Adds, for each column of some strips, the products of up to ROWS values in x and in `other` to a sum. Rows are read from
   one end to the other: so memory has the next values ready. */
static void add_column_sums(const Matrix *x, const Matrix *other, int64_t row, int64_t begun, int64_t ended,
                            float *sums) {
    for (int64_t n = begun; n < ended; n++) {
        Strip strip = strip_of(x, row, 32 * n), more = strip_of(other, row, 32 * n);
        __m512 low = _mm512_load_ps(sums + 32 * n), high = _mm512_load_ps(sums + 32 * n + 16);
#pragma GCC unroll 2
        for (int64_t i = 0; i < ROWS; i += 2) {
            Pairs pairs = pairs_of(strip, i), others = pairs_of(more, i);
            low = add_products(low, pairs.low, others.low);
            high = add_products(high, pairs.high, others.high);
        }
        _mm512_store_ps(sums + 32 * n, low);
        _mm512_store_ps(sums + 32 * n + 16, high);
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

/* 32 values of columns as pairs have them, in order, times `scale`. */
static inline void put_columns(__m512 low, __m512 high, __m512 scale, __mmask32 some, float *out) {
    __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    low = _mm512_mul_ps(scale, low), high = _mm512_mul_ps(scale, high);
    _mm512_mask_storeu_ps(out, (__mmask16)some, _mm512_permutex2var_ps(low, first, high));
    _mm512_mask_storeu_ps(out + 16, (__mmask16)(some >> 16), _mm512_permutex2var_ps(low, second, high));
}

/* Columns in order, times `scale`, into a strip of out, [ranks, row]. */
static void put_sums(const float *sums, __m512 scale, int64_t ranks, int64_t left, float *out, int64_t row) {
    for (int64_t i = 0; i < ranks; i++, out += row) {
        const float *sum = sums + i / 16 * 512 + i % 16 * 16;
        put_columns(_mm512_load_ps(sum), _mm512_load_ps(sum + 256), scale, columns_of(left), out);
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

/* out = scale * s^T grad: s [T, r], grad [T, N], out in float32, [r, N] or, `turned`, [N, r]. Unless `other` [T, N] is
   null, the sums over rows of grad * other go to `column_sums` [N]. `memory`, aligned to 64: r / 32 times 2048 bytes
   for every 32 of T and 4096 for every 32 of N, and 128 for every 32 of N, all rounded up. */
void graft_thin_gradient(const Matrix *s, const Matrix *grad, const Matrix *other, float scale, float *out, int turned,
                         float *column_sums, uint16_t *memory, int threads) {
    (void)threads;
    int64_t deep = (s->columns + 31) / 32, groups = groups_of(s->rows), strips = groups_of(grad->columns);
    int64_t size = 2 * TILE * deep; /* of a packed group of s */
    float *sums = (float *)(memory + groups * size), *totals = sums + 1024 * deep * strips;
    __m512 factor = _mm512_set1_ps(scale);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint16_t packed[2 * TILE * BLOCK] __attribute__((aligned(64)));
        int64_t thread = 0, all = 1;
#if defined(_OPENMP)
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        int64_t begun = strips * thread / all, ended = strips * (thread + 1) / all;
        if (other) memset(totals + 32 * begun, 0, 128 * (size_t)(ended - begun));
        begin();
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++)
            pack(s->at + GROUP * group * s->row, s->row, s->rows - GROUP * group, s->columns,
                 (Packed){.columns = memory + group * size});
        for (int64_t group = 0; group < groups; group += BLOCK) {
            int64_t here = least(BLOCK, groups - group), last = least(GROUP * (group + here), s->rows);
            for (int64_t row = GROUP * group; other && row < last; row += ROWS)
                add_column_sums(grad, other, row, begun, ended, totals);
            for (int64_t row = GROUP * group; !other && row < last; row++) /* else strips wait for memory */
                for (int64_t n = begun; n < ended; n++)
                    _mm_prefetch((const char *)(grad->at + row * grad->row + 32 * n), _MM_HINT_T1);
            for (int64_t n = begun; n < ended; n++) {
                for (int64_t i = 0, row = GROUP * group; i < here; i++, row += GROUP)
                    pack_strip(strip_of(grad, row, 32 * n), packed + 2 * TILE * i);
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
        for (int64_t n = begun; n < ended; n++) {
            const float *total = totals + 32 * n;
            if (other)
                put_columns(_mm512_load_ps(total), _mm512_load_ps(total + 16), _mm512_set1_ps(1.0f),
                            columns_of(grad->columns - 32 * n), column_sums + 32 * n);
            for (int64_t step = 0; step < deep; step++) {
                const float *from = sums + 1024 * (n * deep + step);
                int64_t rank = 32 * step, column = 32 * n, row = turned ? s->columns : grad->columns;
                int64_t ranks = least(32, s->columns - rank), left = grad->columns - column;
                if (turned) put_sums_turned(from, factor, ranks, left, out + column * row + rank, row);
                else put_sums(from, factor, ranks, left, out + rank * row + column, row);
            }
        }
    }
}
#endif
