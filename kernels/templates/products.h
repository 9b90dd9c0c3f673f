// Several rows against several others: what the sites of a block have in common comes down to small
// products of matrices whose rows lie anywhere. A tile of results stays in registers while the
// operands pass by, so that each load serves several multiplications.
//
// Rows that come `ahead` elements later are asked for, line by line, as those here are read for the
// first time in a call. `fetch` asks for rows as a whole, before the loop: memory and arithmetic take
// turns then, which complete.cpp accepts because its loops lose more to the extra instructions.

namespace {

// A distance the compiler knows: nothing is asked for.
constexpr std::integral_constant<int64_t, 0> NOT_AHEAD{};

template <int ROWS, typename Row, typename Distance>
INLINE inline void ask_for(const Row *const *rows, int64_t d, Distance ahead, bool first) {
  if (!ahead || !first || d % LINE<Row>) return;
  for (int i = 0; i < ROWS; ++i) __builtin_prefetch(rows[i] + d + ahead);
}

// results[a * stride + b] = lefts[a] . rights[b], for a < A and b < B.
template <int A, int B, typename Left, typename Right, typename Distance>
INLINE inline void products_tile(const Left *const *lefts, const Right *const *rights,
                                 int64_t width, Real *results, int64_t stride, Distance ahead,
                                 bool first_left, bool first_right) {
  Real sums[A][B] = {};
  for (int64_t begin = 0; begin < width; begin += STRETCH) {
    Vector here[A][B] = {};
    int64_t d = begin, end = std::min(begin + STRETCH, width);
    for (; d + LANES <= end; d += LANES) {
      ask_for<A>(lefts, d, ahead, first_left);
      ask_for<B>(rights, d, ahead, first_right);
      Vector right[B];
      for (int b = 0; b < B; ++b) right[b] = load<Vector>(rights[b] + d);
      for (int a = 0; a < A; ++a) {
        Vector left = load<Vector>(lefts[a] + d);
        for (int b = 0; b < B; ++b) here[a][b] += left * right[b];
      }
    }
    for (int a = 0; a < A; ++a)
      for (int b = 0; b < B; ++b) sums[a][b] += total_of(here[a][b]);
    for (; d < end; ++d)
      for (int a = 0; a < A; ++a)
        for (int b = 0; b < B; ++b)
          sums[a][b] += load<Real>(lefts[a] + d) * load<Real>(rights[b] + d);
  }
  for (int a = 0; a < A; ++a) std::copy_n(sums[a], B, results + a * stride);
}
template <int A, typename Left, typename Right, typename Distance>
INLINE inline void products_of(const Left *const *lefts, const Right *const *rights,
                               int64_t others, int64_t width, Real *results, Distance ahead,
                               bool first) {
  int64_t b = 0;
  for (; b + 3 <= others; b += 3)
    products_tile<A, 3>(lefts, rights + b, width, results + b, others, ahead, b == 0, first);
  for (; b < others; ++b)
    products_tile<A, 1>(lefts, rights + b, width, results + b, others, ahead, b == 0, first);
}
// results[a * others + b] = lefts[a] . rights[b]
template <typename Left, typename Right, typename Distance>
APART void products(const Left *const *lefts, int64_t count, const Right *const *rights,
                    int64_t others, int64_t width, Real *results, Distance ahead) {
  int64_t a = 0;
  for (; a + 4 <= count; a += 4)
    products_of<4>(lefts + a, rights, others, width, results + a * others, ahead, a == 0);
  for (; a < count; ++a)
    products_of<1>(lefts + a, rights, others, width, results + a * others, ahead, a == 0);
}

// Weights of rows towards results: that of row i towards result o, at some distance each.
struct Weights {
  const Real *first;
  int64_t by_row, by_result;

  INLINE Real at(int64_t i, int64_t o) const { return first[i * by_row + o * by_result]; }
  INLINE Weights from(int64_t o) const { return {first + o * by_result, by_row, by_result}; }
};

// results[o] = starts[o] + sum over i of weights(i, o) * rows[i], for o < O, WAYS vectors from d on.
template <int O, int WAYS, typename V, typename Row, typename Start, typename Result,
          typename Distance>
INLINE inline void combinations_tile(const Row *const *rows, int64_t count, Weights weights,
                                     const Start *const *starts, Result *const *results,
                                     int64_t d, Distance ahead, bool first) {
  V totals[O][WAYS];
  for (int way = 0; way < WAYS; ++way) {
    int64_t at = d + way * lanes<V>;
    for (int o = 0; o < O; ++o) totals[o][way] = starts ? load<V>(starts[o] + at) : V{};
    if (starts) ask_for<O>(starts, at, ahead, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    V row[WAYS];
    for (int way = 0; way < WAYS; ++way) {
      int64_t at = d + way * lanes<V>;
      ask_for<1>(rows + i, at, ahead, first);
      row[way] = load<V>(rows[i] + at);
    }
    for (int o = 0; o < O; ++o) {
      Real weight = weights.at(i, o);
      for (int way = 0; way < WAYS; ++way) totals[o][way] += weight * row[way];
    }
  }
  for (int o = 0; o < O; ++o)
    for (int way = 0; way < WAYS; ++way) store(results[o] + d + way * lanes<V>, totals[o][way]);
}
// Of 16 registers sums take at most 12; the row and a weight are in the others.
template <int O, int WAYS, typename Row, typename Start, typename Result, typename Distance>
INLINE inline void combinations_of(const Row *const *rows, int64_t count, Weights weights,
                                   const Start *const *starts, Result *const *results,
                                   int64_t width, Distance ahead, bool first) {
  int64_t d = 0;
  for (; d + WAYS * LANES <= width; d += WAYS * LANES)
    combinations_tile<O, WAYS, Vector>(rows, count, weights, starts, results, d, ahead, first);
  for (; d + LANES <= width; d += LANES)
    combinations_tile<O, 1, Vector>(rows, count, weights, starts, results, d, ahead, first);
  for (; d < width; ++d)
    combinations_tile<O, 1, Real>(rows, count, weights, starts, results, d, NOT_AHEAD, first);
}
// results[o] = starts[o] + sum over i of weights(i, o) * rows[i]; no starts are zeros. A result may
// be its own start.
template <typename Row, typename Start, typename Result, typename Distance>
APART void combinations(const Row *const *rows, int64_t count, Weights weights,
                        const Start *const *starts, Result *const *results, int64_t others,
                        int64_t width, Distance ahead) {
  int64_t o = 0;
  auto begin = [&] { return starts ? starts + o : nullptr; };
  for (; o + 6 <= others; o += 6)
    combinations_of<6, 2>(rows, count, weights.from(o), begin(), results + o, width, ahead, o == 0);
  for (; o + 2 <= others; o += 2)
    combinations_of<2, 4>(rows, count, weights.from(o), begin(), results + o, width, ahead, o == 0);
  for (; o < others; ++o)
    combinations_of<1, 8>(rows, count, weights.from(o), begin(), results + o, width, ahead, o == 0);
}

// Asks for rows before they are read.
template <typename Row>
INLINE inline void fetch(const Row *const *rows, int64_t count, int64_t ahead, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += LINE<Row>) __builtin_prefetch(rows[i] + ahead + d);
}

// `count` rows, one after the other.
template <typename Row> std::vector<Row *> rows_of(Row *first, int64_t count, int64_t width) {
  std::vector<Row *> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = first + i * width;
  return rows;
}

}  // namespace
