/* Elementwise layers on a CPU, at the speed of memory: every value is read once and written once.

   A block of a row is widened to float32 in the nearest cache, computed by plain loops that compilers turn into vector
   code, and rounded once. Of 16-bit values the even ones come first in such a block and the odd ones after them: pairs
   then come apart by a shift and a mask. Rows are independent, sums have a fixed order, and a product that is added is
   fused wherever the processor can: the same bits with every number of threads. Compiled at first use, called by
   pointwise_call.py. */

#include <math.h>

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include "bfloat16.h"

enum { FLOAT32 = 0, BFLOAT16 = 1 };

#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline)) /* its types are no constants: they are asked for once a block */
#define BLOCK 256  /* values that are wide at a time */
#define HALF 256   /* most pairs of a head that turn */
#define LANES 64   /* sums that the sum of a row is split into */
#define LOWEST -87.0f /* what exponents are kept above: e^-87 is 1e-38 */

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MULTIPLY_ADD __builtin_fmaf
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* The bfloat16 nearest to `value`, ties to even, in the high half. The NaN that arithmetic makes stays one. */
INLINE uint32_t rounded(float value) {
    uint32_t bits = bits_of(value);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE const void *at(const void *values, int64_t index, int type) {
    return (const uint8_t *)values + index * size_of(type);
}

INLINE void *to(void *values, int64_t index, int type) { return (uint8_t *)values + index * size_of(type); }

INLINE float get(const void *values, int64_t index, int type) {
    if (type == FLOAT32) return ((const float *)values)[index];
    return float_of((uint32_t)((const uint16_t *)values)[index] << 16);
}

INLINE void put(void *values, int64_t index, float value, int type) {
    if (type == FLOAT32) ((float *)values)[index] = value;
    else ((uint16_t *)values)[index] = (uint16_t)(rounded(value) >> 16);
}

/* `count` values of `type` in the order of a block of type `order`; the odd ones start at `odd`. */
INLINE void widen(const void *from, int64_t count, float *wide, int64_t odd, int type, int order) {
    int64_t pairs = count / 2;
    if (order == FLOAT32) {
        for (int64_t i = 0; i < count; i++) wide[i] = get(from, i, type);
        return;
    }
    for (int64_t i = 0; i < pairs; i++) {
        if (type == FLOAT32) {
            wide[i] = ((const float *)from)[2 * i];
            wide[odd + i] = ((const float *)from)[2 * i + 1];
        } else {
            uint32_t pair;
            memcpy(&pair, (const uint8_t *)from + 4 * i, sizeof pair);
            wide[i] = float_of(pair << 16);
            wide[odd + i] = float_of(pair & 0xffff0000u);
        }
    }
    if (count & 1) wide[pairs] = get(from, count - 1, type);
}

/* The way back, to the type of the order. */
INLINE void narrow(const float *wide, int64_t count, void *into, int64_t odd, int type) {
    if (type == FLOAT32) {
        memcpy(into, wide, (size_t)count * sizeof *wide);
        return;
    }
    int64_t pairs = count / 2;
    for (int64_t i = 0; i < pairs; i++) {
        uint32_t pair = (rounded(wide[i]) >> 16) | (rounded(wide[odd + i]) & 0xffff0000u);
        memcpy((uint8_t *)into + 4 * i, &pair, sizeof pair);
    }
    if (count & 1) put(into, count - 1, wide[pairs], type);
}

/* A block, with zeros after its `count` values. */
INLINE void read(const void *from, int64_t count, float *wide, int type, int order) {
    if (count < BLOCK) memset(wide, 0, BLOCK * sizeof *wide);
    widen(from, count, wide, BLOCK / 2, type, order);
}

INLINE void write(const float *wide, int64_t count, void *into, int type) {
    narrow(wide, count, into, BLOCK / 2, type);
}

/* The larger; a NaN in `x` stays one. */
INLINE float at_least(float lowest, float x) { return x < lowest ? lowest : x; }

/* e^x within 2e-7 of it for x in [-87, 88], e^-87 below: x = n log 2 + r with |r| <= log(2) / 2, and a polynomial of
   r. */
INLINE float exponential(float x) {
    const float magic = 0x1.8p23f; /* adding it rounds to an integer, which the low bits then hold */
    x = at_least(LOWEST, x);
    float shifted = MULTIPLY_ADD(x, 0x1.715476p+0f, magic), n = shifted - magic;
    float r = MULTIPLY_ADD(n, -0x1.62ep-1f, x); /* log 2 in two parts: the products with the first are exact */
    r = MULTIPLY_ADD(n, -0x1.0bfbe8p-15f, r);
    float sum = 0x1.106252p-7f;
    sum = MULTIPLY_ADD(sum, r, 0x1.572a64p-5f);
    sum = MULTIPLY_ADD(sum, r, 0x1.5557bp-3f);
    sum = MULTIPLY_ADD(sum, r, 0x1.fffdfcp-2f);
    sum = MULTIPLY_ADD(sum, r, 1.0f);
    sum = MULTIPLY_ADD(sum, r, 1.0f);
    return float_of(bits_of(sum) + (bits_of(shifted) << 23));
}

INLINE float total(const float *lanes) {
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* Calls KERNEL(..., type) with a type that the compiler knows. */
#define BY_TYPE(KERNEL, ...) \
    do { \
        if (type == FLOAT32) KERNEL(__VA_ARGS__, FLOAT32); \
        else KERNEL(__VA_ARGS__, BFLOAT16); \
    } while (0)

/* Calls KERNEL(first, count, ...) for the blocks of a row; the count of whole ones is a constant. */
#define EACH_BLOCK(KERNEL, columns, ...) \
    do { \
        int64_t first = 0; \
        for (; first + BLOCK <= (columns); first += BLOCK) KERNEL(first, BLOCK, __VA_ARGS__); \
        if (first < (columns)) KERNEL(first, (columns) - first, __VA_ARGS__); \
    } while (0)

#define PARALLEL_ROWS _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")

/* ---- Root mean square norm: weight * x * scale, scale = 1 / sqrt(mean(x^2) + eps). ---- */

INLINE void add_squares(int64_t first, int64_t count, const void *x, float *lanes, int type) {
    float a[BLOCK];
    read(at(x, first, type), count, a, type, type);
    for (int i = 0; i < BLOCK; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = MULTIPLY_ADD(a[i + j], a[i + j], lanes[j]);
}

/* The block of a norm's weight that begins at `first`, in the order of `order`. */
ONCE void read_weight(int64_t first, int64_t count, const void *weight, float *wide, int type, int order) {
    if (type == FLOAT32 && order == FLOAT32) read(at(weight, first, FLOAT32), count, wide, FLOAT32, FLOAT32);
    else if (type == FLOAT32) read(at(weight, first, FLOAT32), count, wide, FLOAT32, BFLOAT16);
    else if (order == FLOAT32) read(at(weight, first, BFLOAT16), count, wide, BFLOAT16, FLOAT32);
    else read(at(weight, first, BFLOAT16), count, wide, BFLOAT16, BFLOAT16);
}

INLINE void norm_block(int64_t first, int64_t count, const void *x, const void *weight, int weight_type, float scale,
                       void *out, int type) {
    float a[BLOCK], w[BLOCK];
    read(at(x, first, type), count, a, type, type);
    read_weight(first, count, weight, w, weight_type, type);
    for (int i = 0; i < BLOCK; i++) a[i] = a[i] * scale * w[i];
    write(a, count, to(out, first, type), type);
}

INLINE void norm_row(const void *x, const void *weight, int weight_type, int64_t columns, float eps, void *out,
                     float *scale, int type) {
    float lanes[LANES] = {0};
    EACH_BLOCK(add_squares, columns, x, lanes, type);
    *scale = 1.0f / sqrtf(total(lanes) / (float)columns + eps);
    EACH_BLOCK(norm_block, columns, x, weight, weight_type, *scale, out, type);
}

/* x [rows, columns] with `stride` values from row to row, weight [columns] -> out [rows, columns], scales [rows]. */
void graft_rms_norm(const void *x, int64_t stride, const void *weight, int weight_type, int64_t rows, int64_t columns,
                    float eps, void *out, float *scales, int type, int threads) {
    (void)threads;
    PARALLEL_ROWS
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(norm_row, at(x, row * stride, type), weight, weight_type, columns, eps, to(out, row * columns, type),
                scales + row);
}

INLINE void add_products(int64_t first, int64_t count, const void *grad, const void *x, const void *weight,
                         int weight_type, float *lanes, int type) {
    float g[BLOCK], a[BLOCK], w[BLOCK];
    read(at(grad, first, type), count, g, type, type);
    read(at(x, first, type), count, a, type, type);
    read_weight(first, count, weight, w, weight_type, type);
    for (int i = 0; i < BLOCK; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = MULTIPLY_ADD(g[i + j] * w[i + j], a[i + j], lanes[j]);
}

INLINE void norm_back_block(int64_t first, int64_t count, const void *grad, const void *x, const void *weight,
                            int weight_type, float scale, float along, void *out, int type) {
    float g[BLOCK], a[BLOCK], w[BLOCK];
    read(at(grad, first, type), count, g, type, type);
    read(at(x, first, type), count, a, type, type);
    read_weight(first, count, weight, w, weight_type, type);
    for (int i = 0; i < BLOCK; i++) g[i] = MULTIPLY_ADD(-along, a[i], g[i] * w[i]) * scale;
    write(g, count, to(out, first, type), type);
}

INLINE void norm_back_row(const void *grad, const void *x, const void *weight, int weight_type, float scale,
                          int64_t columns, void *out, int type) {
    float lanes[LANES] = {0};
    EACH_BLOCK(add_products, columns, grad, x, weight, weight_type, lanes, type);
    float along = total(lanes) / (float)columns * scale * scale;
    EACH_BLOCK(norm_back_block, columns, grad, x, weight, weight_type, scale, along, out, type);
}

/* The gradient of x, [rows, columns]. */
void graft_rms_norm_backward(const void *grad, int64_t grad_stride, const void *x, int64_t stride, const void *weight,
                             int weight_type, const float *scales, int64_t rows, int64_t columns, void *out, int type,
                             int threads) {
    (void)threads;
    PARALLEL_ROWS
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(norm_back_row, at(grad, row * grad_stride, type), at(x, row * stride, type), weight, weight_type,
                scales[row], columns, to(out, row * columns, type));
}

/* ---- Gates: x * sigmoid(u(x)) * up. SiLU has u = x, GELU in its form with tanh u = A x + B x^3. ---- */

enum { SILU = 0, GELU = 1 };

INLINE float gate_slope(float x, int kind) {
    return kind == SILU ? 1.0f : MULTIPLY_ADD(0x1.b6676cp-3f * x, x, 0x1.988454p+0f);
}

INLINE float gate_share(float x, int kind) {
    float inner = kind == SILU ? x : x * MULTIPLY_ADD(0x1.2444f2p-4f * x, x, 0x1.988454p+0f);
    return 1.0f / (1.0f + exponential(-at_least(LOWEST, inner)));
}

INLINE void gate_block(int64_t first, int64_t count, const void *gate, const void *up, void *out, int kind, int type) {
    float a[BLOCK], b[BLOCK];
    read(at(gate, first, type), count, a, type, type);
    read(at(up, first, type), count, b, type, type);
    for (int i = 0; i < BLOCK; i++) {
        float x = at_least(LOWEST, a[i]);
        a[i] = x * gate_share(x, kind) * b[i];
    }
    write(a, count, to(out, first, type), type);
}

INLINE void gate_row(const void *gate, const void *up, int64_t columns, void *out, int kind, int type) {
    EACH_BLOCK(gate_block, columns, gate, up, out, kind, type);
}

INLINE void gate_back_block(int64_t first, int64_t count, const void *grad, const void *gate, const void *up,
                            void *of_gate, void *of_up, int kind, int type) {
    float g[BLOCK], a[BLOCK], b[BLOCK];
    read(at(grad, first, type), count, g, type, type);
    read(at(gate, first, type), count, a, type, type);
    read(at(up, first, type), count, b, type, type);
    for (int i = 0; i < BLOCK; i++) {
        float x = at_least(LOWEST, a[i]), share = gate_share(x, kind), opened = x * share;
        a[i] = g[i] * b[i] * MULTIPLY_ADD(opened * (1.0f - share), gate_slope(x, kind), share);
        b[i] = g[i] * opened;
    }
    write(a, count, to(of_gate, first, type), type);
    write(b, count, to(of_up, first, type), type);
}

INLINE void gate_back_row(const void *grad, const void *gate, const void *up, int64_t columns, void *of_gate,
                          void *of_up, int kind, int type) {
    EACH_BLOCK(gate_back_block, columns, grad, gate, up, of_gate, of_up, kind, type);
}

/* gate, up [rows, columns] -> out [rows, columns]; and the gradients of gate and up. */
#define GATE(name, kind) \
    void graft_##name(const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, int64_t rows, \
                      int64_t columns, void *out, int type, int threads) { \
        (void)threads; \
        PARALLEL_ROWS \
        for (int64_t row = 0; row < rows; row++) \
            BY_TYPE(gate_row, at(gate, row * gate_stride, type), at(up, row * up_stride, type), columns, \
                    to(out, row * columns, type), kind); \
    } \
    void graft_##name##_backward(const void *grad, int64_t grad_stride, const void *gate, int64_t gate_stride, \
                                 const void *up, int64_t up_stride, int64_t rows, int64_t columns, void *of_gate, \
                                 void *of_up, int type, int threads) { \
        (void)threads; \
        PARALLEL_ROWS \
        for (int64_t row = 0; row < rows; row++) \
            BY_TYPE(gate_back_row, at(grad, row * grad_stride, type), at(gate, row * gate_stride, type), \
                    at(up, row * up_stride, type), columns, to(of_gate, row * columns, type), \
                    to(of_up, row * columns, type), kind); \
    }

GATE(gated_silu, SILU)
GATE(gated_gelu, GELU)

/* ---- Rotary embedding: the two halves of a head turn together. ---- */

typedef struct {
    const void *values;  /* [batch, heads, tokens, width], by these strides; a head is contiguous */
    int64_t batch_stride, head_stride, token_stride;
    int64_t heads;
    void *out;           /* [batch, tokens, heads, width], contiguous */
} Heads;

typedef struct {
    float first_cos[HALF], second_cos[HALF], first_sin[HALF], second_sin[HALF];
} Angles;

INLINE void turn_head(const void *x, int64_t half, int64_t width, const Angles *angles, void *out, int type) {
    float a[HALF], b[HALF], turned[HALF];
    int64_t odd = (half + 1) / 2;
    widen(x, half, a, odd, type, type);
    widen(at(x, half, type), half, b, odd, type, type);
    for (int64_t i = 0; i < half; i++)
        turned[i] = MULTIPLY_ADD(a[i], angles->first_cos[i], -(b[i] * angles->first_sin[i]));
    narrow(turned, half, out, odd, type);
    for (int64_t i = 0; i < half; i++)
        turned[i] = MULTIPLY_ADD(b[i], angles->second_cos[i], a[i] * angles->second_sin[i]);
    narrow(turned, half, to(out, half, type), odd, type);
    if (width > 2 * half)
        memcpy(to(out, 2 * half, type), at(x, 2 * half, type), (size_t)((width - 2 * half) * size_of(type)));
}

INLINE void turn_heads(const Heads *x, int64_t batch, int64_t token, int64_t tokens, int64_t half, int64_t width,
                       const Angles *angles, int type) {
    int64_t start = batch * x->batch_stride + token * x->token_stride;
    for (int64_t head = 0; head < x->heads; head++) {
        const void *from = at(x->values, start + head * x->head_stride, type);
        void *into = to(x->out, ((batch * tokens + token) * x->heads + head) * width, type);
        if (half == 32) turn_head(from, 32, width, angles, into, type);
        else if (half == 64) turn_head(from, 64, width, angles, into, type);
        else turn_head(from, half, width, angles, into, type);
    }
}

/* `half` cosines or sines in the order of `order`. */
ONCE void read_angle(const void *from, int64_t half, float *wide, int type, int order) {
    int64_t odd = (half + 1) / 2;
    if (type == FLOAT32) widen(from, half, wide, odd, FLOAT32, order);
    else widen(from, half, wide, odd, BFLOAT16, order);
}

INLINE void read_angles(const void *cosines, const void *sines, int64_t half, int angle_type, int inverse,
                        Angles *angles, int type) {
    float *first = inverse ? angles->second_sin : angles->first_sin;
    float *second = inverse ? angles->first_sin : angles->second_sin;
    read_angle(cosines, half, angles->first_cos, angle_type, type);
    read_angle(at(cosines, half, angle_type), half, angles->second_cos, angle_type, type);
    read_angle(sines, half, first, angle_type, type);
    read_angle(at(sines, half, angle_type), half, second, angle_type, type);
    for (int64_t i = 0; i < (inverse ? half : 0); i++) {
        first[i] = -first[i];
        second[i] = -second[i];
    }
}

INLINE void turn_token(const Heads *both, int64_t batch, int64_t token, int64_t tokens, const void *cosines,
                       const void *sines, int64_t half, int64_t width, int angle_type, int inverse, int type) {
    Angles angles;
    read_angles(cosines, sines, half, angle_type, inverse, &angles, type);
    for (int i = 0; i < 2; i++) turn_heads(both + i, batch, token, tokens, half, width, &angles, type);
}

/* The first 2 `half` of the `width` values of every head of `both`, queries and keys. Cosines and sines [batch or 1,
   tokens, 2 half] of `angle_type`, with `angle_stride` values from one batch to the next (0: the same for all).
   `inverse`: the transposed rotation. */
void graft_rope(const Heads *both, const void *cosines, const void *sines, int64_t angle_stride,
                int64_t batches, int64_t tokens, int64_t half, int64_t width, int angle_type, int inverse, int type,
                int threads) {
    (void)threads;
    PARALLEL_ROWS
    for (int64_t row = 0; row < batches * tokens; row++) {
        int64_t batch = row / tokens, token = row % tokens, angle = batch * angle_stride + token * 2 * half;
        BY_TYPE(turn_token, both, batch, token, tokens, at(cosines, angle, angle_type), at(sines, angle, angle_type),
                half, width, angle_type, inverse);
    }
}

/* ---- Cross-entropy: a piece of the vocabulary at a time. ---- */

INLINE void largest_of_block(int64_t first, int64_t count, const void *logits, float *lanes, int type) {
    float a[BLOCK];
    if (count < BLOCK)
        for (int i = 0; i < BLOCK; i++) a[i] = -INFINITY;
    widen(at(logits, first, type), count, a, BLOCK / 2, type, type);
    for (int i = 0; i < BLOCK; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = lanes[j] > a[i + j] ? lanes[j] : a[i + j];
}

INLINE void exponentials_of_block(int64_t first, int64_t count, void *logits, float largest, float *lanes, int type) {
    float a[BLOCK];
    if (count < BLOCK)
        for (int i = 0; i < BLOCK; i++) a[i] = -INFINITY;
    widen(at(logits, first, type), count, a, BLOCK / 2, type, type);
    for (int i = 0; i < BLOCK; i += LANES)
        for (int j = 0; j < LANES; j++) {
            a[i + j] = exponential(a[i + j] - largest);
            lanes[j] += a[i + j];
        }
    write(a, count, to(logits, first, type), type);
}

INLINE void softmax_row(void *logits, int64_t columns, int64_t label, float *largest, float *others, float *of_label,
                        float *shrink, int type) {
    float most[LANES], sums[LANES] = {0}, now = *largest;
    for (int j = 0; j < LANES; j++) most[j] = -INFINITY;
    EACH_BLOCK(largest_of_block, columns, logits, most, type);
    for (int j = 0; j < LANES; j++) now = most[j] > now ? most[j] : now;
    int is_here = label >= 0 && label < columns;
    if (is_here) {
        *of_label = get(logits, label, type);
        put(logits, label, -INFINITY, type);
    }
    EACH_BLOCK(exponentials_of_block, columns, logits, now, sums, type);
    if (is_here) put(logits, label, 0.0f, type);
    *shrink = exponential(*largest - now);
    *others = MULTIPLY_ADD(*others, *shrink, total(sums));
    *largest = now;
}

/* logits [rows, columns] -> e^(logit - largest) in place, with a zero at the label. `largest`, `others` (sum of the
   exponentials without the label's) and `of_label` (its logit) [rows] are carried from piece to piece; `shrink` [rows]
   is what earlier exponentials are to be multiplied with. `first` is the number of the first column. */
void graft_softmax_piece(void *logits, int64_t rows, int64_t columns, const int64_t *labels, int64_t first,
                         float *largest, float *others, float *of_label, float *shrink, int type, int threads) {
    (void)threads;
    PARALLEL_ROWS
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(softmax_row, to(logits, row * columns, type), columns, labels[row] - first, largest + row, others + row,
                of_label + row, shrink + row);
}

INLINE void shrink_and_add_block(int64_t first, int64_t count, float *gathered, float shrink, const void *part,
                                 int type) {
    for (int64_t i = first; i < first + count; i++) gathered[i] = MULTIPLY_ADD(gathered[i], shrink, get(part, i, type));
}

INLINE void shrink_and_add_row(float *gathered, float shrink, const void *part, int64_t columns, int type) {
    EACH_BLOCK(shrink_and_add_block, columns, gathered, shrink, part, type);
}

/* gathered [rows, columns] = gathered * shrink [rows] + part [rows, columns]. */
void graft_shrink_and_add(float *gathered, const float *shrink, const void *part, int64_t rows, int64_t columns,
                          int type, int threads) {
    (void)threads;
    PARALLEL_ROWS
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(shrink_and_add_row, gathered + row * columns, shrink[row], at(part, row * columns, type), columns);
}
