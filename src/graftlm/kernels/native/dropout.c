/* Dropout by a counter: `dropout.py` beside this folder is the definition, to the bit.
 *
 * A row has two 32-bit keys; each pair of columns one hash of 32 bits, whose halves decide. Hashes of a piece
 * of a row lie in a small buffer, which read as 16-bit numbers has them in the order of the columns. */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include "bfloat16.h"


#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The halves of a hash are read in little-endian order."
#endif

enum { PIECE = 1024 }; /* columns whose bits are drawn at a time */

typedef struct {
    uint32_t first, second;
} Keys;

static inline Keys keys_of(uint64_t counter) {
    uint64_t z = counter * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (Keys){(uint32_t)z, (uint32_t)(z >> 32)};
}

/* The 16 bits of every column from `start` (even), `count` of them, and one more where that is odd. */
static inline void draw(uint16_t *restrict bits, Keys keys, int64_t start, int64_t count) {
    uint32_t hashes[PIECE / 2];
    const uint32_t base = (uint32_t)(start / 2);
    const int pairs = (int)((count + 1) / 2);
    for (int j = 0; j < pairs; j++) {
        uint32_t h = (base + (uint32_t)j) * 0x9E3779B1u + keys.first;
        h = (h ^ (h >> 16)) * 0x7FEB352Du + keys.second;
        h = (h ^ (h >> 15)) * 0x846CA68Bu;
        hashes[j] = h ^ (h >> 16);
    }
    memcpy(bits, hashes, (size_t)pairs * sizeof(uint32_t));
}

#define OVER_PIECES(BODY)                                                                       \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")          \
    for (int64_t row = 0; row < rows; row++) {                                                  \
        const Keys keys = keys_of((uint64_t)seed + (uint64_t)row);                              \
        uint16_t bits[PIECE];                                                                   \
        for (int64_t start = 0; start < columns; start += PIECE) {                              \
            const int64_t count = columns - start < PIECE ? columns - start : PIECE;            \
            const int64_t place = row * columns + start;                                        \
            draw(bits, keys, start, count);                                                     \
            for (int64_t i = 0; i < count; i++) BODY;                                           \
        }                                                                                       \
    }

/* out = x where kept, else 0; contiguous [rows, columns] of 2 or 4 bytes a value. */
void graft_dropped(void *to, const void *from, int64_t rows, int64_t columns, int bytes, int64_t seed,
                   int limit, int threads) {
    const uint16_t least = (uint16_t)limit;
    if (bytes == 2) {
        uint16_t *restrict out = to;
        const uint16_t *restrict x = from;
        OVER_PIECES(out[place + i] = bits[i] >= least ? x[place + i] : 0)
    } else {
        uint32_t *restrict out = to;
        const uint32_t *restrict x = from;
        OVER_PIECES(out[place + i] = bits[i] >= least ? x[place + i] : 0)
    }
}

/* out += x where kept; bfloat16 (2 bytes) or float32. */
void graft_add_dropped(void *to, const void *from, int64_t rows, int64_t columns, int bytes, int64_t seed,
                       int limit, int threads) {
    const uint16_t least = (uint16_t)limit;
    if (bytes == 2) {
        uint16_t *restrict out = to;
        const uint16_t *restrict x = from;
        OVER_PIECES({
            const float kept = bits[i] >= least ? widened(x[place + i]) : 0.0f;
            out[place + i] = narrowed(widened(out[place + i]) + kept);
        })
    } else {
        float *restrict out = to;
        const float *restrict x = from;
        OVER_PIECES(out[place + i] += bits[i] >= least ? x[place + i] : 0.0f)
    }
}
