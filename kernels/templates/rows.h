// Rows of numbers on a CPU: dot products, weighted sums, softmax and norms, in vectors that fit the
// machine's. products.h and the phases follow in the same translation unit, compiled once per element
// type with FOR_FLOAT32 or the like defined. Arithmetic is done in Real, double for double and otherwise
// float, and rounded to Element once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <omp.h>

#define INLINE __attribute__((always_inline))
#define APART __attribute__((noinline))  // inside a long function its loops run out of registers

namespace {

#if defined(FOR_FLOAT64)
using Real = double;
#else
using Real = float;
#endif

// Vectors: the compiler splits or joins them where the machine's are of another width -------------

#if defined(__AVX512F__)
constexpr int LANES = 64 / sizeof(Real);
#else
constexpr int LANES = 32 / sizeof(Real);
#endif
typedef Real Vector __attribute__((vector_size(LANES * sizeof(Real))));
template <typename V> constexpr int lanes = std::is_same<V, Vector>::value ? LANES : 1;

template <typename V> INLINE inline V load(const Real *from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V> INLINE inline void store(Real *to, V value) {
  std::memcpy(to, &value, sizeof(V));
}
INLINE inline Real rounded(Real value, const Real *) { return value; }
INLINE inline Vector rounded(Vector value, const Real *) { return value; }

#if defined(FOR_BFLOAT16)
struct Element {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

template <typename To, typename From> INLINE inline To same_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
template <typename V> INLINE inline V load(const Element *from);
template <> INLINE inline Real load<Real>(const Element *from) {
  return same_bits<Real>(uint32_t(from->bits) << 16);
}
template <> INLINE inline Vector load<Vector>(const Element *from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return same_bits<Vector>(__builtin_convertvector(halves, Words) << 16);
}
// To nearest, ties to even; a NaN stays one.
INLINE inline uint32_t upper_bits(uint32_t word) {
  bool is_nan = (word & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}
INLINE inline Words upper_bits(Words word) {
  Words is_nan = (Words)((word & 0x7fffffff) > 0x7f800000);
  return (is_nan & 0x7fc0) | (~is_nan & ((word + 0x7fff + ((word >> 16) & 1)) >> 16));
}
INLINE inline void store(Element *to, Real value) {
  to->bits = uint16_t(upper_bits(same_bits<uint32_t>(value)));
}
INLINE inline void store(Element *to, Vector value) {
  Halves halves = __builtin_convertvector(upper_bits(same_bits<Words>(value)), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}
INLINE inline Real rounded(Real value, const Element *) {
  return same_bits<Real>(upper_bits(same_bits<uint32_t>(value)) << 16);
}
INLINE inline Vector rounded(Vector value, const Element *) {
  return same_bits<Vector>(upper_bits(same_bits<Words>(value)) << 16);
}
#else
using Element = Real;
#endif

INLINE inline Real total_of(Real value) { return value; }
INLINE inline Real total_of(Vector value) {
  typedef Real Half __attribute__((vector_size(LANES / 2 * sizeof(Real))));
  Half halves[2];
  std::memcpy(halves, &value, sizeof(value));
  Half half = halves[0] + halves[1];
  Real total = 0;
  for (int lane = 0; lane < LANES / 2; ++lane) total += half[lane];
  return total;
}

// A sum along a row, in two halves, since one addition waits for the last.
struct Sum {
  Vector halves[2] = {};
  Real rest = 0;
  INLINE void add(Vector value, int way) { halves[way % 2] += value; }
  INLINE void add(Real value, int) { rest += value; }
  INLINE Real total() const { return total_of(halves[0] + halves[1]) + rest; }
};

// body(kind of value, which half of a sum it belongs to, position) over a row.
template <typename Body> INLINE inline void each(int64_t width, Body body) {
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    body(Vector{}, 0, d);
    body(Vector{}, 1, d + LANES);
  }
  for (; d + LANES <= width; d += LANES) body(Vector{}, 0, d);
  for (; d < width; ++d) body(Real{}, 0, d);
}
#define EACH [&](auto kind, int way, int64_t d) INLINE
#define KIND decltype(kind)

template <typename A, typename B> INLINE inline void copy_row(A *to, const B *from, int64_t width) {
  each(width, EACH { store(to + d, load<KIND>(from + d)); });
}

// Sums along rows: several rows at once, since one addition waits for the last -------------------

constexpr int64_t TOKENS = 16;    // at most that are worked on together
constexpr int64_t AHEAD = 2;      // tokens, where rows are asked for before they are read
constexpr int64_t STRETCH = 512;  // that is added up by itself: sums of sums are more exact
template <typename Row> constexpr int64_t LINE = 64 / sizeof(Row);  // of the cache, in elements

// The rows of tokens, one after the other, and those that are asked for next: all sources are read
// in turns, too many for the processor to see what comes.
struct Rows {
  const Element *first, *next;
  int64_t width;

  template <typename V> INLINE V at(int64_t u, int64_t d) const {
    if (d % LINE<Element> == 0) __builtin_prefetch(next + u * width + d);
    return load<V>(first + u * width + d);
  }
};

// Those of the sum of two tensors and perhaps a bias, written as they are read.
struct SummedRows {
  Rows skip, branch;
  const Element *bias;
  Element *sum;

  template <typename V> INLINE V at(int64_t u, int64_t d) const {
    V value = branch.at<V>(u, d);
    if (bias) value += load<V>(bias + d);
    value = rounded(skip.at<V>(u, d) + value, sum);
    store(sum + u * skip.width + d, value);
    return value;
  }
};

// squares[u] = |row u|^2 and alongs[u] = row u . query, for the U rows from u on.
template <int U, typename AnyRows>
INLINE inline void measure_some(const AnyRows &rows, int64_t u, const Real *query, int64_t width,
                                Real *squares, Real *alongs) {
  Real square[U] = {}, along[U] = {};
  for (int64_t begin = 0; begin < width; begin += STRETCH) {
    Vector square_here[U] = {}, along_here[U] = {};
    int64_t d = begin, end = std::min(begin + STRETCH, width);
    for (; d + LANES <= end; d += LANES) {
      Vector direction = load<Vector>(query + d);
      for (int k = 0; k < U; ++k) {
        Vector value = rows.template at<Vector>(u + k, d);
        square_here[k] += value * value;
        along_here[k] += value * direction;
      }
    }
    for (int k = 0; k < U; ++k) square[k] += total_of(square_here[k]);
    for (int k = 0; k < U; ++k) along[k] += total_of(along_here[k]);
    for (; d < end; ++d)
      for (int k = 0; k < U; ++k) {
        Real value = rows.template at<Real>(u + k, d);
        square[k] += value * value;
        along[k] += value * query[d];
      }
  }
  std::copy_n(square, U, squares + u);
  std::copy_n(along, U, alongs + u);
}
template <typename AnyRows>
void measure(const AnyRows &rows, int64_t some, const Real *query, int64_t width, Real *squares,
             Real *alongs) {
  int64_t u = 0;
  for (; u + 4 <= some; u += 4) measure_some<4>(rows, u, query, width, squares, alongs);
  for (; u < some; ++u) measure_some<1>(rows, u, query, width, squares, alongs);
}

// results[k] = left . rights[k]
template <int K>
INLINE inline void dots_some(const Real *left, const Element *const *rights, int64_t width,
                             Real *results) {
  Real result[K] = {};
  for (int64_t begin = 0; begin < width; begin += STRETCH) {
    Vector even[K] = {}, odd[K] = {};
    int64_t d = begin, end = std::min(begin + STRETCH, width);
    for (; d + 2 * LANES <= end; d += 2 * LANES) {
      Vector one = load<Vector>(left + d), other = load<Vector>(left + d + LANES);
      for (int k = 0; k < K; ++k) even[k] += one * load<Vector>(rights[k] + d);
      for (int k = 0; k < K; ++k) odd[k] += other * load<Vector>(rights[k] + d + LANES);
    }
    for (int k = 0; k < K; ++k) result[k] += total_of(even[k] + odd[k]);
    for (; d < end; ++d)
      for (int k = 0; k < K; ++k) result[k] += left[d] * load<Real>(rights[k] + d);
  }
  std::copy_n(result, K, results);
}
void dots(const Real *left, const Element *const *rights, int64_t count, int64_t width,
          Real *results) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) dots_some<4>(left, rights + k, width, results + k);
  for (; k + 2 <= count; k += 2) dots_some<2>(left, rights + k, width, results + k);
  for (; k < count; ++k) dots_some<1>(left, rights + k, width, results + k);
}

// use(sum over k of weights[k] * rows[k], half, position) over a row; sums stay in registers. Rows
// that come `ahead` elements later are asked for, unless it is 0.
template <int WAYS, typename V, typename Use>
INLINE inline void combine_here(const Element *const *rows, int64_t count, const Real *weights,
                                int64_t d, int64_t ahead, Use use) {
  V totals[WAYS] = {};
  for (int64_t k = 0; k < count; ++k) {
    const Element *here = rows[k] + d, *later = here + ahead;
    for (int way = 0; way < WAYS; ++way) totals[way] += weights[k] * load<V>(here + way * lanes<V>);
    for (int64_t at = 0; ahead && at < WAYS * lanes<V>; at += LINE<Element>)
      __builtin_prefetch(later + at);
  }
  for (int way = 0; way < WAYS; ++way) use(totals[way], way, d + way * lanes<V>);
}
template <typename Use>
INLINE inline void combine(const Element *const *rows, int64_t count, const Real *weights,
                           int64_t width, int64_t ahead, Use use) {
  int64_t d = 0;
  for (; d + 8 * LANES <= width; d += 8 * LANES)
    combine_here<8, Vector>(rows, count, weights, d, ahead, use);
  for (; d + LANES <= width; d += LANES)
    combine_here<1, Vector>(rows, count, weights, d, ahead, use);
  for (; d < width; ++d) combine_here<1, Real>(rows, count, weights, d, 0, use);
}

// e^x to the last bit or two, without a call, so that loops over it can be vectorised.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  float whole = std::nearbyint(x * 1.44269504f);
  float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    series = series * rest + next;
  int32_t power = (int32_t(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return (series * rest * rest + rest + 1) * scale;
}
inline double exponential(double x) { return std::exp(x); }

// ln x for x >= 1, in the same way.
inline float logarithm(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  // x = 2^power m with m between the root of a half and that of two.
  int32_t power = (bits - 0x3f3504f3) >> 23;
  bits -= power * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  m -= 1;
  float series = 7.0376836292e-2f;
  for (float next : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                     -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    series = series * m + next;
  float square = m * m;
  float low = series * m * square - 2.12194440e-4f * power - 0.5f * square;
  return m + low + 0.693359375f * power;
}
inline double logarithm(double x) { return std::log(x); }

template <typename Body> void over_tokens(int64_t tokens, int64_t threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    body(int(thread), tokens * thread / all, tokens * (thread + 1) / all);
  }
}

// Sums over tokens, formed by every thread on its own.
class Shares {
  int64_t size;
  std::vector<Real> sums;

public:
  // A line of the cache apart, which two threads that write to it would fetch from each other.
  Shares(int64_t threads, int64_t size) : size(size + 32), sums(threads * (size + 32)) {}
  Real *of(int64_t thread) { return sums.data() + thread * size; }
  // Adds up a stretch of all threads' sums, where there is somebody who wants it.
  void add_up(Real *out, int64_t begin, int64_t width) const {
    if (!out) return;
    std::fill_n(out, width, Real(0));
    for (size_t from = begin; from < sums.size(); from += size)
      for (int64_t d = 0; d < width; ++d) out[d] += sums[from + d];
  }
};

// body(first token, how many) over batches of tokens. What is done once per token, sums across a
// row and roots, takes long to finish; the tokens of a batch do not wait for each other's.
template <typename Body>
void in_batches(int64_t begin, int64_t end, int64_t batch, Body body) {
  for (int64_t t = begin; t < end; t += batch) body(t, std::min(batch, end - t));
}

// As many tokens as keep several of their rows in the first-level cache.
int64_t batch_of(int64_t width) {
  return std::clamp<int64_t>(2048 / std::max<int64_t>(width, 1), 1, TOKENS);
}

// Over `members` rows of TOKENS logits each, of which `some` are there. Where they are asked for,
// the logarithms of the sums of exponentials, too.
void softmax(Real *logits, int64_t members, int64_t some, Real *log_sums = nullptr) {
  Real top[TOKENS], total[TOKENS] = {};
  std::copy_n(logits, some, top);
  for (int64_t m = 1; m < members; ++m)
#pragma omp simd
    for (int64_t u = 0; u < some; ++u) top[u] = std::max(top[u], logits[m * TOKENS + u]);
  for (int64_t m = 0; m < members; ++m)
#pragma omp simd
    for (int64_t u = 0; u < some; ++u)
      total[u] += logits[m * TOKENS + u] = exponential(logits[m * TOKENS + u] - top[u]);
  for (int64_t m = 0; m < members; ++m)
#pragma omp simd
    for (int64_t u = 0; u < some; ++u) logits[m * TOKENS + u] /= total[u];
  if (!log_sums) return;
#pragma omp simd
  for (int64_t u = 0; u < some; ++u) log_sums[u] = top[u] + logarithm(total[u]);
}

// The rows of one token in several tensors.
template <typename Row>
void rows_at(std::vector<Row *> &rows, Row *const *tensors, int64_t offset) {
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = tensors[i] + offset;
}

// `some` tensors at their places among `count`, and nulls.
template <typename Row>
std::vector<Row *> placed(Row *const *tensors, const int64_t *places, int64_t some, int64_t count) {
  std::vector<Row *> all(count);
  for (int64_t i = 0; i < some; ++i) all[places[i]] = tensors[i];
  return all;
}

enum Norm { NONE, RMS, LAYER };

// What a norm multiplies with and subtracts.
struct Normed {
  Real scale, mean;
};

// The mix of a token, rounded to Element, its sum and that of its squares. The weights hold the
// factor: n equal weights times n are one exactly, and the mix is the plain sum.
INLINE inline void mix_row(Real *mixed, const Element *const *rows, int64_t count,
                           const Real *weights, int64_t width, int64_t ahead, Real *sum,
                           Real *squares) {
  Sum sums, squared;
  combine(rows, count, weights, width, ahead, [&](auto value, int way, int64_t d) INLINE {
    value = rounded(value, rows[0]);
    store(mixed + d, value);
    sums.add(value, way);
    squared.add(value * value, way);
  });
  *sum = sums.total();
  *squares = squared.total();
}

Real square_sum(const Real *row, Real mean, int64_t width) {
  Sum squares;
  each(width, EACH {
    auto value = load<KIND>(row + d) - mean;
    squares.add(value * value, way);
  });
  return squares.total();
}

template <typename Out>
void write_normed(Out *out, const Real *row, Normed state, const Real *weight, const Real *bias,
                  int64_t width) {
  each(width, EACH {
    auto value = (load<KIND>(row + d) - state.mean) * state.scale;
    if (weight) value *= load<KIND>(weight + d);
    if (bias) value += load<KIND>(bias + d);
    store(out + d, value);
  });
}

// The gradient of `row`, the mix, from that of its norm, and from those who `read` it, if anybody does;
// adds to those of the weight and the bias.
template <typename Out>
void normed_backward(Real *total, const Element *read, const Out *arriving, const Real *row,
                     Real *scratch, Normed state, Norm norm, const Real *weight, Real *to_weight,
                     Real *to_bias, int64_t width) {
  Sum along, sum;
  each(width, EACH {
    auto unit = (load<KIND>(row + d) - state.mean) * state.scale;
    auto grad = load<KIND>(arriving + d);
    store(to_weight + d, load<KIND>(to_weight + d) + grad * unit);
    store(to_bias + d, load<KIND>(to_bias + d) + grad);
    if (weight) grad *= load<KIND>(weight + d);
    store(scratch + d, grad);
    along.add(grad * unit, way);
    sum.add(grad, way);
  });
  Real slope = along.total() / width, shift = norm == LAYER ? sum.total() / width : 0;
  each(width, EACH {
    auto unit = (load<KIND>(row + d) - state.mean) * state.scale;
    auto value = state.scale * (load<KIND>(scratch + d) - unit * slope - shift);
    if (read) value += load<KIND>(read + d);
    store(total + d, value);
  });
}

}  // namespace
