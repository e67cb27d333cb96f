/* Packed weights read on a CPU: the dense values, and products with a few rows.

   A block of 4-bit codes shares one scale. So the few values that its codes can stand for are multiplied and
   rounded once into a table, and reading is looking up. Codes of 8 bits share one over a row, or a part of it: wide
   registers convert them, else there is a table too. Equal to the plain definition (decoding.py) to the bit, at the
   speed of memory. Compiled at first use, called by call.py.

   The weight is [rows, columns], flat index row * columns + column; with 4 bits the first of a pair lies in
   the high half of its byte. All arithmetic is float32, without contraction. */

#include <stdint.h>
#include <string.h>
#if defined(__SSSE3__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 1
#endif

/* The last two are held as float32, after rounding. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, WIDE_BFLOAT16 = 3, WIDE_FLOAT16 = 4 };

enum { FOUR_BITS = 0, INT8 = 1, FLOAT8 = 2 };

#define LANES 64   /* sums that a product is split into: enough to hide the latency of an addition */
#define AHEAD 8    /* rows that codes are asked for in advance */
#define PIECE 2048 /* values of a row that are read at a time */

typedef struct {
    const uint8_t *codes;      /* two codes a byte, or one */
    const void *scales;        /* float32 each, or uint8 where they are quantised themselves */
    const float *scale_scales; /* one for 256 scales; NULL where scales are plain */
    const float *scale_offset;
    const float *scale_map;    /* what the 256 codes of scales stand for */
    const float *values;       /* what the codes of the weight stand for: 16, or 256 */
    int64_t kind;
    int64_t block;             /* 4 bits: codes that share a scale */
    int64_t tile;              /* 8 bits: rows and columns that do; 0: each row has one */
    int64_t columns;
    float unit;                /* what code times scale is multiplied with at last */
} Weight;

#if !defined(WIDE)
static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Round to nearest, ties to even. */
static uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
    if (magnitude >= 0x38800000u) {                                  /* normal: exponent from 127 to 15 */
        uint32_t moved = magnitude - 0x38000000u;
        return (uint16_t)(sign | ((moved + 0xfffu + ((moved >> 13) & 1u)) >> 13));
    }
    if (magnitude < 0x33000000u) return (uint16_t)sign; /* less than half of the smallest */
    uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return (uint16_t)(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
}

static float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    float value = (float)magnitude * 0x1p-24f;
    return float_of(sign | bits_of(value));
}
#endif

static int is_wide(int type) { return type != BFLOAT16 && type != FLOAT16; }

static float scale_of(const Weight *w, int64_t index) {
    if (!w->scale_scales) return ((const float *)w->scales)[index];
    float value = w->scale_map[((const uint8_t *)w->scales)[index]];
    return value * w->scale_scales[index / 256] + *w->scale_offset;
}

#if defined(WIDE)
/* Sixteen products, rounded once to `type`. */
static void put(void *out, __m512 product, int type) {
    if (type == FLOAT32) {
        _mm512_storeu_ps(out, product);
    } else if (type == FLOAT16 || type == WIDE_FLOAT16) {
        __m256i half = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        if (type == FLOAT16) _mm256_storeu_si256((__m256i *)out, half);
        else _mm512_storeu_ps(out, _mm512_cvtph_ps(half));
    } else {
        __m512i bits = _mm512_castps_si512(product);
        __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
        __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
        up = _mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000));
        __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
        if (type == BFLOAT16) _mm256_storeu_si256((__m256i *)out, high);
        else _mm512_storeu_si512(out, _mm512_and_si512(up, _mm512_set1_epi32(-65536)));
    }
}

static __m512 scaled(__m512 value, float scale, float unit) {
    return _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(scale)), _mm512_set1_ps(unit));
}

/* What sixteen codes of 8 bits stand for. A float8 becomes a float16 of a 256th of its value, exactly. */
static __m512 values_of(__m128i codes, int64_t kind) {
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    __m512i wide = _mm512_cvtepu8_epi32(codes), magnitude = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 8);
    __m512i half = _mm512_or_si512(sign, _mm512_slli_epi32(magnitude, 7));
    __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
    half = _mm512_mask_blend_epi32(nan, half, _mm512_set1_epi32(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), _mm512_set1_ps(256));
}
#else
static void put(void *out, int64_t index, float product, int type) {
    if (type == FLOAT32) ((float *)out)[index] = product;
    else if (type == BFLOAT16) ((uint16_t *)out)[index] = to_bfloat16(product);
    else if (type == FLOAT16) ((uint16_t *)out)[index] = to_float16(product);
    else if (type == WIDE_BFLOAT16) ((float *)out)[index] = float_of((uint32_t)to_bfloat16(product) << 16);
    else ((float *)out)[index] = from_float16(to_float16(product));
}

/* What every code of 8 bits stands for beside this scale. */
static void fill_all(void *table, const Weight *w, float scale, int type) {
    for (int i = 0; i < 256; i++) put(table, i, w->values[i] * scale * w->unit, type);
}
#endif

/* What the codes of 4 bits stand for beside this scale, rounded once to `type`. */
static void fill(void *table, const Weight *w, float scale, int type) {
#if defined(WIDE)
    put(table, scaled(_mm512_loadu_ps(w->values), scale, w->unit), type);
#else
    for (int i = 0; i < 16; i++) put(table, i, w->values[i] * scale * w->unit, type);
#endif
}

/* Codes [begin, end) of one block; `begin` may be odd. */
static void look_up16(const uint8_t *codes, const uint16_t *table, int64_t begin, int64_t end, uint16_t *out) {
    if (begin & 1) *out++ = table[codes[begin++ >> 1] & 15];
    const uint8_t *byte = codes + (begin >> 1);
    int64_t left = end - begin;
#if defined(WIDE)
    __m512i wide = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    for (; left >= 32; left -= 32, byte += 16, out += 32) {
        __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)byte));
        /* the first of a pair in the low word; bit 4 of an index picks a copy of the table */
        __m512i index = _mm512_or_si512(_mm512_slli_epi32(pair, 16), _mm512_srli_epi32(pair, 4));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, wide));
    }
#elif defined(__SSSE3__)
    const __m128i low_bytes = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
    __m128i first = _mm_loadu_si128((const __m128i *)table), second = _mm_loadu_si128((const __m128i *)(table + 8));
    __m128i low = _mm_packus_epi16(_mm_and_si128(first, low_bytes), _mm_and_si128(second, low_bytes));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (; left >= 32; left -= 32, byte += 16, out += 32) {
        __m128i pair = _mm_loadu_si128((const __m128i *)byte);
        __m128i one = _mm_and_si128(_mm_srli_epi16(pair, 4), nibble), other = _mm_and_si128(pair, nibble);
        for (int half = 0; half < 2; half++) {
            __m128i index = half ? _mm_unpackhi_epi8(one, other) : _mm_unpacklo_epi8(one, other);
            __m128i lower = _mm_shuffle_epi8(low, index), upper = _mm_shuffle_epi8(high, index);
            _mm_storeu_si128((__m128i *)(out + 16 * half), _mm_unpacklo_epi8(lower, upper));
            _mm_storeu_si128((__m128i *)(out + 16 * half + 8), _mm_unpackhi_epi8(lower, upper));
        }
    }
#endif
    for (; left >= 2; left -= 2, byte++, out += 2) {
        out[0] = table[*byte >> 4];
        out[1] = table[*byte & 15];
    }
    if (left) *out = table[*byte >> 4];
}

static void look_up32(const uint8_t *codes, const float *table, int64_t begin, int64_t end, float *out) {
    if (begin & 1) *out++ = table[codes[begin++ >> 1] & 15];
    const uint8_t *byte = codes + (begin >> 1);
    int64_t left = end - begin;
#if defined(WIDE)
    __m512 wide = _mm512_loadu_ps(table);
    for (; left >= 16; left -= 16, byte += 8, out += 16) {
        __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)byte));
        __m512i index = _mm512_or_si512(_mm512_slli_epi64(pair, 32), _mm512_srli_epi64(pair, 4));
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(index, wide));
    }
#endif
    for (; left >= 2; left -= 2, byte++, out += 2) {
        out[0] = table[*byte >> 4];
        out[1] = table[*byte & 15];
    }
    if (left) *out = table[*byte >> 4];
}

/* Values [begin, end) of a weight in blocks. */
static void read_blocks(const Weight *w, int64_t begin, int64_t end, int type, void *out) {
    int64_t index = begin / w->block;
    while (begin < end) {
        int64_t stop = (index + 1) * w->block < end ? (index + 1) * w->block : end;
        float scale = scale_of(w, index++);
        if (is_wide(type)) {
            float table[16];
            fill(table, w, scale, type);
            look_up32(w->codes, table, begin, stop, (float *)out);
            out = (float *)out + (stop - begin);
        } else {
            uint16_t table[16];
            fill(table, w, scale, type);
            look_up16(w->codes, table, begin, stop, (uint16_t *)out);
            out = (uint16_t *)out + (stop - begin);
        }
        begin = stop;
    }
}

/* The values of `count` codes of 8 bits that share a scale. */
static void read_span(const Weight *w, const uint8_t *codes, int64_t count, float scale, int type, void *out) {
#if defined(WIDE)
    int64_t size = is_wide(type) ? 4 : 2;
    uint8_t *place = (uint8_t *)out;
    for (; count >= 16; count -= 16, codes += 16, place += 16 * size)
        put(place, scaled(values_of(_mm_loadu_si128((const __m128i *)codes), w->kind), scale, w->unit), type);
    if (count) {
        uint8_t some[16] = {0}, rest[64];
        memcpy(some, codes, (size_t)count);
        put(rest, scaled(values_of(_mm_loadu_si128((const __m128i *)some), w->kind), scale, w->unit), type);
        memcpy(place, rest, (size_t)(count * size));
    }
#else
    float wide[256];
    uint16_t *narrow = (uint16_t *)wide;
    if (count < 256) { /* a table would cost more */
        for (int64_t i = 0; i < count; i++) put(out, i, w->values[codes[i]] * scale * w->unit, type);
        return;
    }
    fill_all(wide, w, scale, type);
    if (is_wide(type))
        for (int64_t i = 0; i < count; i++) ((float *)out)[i] = wide[codes[i]];
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = narrow[codes[i]];
#endif
}

/* Values of columns [first, last) of a row of 8-bit codes. */
static void read_row(const Weight *w, int64_t row, int64_t first, int64_t last, int type, void *out) {
    const uint8_t *codes = w->codes + row * w->columns;
    const float *scales = (const float *)w->scales;
    if (!w->tile) {
        read_span(w, codes + first, last - first, scales[row], type, out);
        return;
    }
    int64_t size = is_wide(type) ? 4 : 2, across = (w->columns + w->tile - 1) / w->tile;
    uint8_t *place = (uint8_t *)out;
    scales += row / w->tile * across;
    while (first < last) {
        int64_t index = first / w->tile, stop = (index + 1) * w->tile < last ? (index + 1) * w->tile : last;
        read_span(w, codes + first, stop - first, scales[index], type, place);
        place += (stop - first) * size;
        first = stop;
    }
}

static void read_part(const Weight *w, int64_t row, int64_t first, int64_t last, int type, void *out) {
    if (w->kind == FOUR_BITS) read_blocks(w, row * w->columns + first, row * w->columns + last, type, out);
    else read_row(w, row, first, last, type, out);
}

/* Ask for the codes of a row that is read soon: pieces of rows lie too far apart for the processor to foresee. */
static void fetch(const Weight *w, int64_t row, int64_t first, int64_t last) {
    int64_t codes_per_byte = w->kind == FOUR_BITS ? 2 : 1, start = row * w->columns;
    const uint8_t *end = w->codes + (start + last) / codes_per_byte;
    for (const uint8_t *line = w->codes + (start + first) / codes_per_byte; line < end; line += 64)
        __builtin_prefetch(line);
}

/* Rows [from, to), columns [first, last) as a dense matrix [to - from, last - first]. */
void graft_decode(const Weight *w, int64_t from, int64_t to, int64_t first, int64_t last, int type, void *out,
                  int threads) {
    int64_t bytes = (last - first) * (is_wide(type) ? 4 : 2);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = from; row < to; row++) {
        if (row + AHEAD < to) fetch(w, row + AHEAD, first, last);
        read_part(w, row, first, last, type, (uint8_t *)out + (row - from) * bytes);
    }
}

static float dot(const float *a, const float *b, int64_t count) {
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += a[i + j] * b[i + j];
    for (; i < count; i++) sum += a[i] * b[i];
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* x [tokens, columns] times rows [from, to) of the weight, into out [tokens, to - from], all float32. `type` is what
   values of the weight are rounded to. A piece of a row is read into the nearest cache and used at once. */
void graft_multiply(const Weight *w, const float *x, int64_t tokens, int64_t from, int64_t to, int type, float *out,
                    int threads) {
    int64_t columns = w->columns, rows = to - from;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = from; row < to; row++) {
        float piece[PIECE];
        for (int64_t first = 0; first < columns; first += PIECE) {
            int64_t last = first + PIECE < columns ? first + PIECE : columns;
            read_part(w, row, first, last, type, piece);
            for (int64_t t = 0; t < tokens; t++) {
                float part = dot(piece, x + t * columns + first, last - first);
                out[t * rows + row - from] = first ? out[t * rows + row - from] + part : part;
            }
        }
    }
}
