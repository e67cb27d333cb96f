/* Attention within documents on a CPU: bfloat16 in and out, sums in float32, scores never kept.

   The method is that of arXiv 2205.14135. Scores are computed transposed, keys down and queries across, so that the
   largest score, the sum and the gradient's mean of a query are lanes of registers and nothing is summed across one.
   Everything is cut into groups of 32 keys or queries; a group that no query sees is skipped. Each value is summed in
   one order by one thread, whatever their number. Compiled at first use, called by attention_call.py. */

#include "attention_forward.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

#if !defined(WIDE)
int graft_attention_state(void) { return 0; }
#else
#define KEYS 8 /* groups of keys that backward takes at a time, */
#define QUERIES 8 /* with as many of queries */

/* 0: this processor lacks wide registers, 1: they serve, 2: a matrix unit serves. */
int graft_attention_state(void) { return 1 + allow_tiles(); }

typedef struct {
    uint16_t *keys, *values, *key_columns;                        /* those in front, then a document's own */
    uint16_t *q_lanes, *q_pairs, *grad_lanes, *grad_pairs;        /* of all queries of a head */
    float *lse, *means, *dq, *dk, *dv;                            /* lse in powers of two */
    uint16_t *weights, *gradients, *pairs;                        /* of QUERIES groups; pairs: of KEYS each */
    float *scores;                                                /* two groups */
} Work;

static Work work_of(int64_t keys, int64_t queries, int64_t deep, uint8_t **memory) {
    int64_t size = 1024 * deep;
    Work w;
    w.keys = take(memory, 2 * size * keys);
    w.values = take(memory, 2 * size * keys);
    w.key_columns = take(memory, 2 * size * keys);
    w.q_lanes = take(memory, 2 * size * queries);
    w.q_pairs = take(memory, 2 * size * queries);
    w.grad_lanes = take(memory, 2 * size * queries);
    w.grad_pairs = take(memory, 2 * size * queries);
    w.lse = take(memory, 4 * GROUP * queries);
    w.means = take(memory, 4 * GROUP * queries);
    w.dq = take(memory, 4 * size * queries);
    w.dk = take(memory, 4 * size * keys);
    w.dv = take(memory, 4 * size * keys);
    w.weights = take(memory, 2 * 1024 * QUERIES);
    w.gradients = take(memory, 2 * 1024 * QUERIES);
    w.pairs = take(memory, 2 * 1024 * QUERIES * KEYS);
    w.scores = take(memory, 4 * 2 * 1024);
    return w;
}

/* Bytes that one task needs: documents of so many tokens, behind `shared` keys and `above` others. */
int64_t graft_attention_space(int64_t tokens, int64_t shared, int64_t above, int64_t width, int backward) {
    int64_t deep = (width + 31) / 32, keys = groups_of(tokens) + groups_of(shared) + groups_of(above);
    uint8_t *start = (uint8_t *)64, *stop = start;
    if (!backward) return 4096 * deep * keys + 6144 * (deep + KEYS);
    work_of(keys, groups_of(tokens), deep, &stop);
    return stop - start;
}

/* Weights of a group of keys and one of queries, and the gradient of their scores. */
static inline __attribute__((always_inline)) void differentiate(const float *scores, const float *lse,
                                                                const float *means, const Sight *sight, int partly,
                                                                float scale, uint16_t *weights, uint16_t *gradients,
                                                                uint16_t *pairs) {
    __m512 factor = _mm512_set1_ps(scale * LOG2E);
    __m512 sum[2] = {_mm512_load_ps(lse), _mm512_load_ps(lse + 16)};
    __m512 mean[2] = {_mm512_load_ps(means), _mm512_load_ps(means + 16)};
    for (int r = 0; r < GROUP; r += 2, scores += r == 16 ? 32 + 256 : 32) {
        __m512i both[2];
        for (int i = 0; i < 2; i++) {
            __m512 weight[2], gradient[2];
            const float *score = scores + 16 * i, *of_weight = score + 1024;
            for (int half = 0; half < 2; half++) {
                weight[half] = power(_mm512_fmsub_ps(_mm512_load_ps(score + 256 * half), factor, sum[half]));
                if (partly) weight[half] = _mm512_maskz_mov_ps(seen(sight, r + i, half), weight[half]);
                gradient[half] = _mm512_sub_ps(_mm512_load_ps(of_weight + 256 * half), mean[half]);
                gradient[half] = _mm512_mul_ps(weight[half], gradient[half]);
            }
            both[i] = rounded(gradient[0], gradient[1]);
            _mm512_store_si512(weights + 32 * (r + i), rounded(weight[0], weight[1]));
            _mm512_store_si512(gradients + 32 * (r + i), both[i]);
        }
        put_pair(pairs, r, both[0], both[1]);
    }
}

/* Packs what backward needs of the queries of one head. */
static void prepare(const Attention *a, const Piece *p, int64_t head, const Work *w) {
    int64_t deep = (a->width + 31) / 32, size = 1024 * deep;
    const Heads *q = &a->q, *grad = &a->grad, *out = &a->out;
    for (int64_t group = 0; group < groups_of(p->to); group++) {
        int64_t token = p->first + GROUP * group, count = least(GROUP, p->last - token), at = group * size;
        pack(q->at + token * q->token + head * q->head, q->token, count, a->width,
             (Packed){.lanes = w->q_lanes + at, .pairs = w->q_pairs + at});
        pack(grad->at + token * grad->token + head * grad->head, grad->token, count, a->width,
             (Packed){.lanes = w->grad_lanes + at, .pairs = w->grad_pairs + at});
        for (int64_t i = 0; i < GROUP; i++) {
            const uint16_t *g = grad->at + (token + i) * grad->token + head * grad->head;
            const uint16_t *o = out->at + (token + i) * out->token + head * out->head;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t c = 0; c < a->width && i < count; c += 32) {
                __mmask32 some = columns_of(a->width - c);
                __m512i one = _mm512_maskz_loadu_epi16(some, g + c), other = _mm512_maskz_loadu_epi16(some, o + c);
                sum = add_products(sum, one, other);
            }
            w->means[GROUP * group + i] = _mm512_reduce_add_ps(sum);
            w->lse[GROUP * group + i] = i < count ? LOG2E * a->lse[head * a->tokens + token + i] : -LEAST;
        }
    }
}

/* Scores of a group of keys and one of queries, and the gradient of their weights. */
static inline void compare(const Work *w, int64_t k, int64_t q, int64_t deep) {
    int64_t size = 1024 * deep;
    Side keys = {w->keys + k * size, deep * TILE, TILE}, queries = {w->q_lanes + q * size, TILE, 2 * TILE};
    Side values = {w->values + k * size, deep * TILE, TILE}, grad = {w->grad_lanes + q * size, TILE, 2 * TILE};
    multiply(keys, queries, deep, (Sums){w->scores, 512, 256}, 0);
    multiply(values, grad, deep, (Sums){w->scores + 1024, 512, 256}, 0);
}

/* Gradients from a block of groups of keys, all in front or none, and one of queries. `add_keys`: to sums of keys that
   are set already; else what comes first sets them: the queries beside a group of keys see it, or all do. */
static void descend(const Attention *a, const Piece *p, const Work *w, int add_keys, int64_t k0, int64_t k1, int64_t q0,
                    int64_t q1) {
    int64_t deep = (a->width + 31) / 32, size = 1024 * deep, before = in_front(a, p);
    int front = k0 < before;
    for (int64_t k = k0; k < k1; k++) {
        int64_t first = front ? q0 : most(q0, k - before);
        int64_t last = front ? q1 : least(q1, newest_of(k - before, a->window) + 1);
        for (int64_t q = first; q < last; q++) {
            compare(w, k, q, deep);
            Sight sight = sight_of(front ? keys_of(a, p, k).left : GROUP * (q - k + before), front, a->window);
            const float *lse = w->lse + GROUP * q, *means = w->means + GROUP * q;
            uint16_t *weights = w->weights + 1024 * (q - q0), *gradients = w->gradients + 1024 * (q - q0);
            uint16_t *pairs = w->pairs + 1024 * ((k - k0) * QUERIES + q - q0);
            if (sight.partly) differentiate(w->scores, lse, means, &sight, 1, a->scale, weights, gradients, pairs);
            else differentiate(w->scores, lse, means, &sight, 0, a->scale, weights, gradients, pairs);
        }
        int add = add_keys || first != (front ? 0 : k - before);
        for (int64_t i = 0; i < deep && first < last; i++) {
            int64_t at = first * size + 2 * i * TILE;
            Side weights = {w->weights + 1024 * (first - q0), TILE, 1024}, grad = {w->grad_pairs + at, TILE, size};
            Side gradients = {w->gradients + 1024 * (first - q0), TILE, 1024}, q = {w->q_pairs + at, TILE, size};
            multiply(weights, grad, last - first, (Sums){w->dv + k * size + 512 * i, 512 * deep, 256}, add);
            multiply(gradients, q, last - first, (Sums){w->dk + k * size + 512 * i, 512 * deep, 256}, add);
        }
    }
    for (int64_t q = q0; q < q1; q++) {
        int64_t first = front ? k0 : most(k0, before + oldest_of(GROUP * q, a->window));
        int64_t last = front ? k1 : least(k1, before + q + 1);
        int add = first > (before ? 0 : oldest_of(GROUP * q, a->window));
        for (int64_t i = 0; i < deep && first < last; i++)
            multiply((Side){w->key_columns + first * size + 2 * i * TILE, TILE, size},
                     (Side){w->pairs + 1024 * ((first - k0) * QUERIES + q - q0), TILE, 1024 * QUERIES}, last - first,
                     (Sums){w->dq + q * size + 1024 * i, 512, 256}, add);
    }
}

/* Sums of a group, tokens x width, times a factor: `count` rows of bfloat16 or, where `wide` is given, of float32. */
static void put_keys(const float *sums, float factor, int64_t count, int64_t width, uint16_t *out, int64_t token,
                     float *wide) {
    int64_t deep = (width + 31) / 32;
    for (int64_t i = 0; i < count; i++)
        for (int64_t at = 0; at < width; at += 32) {
            const float *row = sums + i / 16 * 512 * deep + at * 16 + i % 16 * 16;
            __mmask32 some = columns_of(width - at);
            __m512 low = _mm512_mul_ps(_mm512_load_ps(row), _mm512_set1_ps(factor));
            __m512 high = _mm512_mul_ps(_mm512_load_ps(row + 256), _mm512_set1_ps(factor));
            if (wide) {
                _mm512_mask_storeu_ps(wide + i * width + at, (__mmask16)some, low);
                _mm512_mask_storeu_ps(wide + i * width + at + 16, (__mmask16)(some >> 16), high);
            } else
                _mm512_mask_storeu_epi16(out + i * token + at, some, rounded(low, high));
        }
}

/* Gradients of a document's own keys and values. */
static void put_own(const Attention *a, const Piece *p, int64_t head, const Work *w) {
    int64_t size = 1024 * ((a->width + 31) / 32), before = in_front(a, p);
    for (int64_t k = before; k < before + groups_of(p->to); k++) {
        Keys to = keys_of(a, p, k);
        put_keys(w->dk + k * size, a->scale, least(GROUP, to.left), a->width,
                 a->dk.at + to.token * a->dk.token + head * a->dk.head, a->dk.token, NULL);
        put_keys(w->dv + k * size, 1.0f, least(GROUP, to.left), a->width,
                 a->dv.at + to.token * a->dv.token + head * a->dv.head, a->dv.token, NULL);
    }
}

/* What a task adds to the gradients of shared keys and values. */
static void put_partial(const Attention *a, int64_t task, int64_t head, const Work *w) {
    int64_t size = 1024 * ((a->width + 31) / 32);
    float *partial = a->partial + (task * a->heads + head) * 2 * a->shared * a->width;
    for (int64_t k = 0; k < groups_of(a->shared); k++) {
        float *to = partial + GROUP * k * a->width;
        int64_t count = least(GROUP, a->shared - GROUP * k);
        put_keys(w->dk + k * size, a->scale, count, a->width, NULL, 0, to);
        put_keys(w->dv + k * size, 1.0f, count, a->width, NULL, 0, to + a->shared * a->width);
    }
}

/* One document; `continues`: what is in front of it is packed, and its sums are set. */
static void attend_document(const Attention *a, const Piece *p, int64_t head, int continues, const Work *w) {
    int64_t deep = (a->width + 31) / 32, size = 1024 * deep, before = in_front(a, p);
    int64_t queries = groups_of(p->to), all = before + queries;
    for (int64_t j = continues ? before : 0; j < all; j++) {
        Keys from = keys_of(a, p, j);
        pack(a->k.at + from.token * a->k.token + head * a->k.head, a->k.token, from.left, a->width,
             (Packed){.rows = w->keys + j * size, .columns = w->key_columns + j * size});
        pack(a->v.at + from.token * a->v.token + head * a->v.head, a->v.token, from.left, a->width,
             (Packed){.rows = w->values + j * size});
    }
    __m512 factor = _mm512_set1_ps(a->scale);
    for (int64_t h = head * a->grouped; h < (head + 1) * a->grouped; h++) {
        int later = h > head * a->grouped;
        prepare(a, p, h, w);
        for (int64_t k = 0, next; k < all; k = next) {
            next = least(k + KEYS, k < before ? before : all);
            int64_t first = k < before ? 0 : (k - before) / QUERIES * QUERIES;
            int64_t last = k < before ? queries : least(queries, newest_of(next - 1 - before, a->window) + 1);
            for (int64_t q = first; q < last; q += QUERIES)
                descend(a, p, w, later || (continues && k < before), k, next, q, least(q + QUERIES, queries));
        }
        for (int64_t q = 0; q < queries; q++) {
            int64_t token = p->first + GROUP * q;
            put_queries(w->dq + q * size, factor, factor, least(GROUP, p->last - token), a->width,
                        a->dq.at + token * a->dq.token + h * a->dq.head, a->dq.token);
        }
    }
}

/* A document and those that continue it, whose gradients are added up in its keys. */
static void attend_backward(const Attention *a, const Piece *pieces, int64_t count, int64_t task, int64_t head,
                            uint8_t *memory) {
    int64_t queries = 0, keys = 0;
    for (int64_t i = 0; i < count; i++) {
        queries = most(queries, groups_of(pieces[i].to));
        keys = most(keys, in_front(a, pieces + i) + groups_of(pieces[i].to));
    }
    Work w = work_of(keys, queries, (a->width + 31) / 32, &memory);
    for (int64_t i = 0; i < count; i++) {
        attend_document(a, pieces + i, head, i > 0, &w);
        if (i > 0) put_own(a, pieces + i, head, &w);
    }
    put_own(a, pieces, head, &w);
    put_partial(a, task, head, &w);
}

/* Gradients of shared keys and values: the tasks' parts, summed in their order. */
static void put_shared(const Attention *a, int64_t head) {
    int64_t part = a->shared * a->width;
    for (int64_t i = 0; i < 2 * part; i++) {
        const float *from = a->partial + head * 2 * part + i;
        float sum = 0;
        for (int64_t task = 0; task < a->tasks; task++) sum += from[task * a->heads * 2 * part];
        const Heads *to = i < part ? &a->dk : &a->dv;
        int64_t row = i % part / a->width, column = i % a->width;
        __m512i value = rounded(_mm512_set1_ps(sum), _mm512_setzero_ps());
        to->at[row * to->token + head * to->head + column] = (uint16_t)_mm512_cvtsi512_si32(value);
    }
}

/* All tasks of all heads of keys, each by one thread with `space` bytes of `memory`, 64-byte aligned. A task's pieces
   are those from ends[task] to before ends[task + 1]: one in forward, in backward a whole document and all that
   continue it. */
void graft_attention(const Attention *a, const Piece *pieces, const int64_t *ends, int backward, uint8_t *memory,
                     int64_t space, int threads) {
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = 0;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->tasks * a->heads; i++) {
            int64_t task = i / a->heads, head = i % a->heads, first = ends[task];
            uint8_t *own = memory + thread * space;
            if (backward) attend_backward(a, pieces + first, ends[task + 1] - first, task, head, own);
            else attend(a, pieces + first, head, own);
        }
        end();
        if (backward && a->shared) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < a->heads; head++) put_shared(a, head);
        }
    }
}
#endif
