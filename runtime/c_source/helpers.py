"""Functions of the C code that networks share: each is written out where something calls it.

All indices that inner loops add up are offsets; nothing is multiplied but what `product` and the
functions of float32 say. Unsigned arithmetic wraps, which signed sums of C may not.
"""

from __future__ import annotations

PIXELS = 8  # of a convolution that are computed at once
PRODUCTS = 4  # the same of one with products

_RECORDS = """
/* Requantization of one output channel, of a layer: see docs/microcontrollers.md. */
struct row {
    int32_t offset, bias;
    float m, b;
%(factor)s};
struct scale {
    int32_t low, high;
    uint32_t mask, doubt, sure;
    uint8_t grow, fraction, least, most;
    int32_t zero;
    float factor;
    const int32_t *residual;
};
"""

TEXTS: dict[str, tuple[tuple[str, ...], str]] = {
    "row": ((), _RECORDS % {"factor": f"    uint8_t counts, shifts[{10}];\n"}),
    "row_products": ((), _RECORDS % {"factor": "    int32_t product;\n"}),
    # Half to even, of what lies within the bounds.
    "rounded": ((), """
static uint8_t rounded(float y, int32_t least, int32_t most)
{
    int32_t k;
    float rest;
    if (!(y > (float)least))
        return (uint8_t)least;
    if (y >= (float)most)
        return (uint8_t)most;
    k = (int32_t)y;
    rest = y - (float)k;
    if (rest > 0.5f || (rest == 0.5f && (k & 1)))
        k++;
    return (uint8_t)k;
}
"""),
    # `volatile`: no compiler may fuse a product with a sum, whatever its options are.
    "linear": ((), """
static float linear(float x, float m, float b)
{
    volatile float y = x * m;
    return y + b;
}
"""),
    "exact": (("rounded", "linear"), """
/* The definition, for sums that are too near to the middle between two codes. */
static uint8_t exact(const struct scale *s, const struct row *w, int32_t sum)
{
    return rounded(linear((float)(sum - w->offset), w->m, w->b), s->least, s->most);
}
"""),
    "exact_residual": (("rounded", "linear"), """
/* The definition, for sums that are too near to the middle between two codes. */
static uint8_t exact_residual(const struct scale *s, const struct row *w, int32_t sum, uint8_t r)
{
    float y = linear((float)(sum - w->offset), w->m, w->b);
    return rounded(linear((float)((int32_t)r - s->zero), s->factor, y), s->least, s->most);
}
"""),
    "settle": (("exact",), """
static uint8_t settle(const struct scale *s, const struct row *w, int32_t sum, uint32_t scaled)
{
    int32_t u = (int32_t)scaled;
    if (u < s->low)
        return s->least;
    if (u >= s->high)
        return s->most;
    if ((scaled & s->mask) - s->doubt < s->sure)
        return (uint8_t)(u >> s->fraction);
    return exact(s, w, sum);
}
"""),
    "settle_residual": (("exact_residual",), """
static uint8_t settle_residual(const struct scale *s, const struct row *w, int32_t sum,
                               uint32_t scaled, uint8_t r)
{
    int32_t u = (int32_t)(scaled += (uint32_t)s->residual[r]);
    if (u < s->low)
        return s->least;
    if (u >= s->high)
        return s->most;
    if ((scaled & s->mask) - s->doubt < s->sure)
        return (uint8_t)(u >> s->fraction);
    return exact_residual(s, w, sum, r);
}
"""),
    "scale4": (("row",), """
static void scale4(const struct scale *s, const struct row *w, const int32_t *sums, uint32_t *u)
{
    unsigned n = w->counts & 15, g = s->grow;
    const uint8_t *shift = w->shifts;
    int32_t a = (int32_t)((uint32_t)sums[0] << g), b = (int32_t)((uint32_t)sums[1] << g);
    int32_t c = (int32_t)((uint32_t)sums[2] << g), d = (int32_t)((uint32_t)sums[3] << g);
    uint32_t p = (uint32_t)w->bias, q = p, r = p, t = p;
    for (; n; n--, shift++) {
        p += (uint32_t)(a >> *shift);
        q += (uint32_t)(b >> *shift);
        r += (uint32_t)(c >> *shift);
        t += (uint32_t)(d >> *shift);
    }
    for (n = w->counts >> 4; n; n--, shift++) {
        p -= (uint32_t)(a >> *shift);
        q -= (uint32_t)(b >> *shift);
        r -= (uint32_t)(c >> *shift);
        t -= (uint32_t)(d >> *shift);
    }
    u[0] = p;
    u[1] = q;
    u[2] = r;
    u[3] = t;
}
"""),
    "scale1": (("row",), """
static uint32_t scale1(const struct scale *s, const struct row *w, int32_t sum)
{
    unsigned n = w->counts & 15;
    const uint8_t *shift = w->shifts;
    int32_t a = (int32_t)((uint32_t)sum << s->grow);
    uint32_t u = (uint32_t)w->bias;
    for (; n; n--)
        u += (uint32_t)(a >> *shift++);
    for (n = w->counts >> 4; n; n--)
        u -= (uint32_t)(a >> *shift++);
    return u;
}
"""),
    "scale1_products": (("row_products",), """
static uint32_t scale1(const struct scale *s, const struct row *w, int32_t sum)
{
    int32_t a = (int32_t)((uint32_t)sum << s->grow);
    return (uint32_t)w->bias + (uint32_t)(((int64_t)a * w->product) >> 31);
}
"""),
    "scale4_products": (("row_products", "scale1_products"), """
static void scale4(const struct scale *s, const struct row *w, const int32_t *sums, uint32_t *u)
{
    int j;
    for (j = 0; j < 4; j++)
        u[j] = scale1(s, w, sums[j]);
}
"""),
    # Four pixels of one output channel.
    "finish4": (("settle",), """
static void finish4(const struct scale *s, const struct row *w, const int32_t *sums,
                    uint8_t *restrict y, const int32_t *to)
{
    uint32_t u[4];
    scale4(s, w, sums, u);
    y[to[0]] = settle(s, w, sums[0], u[0]);
    y[to[1]] = settle(s, w, sums[1], u[1]);
    y[to[2]] = settle(s, w, sums[2], u[2]);
    y[to[3]] = settle(s, w, sums[3], u[3]);
}
"""),
    "finish4_residual": (("settle_residual",), """
static void finish4_residual(const struct scale *s, const struct row *w, const int32_t *sums,
                             uint8_t *restrict y, const int32_t *to, const uint8_t *r,
                             const int32_t *of)
{
    uint32_t u[4];
    scale4(s, w, sums, u);
    y[to[0]] = settle_residual(s, w, sums[0], u[0], r[of[0]]);
    y[to[1]] = settle_residual(s, w, sums[1], u[1], r[of[1]]);
    y[to[2]] = settle_residual(s, w, sums[2], u[2], r[of[2]]);
    y[to[3]] = settle_residual(s, w, sums[3], u[3], r[of[3]]);
}
"""),
    "flush": ((), """
/* Two sums of 16 bits with a sign, of pixels side by side in a word. */
static void flush(int32_t *total, uint32_t word, unsigned shift)
{
    int32_t even = (int32_t)(word << 16) >> 16;
    int32_t odd = (int32_t)(word - (uint32_t)even) >> 16;
    total[0] = (int32_t)((uint32_t)total[0] << shift) + even;
    total[1] = (int32_t)((uint32_t)total[1] << shift) + odd;
}
"""),
    "sums": (("flush",), """
/* Sums of eight pixels by the program of one output channel; returns the next one's. */
static const uint%(width)d_t *sums%(width)d(const uint32_t *restrict patch, const uint%(width)d_t *restrict p,
                              int32_t *restrict total)
{
    uint32_t a = 0, b = 0, c = 0, d = 0;
    unsigned n, operation;
    const uint32_t *q;
    int j;
    for (j = 0; j < 8; j++)
        total[j] = 0;
    do {
        unsigned more = p[0] >> 8;
        n = p[0] & 255;
        operation = p[1];
        p += 2;
#define WORD(i) (const uint32_t *)(const void *)((const char *)patch + p[i])
#define TAKE(i, sign) q = WORD(i); a sign q[0]; b sign q[1]; c sign q[2]; d sign q[3];
        for (; n >= 4; n -= 4, p += 4) {
            TAKE(0, +=) TAKE(1, +=) TAKE(2, +=) TAKE(3, +=)
        }
        for (; n; n--, p++) {
            TAKE(0, +=)
        }
        for (; more >= 4; more -= 4, p += 4) {
            TAKE(0, -=) TAKE(1, -=) TAKE(2, -=) TAKE(3, -=)
        }
        for (; more; more--, p++) {
            TAKE(0, -=)
        }
#undef TAKE
#undef WORD
        if (operation < 32) {
            a <<= operation;
            b <<= operation;
            c <<= operation;
            d <<= operation;
        } else {
            flush(total, a, operation & 31);
            flush(total + 2, b, operation & 31);
            flush(total + 4, c, operation & 31);
            flush(total + 6, d, operation & 31);
            a = b = c = d = 0;
        }
    } while (operation < 64);
    return p;
}
"""),
    "single": ((), """
/* The same of one pixel, whose codes are bytes. */
static const uint%(width)d_t *single%(width)d(const uint8_t *restrict patch, const uint%(width)d_t *restrict p,
                                int32_t *restrict total)
{
    uint32_t sum = 0;
    int32_t all = 0;
    unsigned n, more, operation;
    do {
        n = p[0] & 255;
        more = p[0] >> 8;
        operation = p[1];
        p += 2;
        for (; n >= 4; n -= 4, p += 4)
            sum += (uint32_t)patch[p[0]] + patch[p[1]] + patch[p[2]] + patch[p[3]];
        for (; n; n--)
            sum += patch[*p++];
        for (; more >= 4; more -= 4, p += 4)
            sum -= (uint32_t)patch[p[0]] + patch[p[1]] + patch[p[2]] + patch[p[3]];
        for (; more; more--)
            sum -= patch[*p++];
        if (operation < 32) {
            sum <<= operation;
        } else {
            all = (int32_t)(((uint32_t)all << (operation & 31)) + sum);
            sum = 0;
        }
    } while (operation < 64);
    *total = all;
    return p;
}
"""),
    "empty8": (("flush",), """
/* Buckets of the words of each exponent and sign, added up by Horner's rule and emptied. */
static void empty8(uint32_t *restrict bucket, int32_t *restrict total, unsigned bits, unsigned shift)
{
    uint32_t half = (uint32_t)4 << (bits - 1);
    uint32_t *plus = bucket + half - 4, *minus = plus + half;
    int32_t sums[8];
    int j;
    for (j = 0; j < 8; j++)
        sums[j] = 0;
    for (; plus != bucket; plus -= 4, minus -= 4) {
        for (j = 0; j < 4; j++) {
            flush(sums + 2 * j, plus[j] - minus[j], 1);
            plus[j] = minus[j] = 0;
        }
    }
    for (j = 0; j < 8; j++)
        total[j] += (int32_t)((uint32_t)sums[j] << shift);
}
"""),
    "empty1": ((), """
/* Buckets of the words of each exponent and sign, added up by Horner's rule and emptied. */
static void empty1(uint32_t *restrict bucket, int32_t *restrict total, unsigned bits, unsigned shift)
{
    uint32_t half = (uint32_t)1 << (bits - 1), sum = 0;
    uint32_t *plus = bucket + half - 1, *minus = plus + half;
    for (; plus != bucket; plus--, minus--) {
        sum = (sum << 1) + *plus - *minus;
        *plus = *minus = 0;
    }
    *total += (int32_t)(sum << shift);
}
"""),
    "small": (("empty8",), """
/* Sums of eight pixels by the %(bits)d-bit codes of one output channel; returns the next one's. */
static const uint8_t *small%(bits)d(const uint32_t *restrict patch, const uint8_t *restrict p, int32_t count,
                             unsigned shift, int32_t *restrict total)
{
    static uint32_t bucket[8 << %(bits)d];
    const uint32_t *x = patch;
    uint32_t window = 0, *q;
    unsigned have = 0;
    int32_t chunk, seconds;
    int j;
    for (j = 0; j < 8; j++)
        total[j] = 0;
    for (; count; count -= chunk) {
        int32_t n = chunk = count < %(chunk)d ? count : %(chunk)d;
        for (; n; n--, x += 4) {
            if (have < %(bits)d) {
                window |= (uint32_t)*p++ << have;
                have += 8;
            }
            q = bucket + ((window & %(mask)d) << 2);
            window >>= %(bits)d;
            have -= %(bits)d;
            q[0] += x[0];
            q[1] += x[1];
            q[2] += x[2];
            q[3] += x[3];
        }
        empty8(bucket, total, %(bits)d, shift);
    }
    seconds = (int32_t)(p[0] | (unsigned)p[1] << 8);
    p += 2;
    for (x = patch; seconds; seconds -= chunk) {
        int32_t n = chunk = seconds < %(chunk)d ? seconds : %(chunk)d;
        for (; n; n--, p += 2) {
            x += (uint32_t)p[0] << 2;
            q = bucket + ((uint32_t)p[1] << 2);
            q[0] += x[0];
            q[1] += x[1];
            q[2] += x[2];
            q[3] += x[3];
        }
        empty8(bucket + (4 << %(bits)d), total, %(bits)d, 0);
    }
    return p;
}
"""),
    "small_single": (("empty1",), """
/* The same of one pixel, whose codes are bytes. */
static const uint8_t *small_single%(bits)d(const uint8_t *restrict patch, const uint8_t *restrict p,
                                    int32_t count, unsigned shift, int32_t *restrict total)
{
    static uint32_t bucket[2 << %(bits)d];
    const uint8_t *x = patch;
    uint32_t window = 0;
    unsigned have = 0;
    int32_t n;
    *total = 0;
    for (; count; count--) {
        if (have < %(bits)d) {
            window |= (uint32_t)*p++ << have;
            have += 8;
        }
        bucket[window & %(mask)d] += *x++;
        window >>= %(bits)d;
        have -= %(bits)d;
    }
    empty1(bucket, total, %(bits)d, shift);
    n = (int32_t)(p[0] | (unsigned)p[1] << 8);
    p += 2;
    for (x = patch; n; n--, p += 2) {
        x += p[0];
        bucket[p[1]] += *x;
    }
    empty1(bucket + (1 << %(bits)d), total, %(bits)d, 0);
    return p;
}
"""),
    "taps": ((), """
/* Four pixels of a depthwise convolution: each word an offset and a shift. */
static const uint%(width)d_t *taps%(width)d(const uint8_t *restrict x, const int32_t *restrict at,
                              const uint%(width)d_t *restrict p, int32_t *restrict total)
{
    const uint8_t *e = x + at[0], *f = x + at[1], *g = x + at[2], *h = x + at[3];
    uint32_t a = 0, b = 0, c = 0, d = 0;
    unsigned n;
    for (n = *p++; n; n--, p += 2) {
        a += (uint32_t)e[p[0]] << p[1];
        b += (uint32_t)f[p[0]] << p[1];
        c += (uint32_t)g[p[0]] << p[1];
        d += (uint32_t)h[p[0]] << p[1];
    }
    for (n = *p++; n; n--, p += 2) {
        a -= (uint32_t)e[p[0]] << p[1];
        b -= (uint32_t)f[p[0]] << p[1];
        c -= (uint32_t)g[p[0]] << p[1];
        d -= (uint32_t)h[p[0]] << p[1];
    }
    total[0] = (int32_t)a;
    total[1] = (int32_t)b;
    total[2] = (int32_t)c;
    total[3] = (int32_t)d;
    return p;
}
"""),
    "taps_products": ((), """
/* Four pixels of a depthwise convolution, by products. */
static const int%(width)d_t *taps_products%(width)d(const uint8_t *restrict x, const int32_t *restrict at,
                                      const int32_t *restrict offset, int n,
                                      const int%(width)d_t *restrict w, int32_t *restrict total)
{
    const uint8_t *e = x + at[0], *f = x + at[1], *g = x + at[2], *h = x + at[3];
    int32_t a = 0, b = 0, c = 0, d = 0;
    for (; n; n--) {
        int32_t v = *w++, o = *offset++;
        a += e[o] * v;
        b += f[o] * v;
        c += g[o] * v;
        d += h[o] * v;
    }
    total[0] = a;
    total[1] = b;
    total[2] = c;
    total[3] = d;
    return w;
}
"""),
    "products": ((), """
/* Sums of four pixels, by products with the weights of one output channel. */
static const int%(width)d_t *products%(width)d(const uint8_t *restrict x, const int%(width)d_t *restrict w, int n,
                                 int32_t *restrict total)
{
    int32_t a = 0, b = 0, c = 0, d = 0, v;
    for (; n >= 2; n -= 2, x += 8, w += 2) {
        v = w[0];
        a += x[0] * v;
        b += x[1] * v;
        c += x[2] * v;
        d += x[3] * v;
        v = w[1];
        a += x[4] * v;
        b += x[5] * v;
        c += x[6] * v;
        d += x[7] * v;
    }
    if (n) {
        v = *w++;
        a += x[0] * v;
        b += x[1] * v;
        c += x[2] * v;
        d += x[3] * v;
    }
    total[0] = a;
    total[1] = b;
    total[2] = c;
    total[3] = d;
    return w;
}
"""),
    "product": ((), """
/* The sum of one pixel, by products with the weights of one output channel. */
static const int%(width)d_t *product%(width)d(const uint8_t *restrict x, const int%(width)d_t *restrict w, int n,
                                int32_t *restrict total)
{
    int32_t a = 0;
    for (; n; n--)
        a += *w++ * *x++;
    *total = a;
    return w;
}
"""),
    # Of two numbers that are not negative: bit by bit of the second, unless the core has products.
    "times": ((), """
static uint32_t times(uint32_t a, uint32_t b)
{
    uint32_t sum = 0;
    for (; b; b >>= 1, a <<= 1)
        if (b & 1)
            sum += a;
    return sum;
}
"""),
    "times_products": ((), """
static uint32_t times(uint32_t a, uint32_t b)
{
    return a * b;
}
"""),
    "prelu": (("linear",), """
static float prelu(float v, float slope, float zero)
{
    float above = v > 0 ? v : 0, below = v < 0 ? v : 0;
    return linear(below, slope, above) + zero;
}
"""),
    "hard_swish": (("linear",), """
static float hard_swish(float v, float factor, float added, float zero)
{
    float inside = v < 0 ? 0 : v > 1 ? 1 : v;
    return linear(linear(v, factor, added), inside, zero);
}
"""),
    "curved": ((), """
struct curve {
    const int32_t *edges;
    const uint8_t *codes;
    int32_t count, half, doubt;
};
/* The code of u; -1 where it is too near to an edge. */
static int32_t curved(const struct curve *c, int32_t u)
{
    int32_t i = 0, step;
    for (step = c->half; step; step >>= 1)
        if (i + step <= c->count && c->edges[i + step - 1] <= u)
            i += step;
    if ((i && u - c->edges[i - 1] < c->doubt) || (i < c->count && c->edges[i] - u <= c->doubt))
        return -1;
    return c->codes[i];
}
"""),
    "nearest": ((), """
/* Half to even, of magnitudes up to 2^22. */
static int32_t nearest(float y)
{
    int32_t k = (int32_t)y;
    float rest = y - (float)k;
    if (rest > 0.5f || (rest == 0.5f && (k & 1)))
        k++;
    if (rest < -0.5f || (rest == -0.5f && (k & 1)))
        k--;
    return k;
}
"""),
    "piecewise": (("nearest",), """
/* (a * b + 2^14) >> 15 of 16-bit numbers */
static int32_t scaled15(int32_t a, int32_t b)
{
    uint32_t size = times((uint32_t)(b < 0 ? -b : b), (uint32_t)(a < 0 ? -a : a));
    int32_t value = (a < 0) != (b < 0) ? -(int32_t)size : (int32_t)size;
    return (value + 16384) >> 15;
}
static uint8_t piecewise(float v, const int16_t *c, int32_t least, int32_t most)
{
    int32_t k = v > -32768.0f ? v < 32767.0f ? nearest(v) : 32767 : -32768;
    int32_t f = ((k & 4095) << 4) - 32768, y;
    c += (k >> 12) & 15;
    y = c[0] + scaled15(c[16] + scaled15(c[32], f), f);
    y = y < -32768 ? -32768 : y > 32767 ? 32767 : y;
    y = (y + 64) >> 7;
    return (uint8_t)(y < least ? least : y > most ? most : y);
}
"""),
    "bounded": ((), """
static float bounded(float y, float lo, float hi)
{
    y = y > lo ? y : lo;
    return y < hi ? y : hi;
}
"""),
    "quantized": (("nearest",), """
static uint8_t quantized(float x, float scale, int32_t zero, int32_t top)
{
    int32_t code;
    x = x / scale;
    if (!(x > -1000.0f)) /* not a number either */
        return 0;
    if (x > 1000.0f)
        return (uint8_t)top;
    code = nearest(x) + zero;
    return (uint8_t)(code < 0 ? 0 : code > top ? top : code);
}
"""),
    "copy_codes": ((), """
static void copy_codes(uint8_t *y, const uint8_t *x, int32_t plane, int32_t row, int32_t plane_x,
                       int32_t row_x, int32_t c, int32_t h, int32_t w)
{
    for (; c; c--, y += plane, x += plane_x) {
        uint8_t *to = y;
        const uint8_t *from = x;
        int32_t i;
        for (i = h; i; i--, to += row, from += row_x)
            memcpy(to, from, (size_t)w);
    }
}
"""),
    "copy_reals": ((), """
static void copy_reals(float *y, const float *x, int32_t plane, int32_t row, int32_t plane_x,
                       int32_t row_x, int32_t c, int32_t h, int32_t w)
{
    for (; c; c--, y += plane, x += plane_x) {
        int32_t i, j;
        const float *from = x;
        float *to = y;
        for (i = h; i; i--, to += row, from += row_x)
            for (j = 0; j < w; j++)
                to[j] = from[j];
    }
}
"""),
    "exp": (("linear", "nearest", "bounded"), """
static float power_of_two(int32_t n)
{
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
/* e^x: the runtime's own polynomial (kernels/functions.py). */
static float exponential(float x)
{
    volatile float v = bounded(x, -104.0f, 89.0f) * 1.44269504f;
    int32_t n = nearest(v), half = n >> 1;
    float r, p, square;
    r = linear(-(float)n, 0.693359375f, bounded(x, -104.0f, 89.0f));
    r = linear(-(float)n, -2.12194440e-4f, r);
    p = linear(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = linear(p, r, 8.3334519073e-3f);
    p = linear(p, r, 4.1665795894e-2f);
    p = linear(p, r, 1.6666665459e-1f);
    p = linear(p, r, 0.5f);
    square = r * r;
    p = linear(p, square, r);
    return ((p + 1.0f) * power_of_two(half)) * power_of_two(n - half);
}
"""),
    "sigmoid": (("exp",), """
static float sigmoid(float x)
{
    float e = exponential(x < 0 ? x : -x);
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}
"""),
    "softmax": (("exp",), """
static void softmax(const float *x, float *y, int32_t n, int32_t step)
{
    float most = -INFINITY, whole;
    double sum = 0;
    int32_t i, at;
    for (i = at = 0; i < n; i++, at += step)
        most = x[at] > most ? x[at] : most;
    for (i = at = 0; i < n; i++, at += step) {
        y[at] = exponential(x[at] - most);
        sum += (double)y[at];
    }
    whole = (float)sum;
    for (i = at = 0; i < n; i++, at += step)
        y[at] /= whole;
}
"""),
}  # fmt: skip
