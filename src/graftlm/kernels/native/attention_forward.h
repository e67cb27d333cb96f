/* Forward of attention.c: what it is given, who sees whom, and the products for one group of queries. */

#include "tiles.h"

#if defined(WIDE)
#define MANY 4         /* groups of keys that are taken at a time */
#define LEAST (-1e30f) /* less than any score */

typedef struct {
    uint16_t *at; /* [tokens, heads, width], the last contiguous */
    int64_t token, head;
} Heads;

typedef struct {
    Heads q, k, v, out, grad, dq, dk, dv;
    float *lse;     /* [query heads, tokens] */
    float *partial; /* gradients of shared keys and values by task: [tasks, heads, 2, shared, width] */
    int64_t tokens, shared, tasks;
    int64_t heads, grouped; /* of keys, and of queries for each */
    int64_t width, window;
    float scale;
} Attention;

typedef struct {
    int64_t first, last;             /* tokens of a document */
    int64_t from, to;                /* queries of it, counted from its first token; `from` a multiple of GROUP */
    int64_t above_first, above_last; /* tokens of the document that it continues, all of which it sees */
} Piece;

/* Groups of keys in front of a document's own, all of whose keys every query sees: those of shared ones come first. */
static int64_t in_front(const Attention *a, const Piece *p) {
    return groups_of(a->shared) + groups_of(p->above_last - p->above_first);
}

/* Where a group of keys begins among all of them, and how many are left from there in its part. */
typedef struct {
    int64_t token, left;
} Keys;

static Keys keys_of(const Attention *a, const Piece *p, int64_t group) {
    int64_t shared = groups_of(a->shared), before = in_front(a, p);
    int64_t at = GROUP * (group - (group < shared ? 0 : group < before ? shared : before));
    if (group < shared) return (Keys){at, a->shared - at};
    if (group < before) return (Keys){a->shared + p->above_first + at, p->above_last - p->above_first - at};
    return (Keys){a->shared + p->first + at, p->to - at};
}

/* Which queries of a group see which keys of one: those at a distance of 0 to `window` - 1. */
typedef struct {
    __m512i distance[2]; /* of the first key */
    __m512i window;
    int partly; /* not all */
} Sight;

/* `apart`: from the first key to the first query; of keys in front so many are left, which every query sees. */
static inline Sight sight_of(int64_t apart, int front, int64_t window) {
    Sight sight;
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i start = _mm512_set1_epi32((int32_t)(front ? apart - 1 : apart));
    sight.distance[0] = front ? start : _mm512_add_epi32(start, lane);
    sight.distance[1] = front ? start : _mm512_add_epi32(sight.distance[0], _mm512_set1_epi32(16));
    sight.window = _mm512_set1_epi32((int32_t)(front ? INT32_MAX : window));
    sight.partly = front ? apart < GROUP : apart < GROUP - 1 || apart + GROUP > window;
    return sight;
}

static inline __mmask16 seen(const Sight *sight, int row, int half) {
    __m512i distance = _mm512_sub_epi32(sight->distance[half], _mm512_set1_epi32(row));
    return _mm512_cmplt_epu32_mask(distance, sight->window);
}

/* Lane 4 i + j of a half of `mixed` holds query 8 i + 4 half + j: what interleaving two rows leads to. */
static inline __m512 mixed(__m512 first, __m512 second, int half) {
    __m512i index = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
    return _mm512_permutex2var_ps(first, _mm512_add_epi32(index, _mm512_set1_epi32(4 * half)), second);
}

/* Two rows of 32 values into a pair of two right tiles, lanes mixed. */
static inline void put_pair(uint16_t *tiles, int row, __m512i first, __m512i second) {
    _mm512_store_si512(tiles + 16 * row, _mm512_unpacklo_epi16(first, second));
    _mm512_store_si512(tiles + TILE + 16 * row, _mm512_unpackhi_epi16(first, second));
}

/* A tile of sums, a factor for each column, turned over. */
static inline __attribute__((always_inline)) void turn(const float *tile, __m512 factor, __m512i *row) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        row[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(tile + 16 * i), factor));
    transpose(row);
}

/* Sums, width x queries with lanes mixed, times a factor a query, as rows of `count` queries. */
static void put_queries(const float *sums, __m512 first, __m512 second, int64_t count, int64_t width, uint16_t *out,
                        int64_t token) {
    for (int64_t at = 0; at < width; at += 32)
        for (int half = 0; half < 2; half++) {
            __m512 factor = mixed(first, second, half);
            __m512i low[16], high[16];
            turn(sums + at * 32 + half * 256, factor, low);
            turn(sums + at * 32 + half * 256 + 512, factor, high);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                int64_t query = 8 * (i / 4) + 4 * half + i % 4;
                __m512i both = rounded(_mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
                if (query < count) _mm512_mask_storeu_epi16(out + query * token + at, columns_of(width - at), both);
            }
        }
}

/* Memory of a task, in order. */
static void *take(uint8_t **memory, int64_t bytes) {
    void *here = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return here;
}

/* First group of own keys that a query sees, and last group of queries that sees any of a group of keys. */
static int64_t oldest_of(int64_t query, int64_t window) { return most(0, query - window + 1) / GROUP; }

static int64_t newest_of(int64_t group, int64_t window) { return (GROUP * group + GROUP + window - 2) / GROUP; }

typedef struct {
    uint16_t *queries, *weights; /* a group packed as lanes; MANY groups of pairs */
    float *scores, *sums;        /* MANY groups; width x queries */
    __m512 highest[2], total[2]; /* in powers of two; lanes are queries */
    int empty;
} State;

/* The highest scores of a group of keys, query by query. */
static inline __attribute__((always_inline)) void raise(__m512 *highest, const float *scores, const Sight *sight,
                                                        int partly) {
    __m512 top[4][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) top[i / 2][i % 2] = highest[i % 2];
    for (int r = 0; r < GROUP; r += 4, scores += r == 16 ? 64 + 256 : 64)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m512 score = _mm512_load_ps(scores + i / 2 * 16 + i % 2 * 256), *to = &top[i / 2][i % 2];
            *to = partly ? _mm512_mask_max_ps(*to, seen(sight, r + i / 2, i % 2), *to, score)
                         : _mm512_max_ps(*to, score);
        }
    for (int half = 0; half < 2; half++)
        highest[half] = _mm512_max_ps(_mm512_max_ps(top[0][half], top[1][half]),
                                      _mm512_max_ps(top[2][half], top[3][half]));
}

/* Weights of a group of keys as pairs, and their totals. */
static inline __attribute__((always_inline)) void weigh(const float *scores, __m512 factor, const __m512 *highest,
                                                        const Sight *sight, int partly, __m512 *total,
                                                        uint16_t *pairs) {
    __m512 sum[2][2] = {{total[0], total[1]}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    for (int r = 0; r < GROUP; r += 2, scores += r == 16 ? 32 + 256 : 32) {
        __m512i both[2];
        for (int i = 0; i < 2; i++) {
            __m512 weight[2];
            for (int half = 0; half < 2; half++) {
                __m512 score = _mm512_load_ps(scores + 16 * i + 256 * half);
                weight[half] = power(_mm512_fmsub_ps(score, factor, highest[half]));
                if (partly) weight[half] = _mm512_maskz_mov_ps(seen(sight, r + i, half), weight[half]);
                sum[i][half] = _mm512_add_ps(sum[i][half], weight[half]);
            }
            both[i] = rounded(weight[0], weight[1]);
        }
        put_pair(pairs, r, both[0], both[1]);
    }
    for (int half = 0; half < 2; half++) total[half] = _mm512_add_ps(sum[0][half], sum[1][half]);
}

/* Adds `count` groups of keys, own ones or in front. The first key stands `apart` before the queries; of keys in
   front that many are left. */
static void see(State *s, const uint16_t *keys, const uint16_t *values, int64_t count, int64_t deep, int64_t apart,
                int front, int64_t window, float scale) {
    int64_t size = 1024 * deep;
    __m512 top[2] = {_mm512_set1_ps(LEAST), _mm512_set1_ps(LEAST)}, factor = _mm512_set1_ps(scale * LOG2E);
    __m512 highest[2], total[2], shrink[2];
    for (int64_t j = 0; j < count; j++)
        multiply((Side){keys + j * size, deep * TILE, TILE}, (Side){s->queries, TILE, 2 * TILE}, deep,
                 (Sums){s->scores + 1024 * j, 512, 256}, 0);
    for (int64_t j = 0; j < count; j++) {
        Sight sight = sight_of(apart - GROUP * j, front, window);
        if (sight.partly) raise(top, s->scores + 1024 * j, &sight, 1);
        else raise(top, s->scores + 1024 * j, &sight, 0);
    }
    __mmask16 changed = 0;
    for (int half = 0; half < 2; half++) {
        highest[half] = _mm512_max_ps(s->highest[half], _mm512_mul_ps(top[half], factor));
        shrink[half] = power(_mm512_sub_ps(s->highest[half], highest[half]));
        changed |= _mm512_cmp_ps_mask(shrink[half], _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
        total[half] = _mm512_mul_ps(s->total[half], shrink[half]);
        s->highest[half] = highest[half];
    }
    for (int64_t j = 0; j < count; j++) {
        Sight sight = sight_of(apart - GROUP * j, front, window);
        if (sight.partly) weigh(s->scores + 1024 * j, factor, highest, &sight, 1, total, s->weights + 1024 * j);
        else weigh(s->scores + 1024 * j, factor, highest, &sight, 0, total, s->weights + 1024 * j);
    }
    for (int half = 0; half < 2; half++) s->total[half] = total[half];
    for (int half = 0; half < 2 && changed && !s->empty; half++) {
        __m512 by = mixed(shrink[0], shrink[1], half);
        for (int64_t i = 0; i < size; i += 512)
            for (float *at = s->sums + i + 256 * half; at < s->sums + i + 256 * half + 256; at += 16)
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
    }
    for (int64_t i = 0; i < deep; i++)
        multiply((Side){values + 2 * i * TILE, TILE, size}, (Side){s->weights, TILE, 1024}, count,
                 (Sums){s->sums + 1024 * i, 512, 256}, !s->empty);
    s->empty = 0;
}

/* One group of queries of one head; `keys` and `values` are packed: those in front, and own ones from a group on. */
static void attend_group(const Attention *a, const Piece *p, int64_t head, int64_t group, const uint16_t *keys,
                         const uint16_t *values, int64_t packed_from, State *s) {
    int64_t deep = (a->width + 31) / 32, size = 1024 * deep, shared = groups_of(a->shared), before = in_front(a, p);
    int64_t query = GROUP * group, token = p->first + query, count = least(GROUP, p->to - query);
    int64_t oldest = oldest_of(query, a->window), all = before + group + 1 - oldest;
    const Heads *q = &a->q, *out = &a->out;
    pack(q->at + token * q->token + head * q->head, q->token, count, a->width, (Packed){.lanes = s->queries});
    for (int half = 0; half < 2; half++) {
        s->highest[half] = _mm512_set1_ps(LEAST);
        s->total[half] = _mm512_setzero_ps();
    }
    s->empty = 1;
    for (int64_t j = 0, next; j < all; j = next) {
        int front = j < before;
        int64_t own = j - before + oldest, at = (front ? j : j + oldest - packed_from) * size;
        next = least(j + MANY, j < shared ? shared : front ? before : all);
        see(s, keys + at, values + at, next - j, deep, front ? keys_of(a, p, j).left : query - GROUP * own, front,
            a->window, a->scale);
    }
    __m512 one = _mm512_set1_ps(1.0f);
    put_queries(s->sums, _mm512_div_ps(one, s->total[0]), _mm512_div_ps(one, s->total[1]), count, a->width,
                out->at + token * out->token + head * out->head, out->token);
    for (int64_t half = 0; half < 2; half++) {
        int64_t left = most(0, least(16, count - 16 * half));
        __m512 sum = _mm512_add_ps(s->highest[half], logarithm(s->total[half]));
        _mm512_mask_storeu_ps(a->lse + head * a->tokens + token + 16 * half, (__mmask16)((1u << left) - 1u),
                              _mm512_mul_ps(sum, _mm512_set1_ps(LN2)));
    }
}

static void attend(const Attention *a, const Piece *p, int64_t head, uint8_t *memory) {
    int64_t deep = (a->width + 31) / 32, size = 1024 * deep, before = in_front(a, p);
    int64_t oldest = oldest_of(p->from, a->window), newest = groups_of(p->to), all = before + newest - oldest;
    uint16_t *keys = take(&memory, 2 * size * all), *values = take(&memory, 2 * size * all);
    State state;
    state.queries = take(&memory, 2 * size);
    state.sums = take(&memory, 4 * size);
    state.weights = take(&memory, 2 * 1024 * MANY);
    state.scores = take(&memory, 4 * 1024 * MANY);
    for (int64_t j = 0; j < all; j++) {
        Keys from = keys_of(a, p, j < before ? j : j + oldest);
        pack(a->k.at + from.token * a->k.token + head * a->k.head, a->k.token, from.left, a->width,
             (Packed){.rows = keys + j * size});
        pack(a->v.at + from.token * a->v.token + head * a->v.head, a->v.token, from.left, a->width,
             (Packed){.columns = values + j * size});
    }
    for (int64_t h = head * a->grouped; h < (head + 1) * a->grouped; h++)
        for (int64_t group = p->from / GROUP; group < newest; group++)
            attend_group(a, p, h, group, keys, values, oldest, &state);
}
#endif
