/* bfloat16 and float32, one value at a time; loops over these become vector code. */

#if !defined(GRAFT_BFLOAT16)
#define GRAFT_BFLOAT16

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float widened(uint16_t value) { return float_of((uint32_t)value << 16); }

/* To the nearest, ties to even; a NaN stays one. */
static inline uint16_t narrowed(float value) {
    uint32_t bits = bits_of(value), nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif
