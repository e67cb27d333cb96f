/* Products of bfloat16 matrices in tiles of 1 KB, which one instruction of a matrix unit takes; without such a unit
   wide registers do the same products. And what turns rows of a tensor into tiles.

   A tile on the left of a product holds 16 rows of 32 values that are summed over. One on the right holds 16 pairs of
   values that are summed over, side by side, for each of 16 columns. One of sums holds 16 rows of 16 float32. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1
#include <immintrin.h>
#endif
#if defined(WIDE) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(WIDE)
#define GROUP 32 /* tokens that are packed together */
#define TILE 512 /* values of a tile; of sums 256 */
#define LOG2E 1.44269504f
#define LN2 0.693147181f

static int64_t groups_of(int64_t tokens) { return (tokens + GROUP - 1) / GROUP; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Those of 32 columns that are there when so many are left. */
static __mmask32 columns_of(int64_t left) { return left >= 32 ? 0xffffffffu : (1u << left) - 1u; }

static int has_tiles;

/* Asks the system to save the registers of tiles, which it does only for who asks: 1 if there are any. */
static int allow_tiles(void) {
#if defined(TILES)
    enum { ASK = 0x1023, TILE_DATA = 18 }; /* of arch_prctl */
    has_tiles = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#endif
    return has_tiles;
}

/* Each thread sets its tiles itself and gives them back: others use them in ways of their own. */
static void begin(void) {
#if defined(TILES)
    struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* the compiler believes that only 8 bytes of it are read */
    if (has_tiles) _tile_loadconfig(&shape);
#endif
}

static void end(void) {
#if defined(TILES)
    if (has_tiles) _tile_release();
#endif
}

/* Sixteen sums of products of two pairs. */
static inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    __m512i high = _mm512_set1_epi32(-65536);
    __m512 c = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), d = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    __m512 e = _mm512_castsi512_ps(_mm512_and_si512(a, high)), f = _mm512_castsi512_ps(_mm512_and_si512(b, high));
    return _mm512_fmadd_ps(e, f, _mm512_fmadd_ps(c, d, sum));
#endif
}

/* Thirty-two values rounded to bfloat16. */
static inline __m512i rounded(__m512 first, __m512 second) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
    __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
    a = _mm512_add_epi32(a, _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(a, 16), one)));
    b = _mm512_add_epi32(b, _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(b, 16), one)));
    __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
#endif
}

/* Of 32 values, those of the even columns and of the odd ones. */
static inline __m512 evens_of(__m512i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(values, 16)); }

static inline __m512 odds_of(__m512i values) {
    return _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(-65536)));
}

/* The same back in order, rounded. */
static inline __m512i interleaved(__m512 even, __m512 odd) {
    __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                     20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rounded(even, odd));
}

/* 2^x to 1e-7 of itself; 0 far below. */
static inline __m512 power(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(0.00132647267f);
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0.00967151268f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0.0555073374f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0.240222421f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0.693146978f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* log2(x) for x > 0, by Newton's method on `power` from a straight line. */
static __m512 logarithm(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 guess = _mm512_sub_ps(_mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), one);
    guess = _mm512_add_ps(guess, _mm512_getexp_ps(x));
    for (int i = 0; i < 3; i++) {
        __m512 ratio = _mm512_mul_ps(x, power(_mm512_sub_ps(_mm512_setzero_ps(), guess)));
        guess = _mm512_fmadd_ps(_mm512_sub_ps(ratio, one), _mm512_set1_ps(LOG2E), guess);
    }
    return guess;
}

/* Rows become columns: 16 x 16 values of 32 bits. */
static inline __attribute__((always_inline)) void transpose(__m512i *r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) { /* 0, 1, 4, 5, 8, ... with what is two rows on */
        int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + 2 * (i % 2);
        r[to] = _mm512_unpacklo_epi64(t[from], t[from + 2]);
        r[to + 1] = _mm512_unpackhi_epi64(t[from], t[from + 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        int at = i / 4 * 8 + i % 4;
        t[at] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0x88);
        t[at + 4] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* What a group of tokens becomes. `deep` is width / 32, rounded up; all have 1024 * deep values. */
typedef struct {
    uint16_t *rows;    /* left, tokens x width: [2][deep] tiles */
    uint16_t *lanes;   /* right, width x tokens: [deep][2] */
    uint16_t *pairs;   /* right, tokens x width: [2 deep] */
    uint16_t *columns; /* left, width x tokens: [2 deep] */
} Packed;

static inline __attribute__((always_inline)) void put_tile(uint16_t *tile, const __m512i *rows) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, rows[i]);
}

/* A tile turned over: its rows, of 16 values of 32 bits, become columns. */
static void put_turned(uint16_t *tile, const uint16_t *from) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) row[i] = _mm512_load_si512(from + 32 * i);
    transpose(row);
    put_tile(tile, row);
}

/* Two tiles of 16 tokens as pairs: the values of two tokens side by side, 16 columns a tile. */
static void put_pairs(uint16_t *tiles, const uint16_t *from) {
    __m512i first = _mm512_set_epi32(47 << 16 | 15, 46 << 16 | 14, 45 << 16 | 13, 44 << 16 | 12, 43 << 16 | 11,
                                     42 << 16 | 10, 41 << 16 | 9, 40 << 16 | 8, 39 << 16 | 7, 38 << 16 | 6,
                                     37 << 16 | 5, 36 << 16 | 4, 35 << 16 | 3, 34 << 16 | 2, 33 << 16 | 1, 32 << 16);
    __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        __m512i one = _mm512_load_si512(from + 64 * i), other = _mm512_load_si512(from + 64 * i + 32);
        _mm512_store_si512(tiles + 32 * i, _mm512_permutex2var_epi16(one, first, other));
        _mm512_store_si512(tiles + TILE + 32 * i, _mm512_permutex2var_epi16(one, second, other));
    }
}

/* The first `count` of 32 tokens, zeros for the others and for what is missing in width. */
static void pack(const uint16_t *from, int64_t token, int64_t count, int64_t width, Packed to) {
    int64_t deep = (width + 31) / 32;
    uint16_t plain[2 * TILE] __attribute__((aligned(64))), pairs[2 * TILE] __attribute__((aligned(64)));
    for (int64_t step = 0; step < deep; step++) {
        __mmask32 some = columns_of(width - 32 * step);
        const uint16_t *row = from + 32 * step;
        for (int64_t i = 0; i < least(GROUP, count); i++, row += token)
            _mm512_store_si512(plain + 32 * i, _mm512_maskz_loadu_epi16(some, row));
        for (int64_t i = most(0, count); i < GROUP; i++) _mm512_store_si512(plain + 32 * i, _mm512_setzero_si512());
        if (to.rows) {
            memcpy(to.rows + step * TILE, plain, 2 * TILE);
            memcpy(to.rows + (deep + step) * TILE, plain + TILE, 2 * TILE);
        }
        for (int64_t half = 0; half < 2 && to.lanes; half++)
            put_turned(to.lanes + (2 * step + half) * TILE, plain + half * TILE);
        if (to.pairs || to.columns) put_pairs(to.pairs ? to.pairs + 2 * step * TILE : pairs, plain);
        for (int64_t half = 0; half < 2 && to.columns; half++)
            put_turned(to.columns + (2 * step + half) * TILE, pairs + half * TILE);
    }
}

/* Tiles of a matrix: where the first is, and how far it is to the next one beside it and to the next summed over. */
typedef struct {
    const uint16_t *at;
    int64_t beside, step;
} Side;

typedef struct {
    float *at;
    int64_t down, across;
} Sums;

static void multiply_wide(Side left, Side right, int64_t steps, Sums to, int add) {
    for (int block = 0; block < 4; block++) { /* 8 rows of 32 columns */
        float *out = to.at + block / 2 * to.down + block % 2 * 128;
        __m512 sum[8][2];
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++)
                sum[i][j] = add ? _mm512_loadu_ps(out + j * to.across + 16 * i) : _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; step++) {
            const uint16_t *a = left.at + step * left.step + block / 2 * left.beside + block % 2 * 256;
            const uint16_t *b = right.at + step * right.step;
            for (int pair = 0; pair < 16; pair++) {
                __m512i first = _mm512_loadu_si512(b + 32 * pair);
                __m512i second = _mm512_loadu_si512(b + right.beside + 32 * pair);
                for (int i = 0; i < 8; i++) {
                    int32_t value;
                    memcpy(&value, a + 32 * i + 2 * pair, sizeof value);
                    __m512i both = _mm512_set1_epi32(value);
                    sum[i][0] = add_products(sum[i][0], both, first);
                    sum[i][1] = add_products(sum[i][1], both, second);
                }
            }
        }
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++) _mm512_storeu_ps(out + j * to.across + 16 * i, sum[i][j]);
    }
}

/* Two by two tiles of sums, set or added to. */
static inline __attribute__((always_inline)) void multiply(Side left, Side right, int64_t steps, Sums to, int add) {
#if defined(TILES)
    if (has_tiles) {
        __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are read from memory */
        if (add) {
            _tile_loadd(0, to.at, 64);
            _tile_loadd(1, to.at + to.across, 64);
            _tile_loadd(2, to.at + to.down, 64);
            _tile_loadd(3, to.at + to.down + to.across, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < steps; i++, left.at += left.step, right.at += right.step) {
            _tile_loadd(4, left.at, 64);
            _tile_loadd(6, right.at, 64);
            _tile_loadd(7, right.at + right.beside, 64);
            _tile_loadd(5, left.at + left.beside, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to.at, 64);
        _tile_stored(1, to.at + to.across, 64);
        _tile_stored(2, to.at + to.down, 64);
        _tile_stored(3, to.at + to.down + to.across, 64);
        __asm__ volatile("" ::: "memory");
        return;
    }
#endif
    multiply_wide(left, right, steps, to, add);
}
#endif
