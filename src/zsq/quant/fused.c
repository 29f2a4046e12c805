/* One pass over memory each for what zsq.quant writes as several PyTorch operations; the same numbers, bit for bit.

   Tensors are float32 without gaps, all in one layout. `draws` is a random byte an element, or NULL if no element is
   chosen; elements whose byte is below `below` are chosen. `lowest` and `highest` are qmin and qmax less the zero
   point. What the operations do with the zero point, which may be to add it, shows at two places: `zero` is added to
   rounded values (-0.0f leaves them, 0.0f makes -0.0f 0.0f), `shift` to those that are compared with the limits.
   Gradients are multiplied by 1.0f or 0.0f, not chosen, so that NaN spreads as it does there.

   Loops are functions of their own, inlined with what is known of them: a compiler vectorises none that threads
   share. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (n > 32768)")

typedef struct {
    float scale, lowest, highest, zero, shift;
    int below;
} Settings;

INLINE float clipped(float v, float lowest, float highest) {
    return v < lowest ? lowest : v > highest ? highest : v;
}

INLINE float rounded(float v, Settings s) {
    return (nearbyintf(clipped(v, s.lowest, s.highest)) + s.zero) * s.scale;
}

/* As lerp does it, with a weight of 1 or 0: infinity becomes NaN, and a zero may change its sign. */
INLINE float either(float x, float level, int keep) {
    return (keep ? x : level) + 0.0f * (x - level);
}

INLINE void step(int64_t n, const float *restrict x, const uint8_t *restrict draws, Settings s, float *restrict out,
                 const int choosing) {
    for (int64_t i = 0; i < n; i++) {
        float level = rounded(x[i] / s.scale, s);
        out[i] = choosing ? either(x[i], level, draws[i] < s.below) : level;
    }
}

INLINE void step_backward(int64_t n, const float *restrict x, const uint8_t *restrict draws, Settings s,
                          const float *restrict grad, float *restrict grad_x, float *restrict terms,
                          const int choosing, const int summed) {
    float lowest = s.lowest + s.shift, highest = s.highest + s.shift;
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] / s.scale, shifted = v + s.shift;
        int inside = clipped(shifted, lowest, highest) == shifted, keep = choosing && draws[i] < s.below;
        float passing = inside || keep ? 1.0f : 0.0f;
        grad_x[i] = grad[i] * passing;
        if (summed) {
            float level = rounded(v, s);
            float result = choosing ? either(x[i], level, keep) : level;
            terms[i] = (result - x[i] * passing) * grad[i];
        }
    }
}

/* Of n elements, where piece number `part` of `parts` begins. */
INLINE int64_t begin(int64_t n, int part, int parts) {
    return part == parts ? n : n / parts * part / 64 * 64;
}

/* out = x where chosen, else x rounded to a multiple of scale. */
void learned_step(int64_t n, int threads, const float *x, const uint8_t *draws, int below, float scale, float lowest,
                  float highest, float zero, float shift, float *out) {
    Settings s = {scale, lowest, highest, zero, shift, below};
    PARALLEL
    for (int part = 0; part < threads; part++) {
        int64_t i = begin(n, part, threads), count = begin(n, part + 1, threads) - i;
        if (draws)
            step(count, x + i, draws + i, s, out + i, 1);
        else
            step(count, x + i, NULL, s, out + i, 0);
    }
}

/* Gradients of learned_step: for x, and unless `terms` is NULL what adds up to scale times that of the scale. */
void learned_step_backward(int64_t n, int threads, const float *x, const uint8_t *draws, int below, float scale,
                           float lowest, float highest, float zero, float shift, const float *grad, float *grad_x,
                           float *terms) {
    Settings s = {scale, lowest, highest, zero, shift, below};
    PARALLEL
    for (int part = 0; part < threads; part++) {
        int64_t i = begin(n, part, threads), count = begin(n, part + 1, threads) - i;
        if (draws && terms)
            step_backward(count, x + i, draws + i, s, grad + i, grad_x + i, terms + i, 1, 1);
        else if (draws)
            step_backward(count, x + i, draws + i, s, grad + i, grad_x + i, NULL, 1, 0);
        else if (terms)
            step_backward(count, x + i, NULL, s, grad + i, grad_x + i, terms + i, 0, 1);
        else
            step_backward(count, x + i, NULL, s, grad + i, grad_x + i, NULL, 0, 0);
    }
}

INLINE void mixed(int64_t n, const float *restrict a, const float *restrict b, const uint8_t *restrict draws, int below,
                  float *restrict out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = draws[i] < below ? b[i] : a[i];
}

/* Rows `index` of two tensors, (rows, each): of b where chosen, else of a. */
void mixed_rows(int64_t rows, int64_t each, int threads, const int64_t *index, const float *a, const float *b,
                const uint8_t *draws, int below, float *out) {
    int64_t n = rows * each;
    PARALLEL
    for (int64_t row = 0; row < rows; row++)
        mixed(each, a + index[row] * each, b + index[row] * each, draws + row * each, below, out + row * each);
}
