// Rows of numbers on a CPU: dot products, weighted sums, softmax and norms, in vectors that fit the
// machine's. phases.cpp follows in the same translation unit, compiled once per element type with
// FOR_FLOAT32 or the like defined. Arithmetic is done in Real, double for double and otherwise
// float, and rounded to Element once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <omp.h>

#define INLINE __attribute__((always_inline))

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

// Several sums at once, each in vectors of its own, since one addition waits for the last.
struct Sum {
  Vector parts[2] = {};
  Real rest = 0;
  template <int WAY> INLINE void add(std::integral_constant<int, WAY>, Vector value) {
    parts[WAY] += value;
  }
  template <int WAY> INLINE void add(std::integral_constant<int, WAY>, Real value) { rest += value; }
  INLINE Real total() const { return total_of(parts[0] + parts[1]) + rest; }
};

// body(kind of value, which of two sums it belongs to, position) over a row.
template <typename Body> INLINE inline void each(int64_t width, Body body) {
  constexpr std::integral_constant<int, 0> even{};
  constexpr std::integral_constant<int, 1> odd{};
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    body(Vector{}, even, d);
    body(Vector{}, odd, d + LANES);
  }
  for (; d + LANES <= width; d += LANES) body(Vector{}, even, d);
  for (; d < width; ++d) body(Real{}, even, d);
}
#define EACH [&](auto kind, auto way, int64_t d) INLINE
#define KIND decltype(kind)

template <typename A, typename B> INLINE inline Real dot(const A *left, const B *right, int64_t width) {
  Sum sum;
  each(width, EACH { sum.add(way, load<KIND>(left + d) * load<KIND>(right + d)); });
  return sum.total();
}

// The sum of two rows and of a bias, if there is one, at `d`; rounded to Element.
template <typename V>
INLINE inline V added(const Element *skip, const Element *branch, const Element *bias, int64_t d) {
  V value = load<V>(branch + d);
  if (bias) value += load<V>(bias + d);
  return rounded(load<V>(skip + d) + value, skip);
}

template <typename A, typename B> INLINE inline void copy_row(A *to, const B *from, int64_t width) {
  each(width, EACH { store(to + d, load<KIND>(from + d)); });
}

// results[j * stride] = left . rights[j], four at a time, so that `left` is loaded once for them.
template <typename A, typename B>
void dots(const A *left, const B *const *rights, int64_t count, int64_t width, Real *results,
          int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    Sum sums[4];
    each(width, EACH {
      auto value = load<KIND>(left + d);
      for (int k = 0; k < 4; ++k) sums[k].add(way, value * load<KIND>(rights[j + k] + d));
    });
    for (int k = 0; k < 4; ++k) results[(j + k) * stride] = sums[k].total();
  }
  for (; j < count; ++j) results[j * stride] = dot(left, rights[j], width);
}

constexpr int64_t TOKENS = 16;  // at most that are worked on together

// Vectors that all rows are multiplied with. LANES of them are turned, so that an instruction works
// on one element of each and no sum across lanes is needed; what remains is multiplied as it is.
// In stretches of the width: one stays in the first-level cache for all rows, and sums of sums are
// more exact.
class Turned {
  static constexpr int64_t STRETCH = 256;
  int64_t count, width, groups;
  std::vector<Real> columns;  // [groups, width, LANES]
  std::vector<const Real *> rest;

  template <int G, int U>
  void multiply(const Element *rows, const Real *from, int64_t begin, int64_t end, Real *to) const {
    Vector sums[G][U] = {};
    for (int64_t d = begin; d < end; ++d)
      for (int g = 0; g < G; ++g) {
        Vector values = load<Vector>(from + (g * width + d) * LANES);
        for (int u = 0; u < U; ++u) sums[g][u] += load<Real>(rows + u * width + d) * values;
      }
    for (int g = 0; g < G; ++g)
      for (int u = 0; u < U; ++u) {
        Real *place = to + (g * TOKENS + u) * LANES;
        store(place, load<Vector>(place) + sums[g][u]);
      }
  }

  template <int G, int U>
  void multiply_all(const Element *rows, int64_t some, int64_t g, Real *products) const {
    const Real *from = columns.data() + g * width * LANES;
    for (int64_t begin = 0; begin < width; begin += STRETCH) {
      int64_t end = std::min(begin + STRETCH, width), u = 0;
      Real *to = products + g * LANES * TOKENS;
      for (; u + U <= some; u += U)
        multiply<G, U>(rows + u * width, from, begin, end, to + u * LANES);
      for (; u < some; ++u) multiply<G, 1>(rows + u * width, from, begin, end, to + u * LANES);
    }
  }

public:
  Turned(const Real *vectors, int64_t count, int64_t width)
      : count(count), width(width), groups(count / LANES), columns(groups * width * LANES) {
    for (int64_t j = 0; j < groups * LANES; ++j)
      for (int64_t d = 0; d < width; ++d)
        columns[(j / LANES * width + d) * LANES + j % LANES] = vectors[j * width + d];
    for (int64_t j = groups * LANES; j < count; ++j) rest.push_back(vectors + j * width);
  }
  // Products with `some` rows, at most TOKENS; `at` finds that of vector j and row u.
  void times(const Element *rows, int64_t some, Real *products) const {
    std::fill_n(products, groups * LANES * TOKENS, Real(0));
    int64_t g = 0;
    for (; g + 3 <= groups; g += 3) multiply_all<3, 4>(rows, some, g, products);
    for (; g + 2 <= groups; g += 2) multiply_all<2, 4>(rows, some, g, products);
    for (; g < groups; ++g) multiply_all<1, 8>(rows, some, g, products);
    for (int64_t u = 0; u < some; ++u)
      dots(rows + u * width, rest.data(), rest.size(), width,
           products + groups * LANES * TOKENS + u, TOKENS);
  }
  Real at(const Real *products, int64_t j, int64_t u) const {
    if (j >= groups * LANES) return products[j * TOKENS + u];
    return products[(j / LANES * TOKENS + u) * LANES + j % LANES];
  }
};

template <int J, int WAYS, typename V, typename In, typename Start, typename Out>
INLINE inline void combine_here(const In *const *rows, int64_t count, const Real *weights,
                                int64_t across, int64_t along, const Start *const *starts,
                                Out *const *outs, int64_t d) {
  V totals[J][WAYS];
  for (int j = 0; j < J; ++j)
    for (int k = 0; k < WAYS; ++k)
      totals[j][k] = starts && starts[j] ? load<V>(starts[j] + d + k * lanes<V>) : V{};
  for (int64_t i = 0; i < count; ++i) {
    V values[WAYS];
    for (int k = 0; k < WAYS; ++k) values[k] = load<V>(rows[i] + d + k * lanes<V>);
    for (int j = 0; j < J; ++j)
      for (int k = 0; k < WAYS; ++k) totals[j][k] += weights[j * across + i * along] * values[k];
  }
  for (int j = 0; j < J; ++j)
    for (int k = 0; k < WAYS; ++k) store(outs[j] + d + k * lanes<V>, totals[j][k]);
}

template <int J, typename In, typename Start, typename Out>
void combine_some(const In *const *rows, int64_t count, const Real *weights, int64_t across,
                  int64_t along, const Start *const *starts, Out *const *outs, int64_t width) {
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES)
    combine_here<J, 2, Vector>(rows, count, weights, across, along, starts, outs, d);
  for (; d + LANES <= width; d += LANES)
    combine_here<J, 1, Vector>(rows, count, weights, across, along, starts, outs, d);
  for (; d < width; ++d)
    combine_here<J, 1, Real>(rows, count, weights, across, along, starts, outs, d);
}

// outs[j] = starts[j] + sum over i of weights[j * across + i * along] * rows[i]. Sums stay in
// registers: two vectors of up to four outs. `starts` or single ones may be null, for zeros.
template <typename In, typename Start, typename Out>
void combine(const In *const *rows, int64_t count, const Real *weights, int64_t across,
             int64_t along, const Start *const *starts, Out *const *outs, int64_t outputs,
             int64_t width) {
  for (int64_t j = 0; j < outputs; j += 4) {
    const Real *of = weights + j * across;
    const Start *const *from = starts ? starts + j : nullptr;
    switch (std::min<int64_t>(outputs - j, 4)) {
      case 1: combine_some<1>(rows, count, of, across, along, from, outs + j, width); break;
      case 2: combine_some<2>(rows, count, of, across, along, from, outs + j, width); break;
      case 3: combine_some<3>(rows, count, of, across, along, from, outs + j, width); break;
      default: combine_some<4>(rows, count, of, across, along, from, outs + j, width);
    }
  }
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
  Shares(int64_t threads, int64_t size) : size(size), sums(threads * size) {}
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
  return std::clamp<int64_t>(1024 / std::max<int64_t>(width, 1), 1, TOKENS);
}

// Over `members` rows of TOKENS logits each, of which `some` are there.
void softmax(Real *logits, int64_t members, int64_t some) {
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
}

// The rows of one token in several tensors; `absent` stands for that of a missing tensor.
template <typename Row>
void rows_at(std::vector<Row *> &rows, Row *const *tensors, int64_t offset, Row *absent = nullptr) {
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = tensors[i] ? tensors[i] + offset : absent;
}

// `some` tensors at their places among `count`, and nulls.
template <typename Row>
std::vector<Row *> placed(Row *const *tensors, const int64_t *places, int64_t some, int64_t count) {
  std::vector<Row *> all(count);
  for (int64_t i = 0; i < some; ++i) all[places[i]] = tensors[i];
  return all;
}

template <typename Row> std::vector<Row *> rows_of(Row *matrix, int64_t count, int64_t width) {
  std::vector<Row *> rows(count);
  for (int64_t j = 0; j < count; ++j) rows[j] = matrix + j * width;
  return rows;
}

constexpr const Element *const *ZEROS = nullptr;

enum Norm { NONE, RMS, LAYER };

// What a norm multiplies with and subtracts.
struct Normed {
  Real scale, mean;
};

// The mix of a token, rounded to Element, and its sum. `betas` are TOKENS apart. The factor goes to
// them and not to the sum: n equal weights times n are one exactly, and the mix is the plain sum.
Real mix_row(Real *mixed, const std::vector<const Element *> &rows, const Real *betas, Real factor,
             int64_t width) {
  Sum sum;
  if (rows.size() == 2) {
    const Element *first = rows[0], *second = rows[1];
    Real one = factor * betas[0], other = factor * betas[TOKENS];
    each(width, EACH {
      auto value = one * load<KIND>(first + d) + other * load<KIND>(second + d);
      value = rounded(value, first);
      store(mixed + d, value);
      sum.add(way, value);
    });
  } else {
    std::vector<Real> shares(rows.size());
    for (size_t k = 0; k < rows.size(); ++k) shares[k] = factor * betas[k * TOKENS];
    combine(rows.data(), rows.size(), shares.data(), 0, 1, ZEROS, &mixed, 1, width);
    each(width, EACH {
      auto value = rounded(load<KIND>(mixed + d), rows[0]);
      store(mixed + d, value);
      sum.add(way, value);
    });
  }
  return sum.total();
}

Real square_sum(const Real *row, Real mean, int64_t width) {
  Sum squares;
  each(width, EACH {
    auto value = load<KIND>(row + d) - mean;
    squares.add(way, value * value);
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

// The gradient of `row`, the mix, from that of its norm; adds to those of the weight and the bias.
template <typename Out>
void normed_backward(Real *total, const Out *arriving, const Real *row, Real *scratch, Normed state,
                     Norm norm, const Real *weight, Real *to_weight, Real *to_bias, int64_t width) {
  Sum along, sum;
  each(width, EACH {
    auto unit = (load<KIND>(row + d) - state.mean) * state.scale;
    auto grad = load<KIND>(arriving + d);
    store(to_weight + d, load<KIND>(to_weight + d) + grad * unit);
    store(to_bias + d, load<KIND>(to_bias + d) + grad);
    if (weight) grad *= load<KIND>(weight + d);
    store(scratch + d, grad);
    along.add(way, grad * unit);
    sum.add(way, grad);
  });
  Real slope = along.total() / width, shift = norm == LAYER ? sum.total() / width : 0;
  each(width, EACH {
    auto unit = (load<KIND>(row + d) - state.mean) * state.scale;
    auto value = state.scale * (load<KIND>(scratch + d) - unit * slope - shift);
    store(total + d, load<KIND>(total + d) + value);
  });
}

}  // namespace
