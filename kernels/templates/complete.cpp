// A completed source on a CPU: its sum, and its logits towards all later sites. The formulas stand
// in complete.py of this package; phase2.cpp says how these files are written.

extern "C" void complete(const Element **sources, const Element *branch, const Element *branch_bias,
                         const Real *queries, int64_t sites, double eps, Element *sum, Real *logits,
                         Real *inverse_rms, int64_t tokens, int64_t width, int64_t threads) {
  auto later = rows_of(queries, sites, width);
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> found(TOKENS * sites), firsts(TOKENS);
    int64_t batch = batch_of(width);
    in_batches(begin, end, batch, [&](int64_t t, int64_t some) {
      const Element *first = sources[0] + t * width, *made = branch ? sum + t * width : first;
      Real *inverses = inverse_rms + t;
      Rows skip{first, first + batch * width, width};
      // The first query comes along with the squares.
      if (branch) {
        const Element *more = branch + t * width;
        SummedRows summed{skip, {more, more + batch * width, width}, branch_bias, sum + t * width};
        measure(summed, some, queries, width, inverses, firsts.data());
      } else {
        measure(skip, some, queries, width, inverses, firsts.data());
      }
      auto rows = rows_of(made, some, width);
      products(rows.data(), some, later.data() + 1, sites - 1, width, found.data(), NOT_AHEAD);
      for (int64_t u = 0; u < some; ++u) {
        inverses[u] = 1 / std::sqrt(inverses[u] / width + Real(eps));
        logits[t + u] = firsts[u] * inverses[u];
      }
      for (int64_t j = 1; j < sites; ++j)
        for (int64_t u = 0; u < some; ++u)
          logits[j * tokens + t + u] = found[u * (sites - 1) + j - 1] * inverses[u];
    });
  });
}

// What is wanted for the branch's bias is the sum over tokens of the gradient.
extern "C" void complete_backward(const Element **sources, const Element *grad_source,
                                  const Real *grad_logits, const Real *queries, int64_t sites,
                                  const Real *logits, const Real *inverse_rms, Element *grad,
                                  Real *grad_queries, Real *grad_branch_bias, int64_t tokens,
                                  int64_t width, int64_t threads) {
  Shares sums(threads, (sites + 1) * width);
  auto later = rows_of(queries, sites, width);
  std::vector<Element> zeros(width);
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    auto sum_rows = rows_of(sums.of(thread), sites, width);
    Real *to_branch_bias = sums.of(thread) + sites * width;
    std::vector<Real> slopes(sites * TOKENS), totals(TOKENS * width);
    auto total_rows = rows_of(totals.data(), TOKENS, width);
    in_batches(begin, end, batch_of(width), [&](int64_t t, int64_t some) {
      Real to_self[TOKENS] = {};
      for (int64_t j = 0; j < sites; ++j)
#pragma omp simd
        for (int64_t u = 0; u < some; ++u) {
          int64_t at = j * tokens + t + u;
          slopes[j * TOKENS + u] = grad_logits[at] * inverse_rms[t + u];
          to_self[u] += grad_logits[at] * logits[at];
        }
      auto rows = rows_of(sources[0] + t * width, some, width);
      fetch(rows.data(), some, batch_of(width) * width, width);
      if (grad_queries)
        combinations(rows.data(), some, {slopes.data(), 1, TOKENS}, sum_rows.data(),
                     sum_rows.data(), sites, width, NOT_AHEAD);
      if (!grad) return;
      auto arriving = rows_of(grad_source ? grad_source + t * width : zeros.data(), some,
                              grad_source ? width : 0);
      if (grad_source) fetch(arriving.data(), some, batch_of(width) * width, width);
      combinations(later.data(), sites, {slopes.data(), TOKENS, 1}, arriving.data(),
                   total_rows.data(), some, width, NOT_AHEAD);
      for (int64_t u = 0; u < some; ++u) {
        Real inverse = inverse_rms[t + u], along = to_self[u] * inverse * inverse / width;
        Element *out = grad + (t + u) * width;
        each(width, EACH {
          auto value = load<KIND>(total_rows[u] + d) - along * load<KIND>(rows[u] + d);
          store(out + d, value);
          if (grad_branch_bias)
            store(to_branch_bias + d, load<KIND>(to_branch_bias + d) + value);
        });
      }
    });
  });
  sums.add_up(grad_queries, 0, sites * width);
  sums.add_up(grad_branch_bias, sites * width, width);
}
