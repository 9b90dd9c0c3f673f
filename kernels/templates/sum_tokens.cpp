// The sum of rows over tokens on a CPU: a bias's gradient. phase2.cpp says how these files are
// written.

extern "C" void sum_tokens(const Element **sources, Real *sum, int64_t tokens, int64_t width,
                           int64_t threads) {
  Shares sums(threads, width);
  const Real ones[] = {1, 1, 1, 1};
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    std::vector<Real> part(width);
    Real *total = sums.of(thread);
    in_batches(begin, end, STRETCH, [&](int64_t start, int64_t many) {
      std::fill(part.begin(), part.end(), Real(0));
      in_batches(start, start + many, 4, [&](int64_t t, int64_t some) {
        auto rows = rows_of(sources[0] + t * width, some, width);
        combine(rows.data(), some, ones, width, 0, [&](auto value, int, int64_t d) INLINE {
          store(&part[d], load<decltype(value)>(&part[d]) + value);
        });
      });
      each(width, EACH { store(total + d, load<KIND>(total + d) + load<KIND>(&part[d])); });
    });
  });
  sums.add_up(sum, 0, width);
}
