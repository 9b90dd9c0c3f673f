// All sites of a block over its completed sources on a CPU. The formulas stand in phase1.py of this
// package; phase2.cpp says how these files are written.

// Element k of `logits` is that of source k, [sites, tokens].
extern "C" void phase1(const Element **sources, int64_t count, const Real **logits, int64_t sites,
                       Element **mixes, Real *statistics, Real *weights, int64_t tokens,
                       int64_t width, int64_t threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(count * sites * TOKENS);
    std::vector<const Element *> rows(count);
    std::vector<Element *> results(sites);
    in_batches(begin, end, batch_of(width), [&](int64_t t, int64_t some) {
      for (int64_t j = 0; j < sites; ++j) {
        Real *alpha = &alphas[j * count * TOKENS], *log_sums = statistics + 2 * j * tokens + t;
        for (int64_t k = 0; k < count; ++k)
          std::copy_n(logits[k] + j * tokens + t, some, alpha + k * TOKENS);
        softmax(alpha, count, some, log_sums);
        std::fill_n(log_sums + tokens, some, Real(0));
        for (int64_t k = 0; weights && k < count; ++k)
          std::copy_n(alpha + k * TOKENS, some, weights + (k * sites + j) * tokens + t);
      }
      for (int64_t u = 0; u < some; ++u) {
        rows_at(rows, sources, (t + u) * width);
        rows_at(results, mixes, (t + u) * width);
        combinations(rows.data(), count, {alphas.data() + u, TOKENS, count * TOKENS},
                     (const Element *const *)nullptr, results.data(), sites, width,
                     AHEAD * width);
      }
    });
  });
}

namespace {

// Counts the slopes of a softmax, `members` rows of TOKENS, from that of the largest weight, and
// finds the expected one. A weight near one would else leave next to nothing of the difference of
// its slope and the expected one. Rows of weights are `apart`.
void count_slopes(Real *slopes, const Real *weights, int64_t apart, int64_t members, int64_t some,
                  Real *expected) {
  Real largest[TOKENS] = {}, level[TOKENS] = {};
  for (int64_t m = 0; m < members; ++m)
#pragma omp simd
    for (int64_t u = 0; u < some; ++u) {
      Real weight = weights[m * apart + u];
      level[u] = weight > largest[u] ? slopes[m * TOKENS + u] : level[u];
      largest[u] = std::max(largest[u], weight);
    }
  std::fill_n(expected, some, Real(0));
  for (int64_t m = 0; m < members; ++m)
#pragma omp simd
    for (int64_t u = 0; u < some; ++u)
      expected[u] += weights[m * apart + u] * (slopes[m * TOKENS + u] -= level[u]);
}

}  // namespace

// Gradients have come for the mixes of the sites `mixed`, and for the carriers `arrived`.
extern "C" void phase1_backward(const Element **sources, int64_t count, const Real *weights,
                                int64_t sites, const Element **grad_mixes, const int64_t *mixed,
                                int64_t mixes, const Real *grad_statistics,
                                const Element **arriving, const int64_t *arrived,
                                int64_t arrivals, Element **grads, const int64_t *wanted,
                                int64_t wants, Real *grad_logits, int64_t tokens, int64_t width,
                                int64_t threads) {
  auto all_arriving = placed(arriving, arrived, arrivals, count);
  std::vector<Element> zeros((1 + AHEAD) * width);
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    // Rows of TOKENS scalars: weights by source wanted and site mixed, slopes by source and site.
    std::vector<Real> shares(wants * mixes * TOKENS), slopes(count * sites * TOKENS);
    std::vector<Real> found(count * mixes);
    std::vector<const Element *> rows(count), mix_rows(mixes), starts(wants);
    std::vector<Element *> results(wants);
    in_batches(begin, end, batch_of(width), [&](int64_t t, int64_t some) {
      for (int64_t i = 0; i < wants; ++i)
        for (int64_t m = 0; m < mixes; ++m)
          std::copy_n(weights + (wanted[i] * sites + mixed[m]) * tokens + t, some,
                      &shares[(i * mixes + m) * TOKENS]);
      for (int64_t u = 0; u < some; ++u) {
        int64_t offset = (t + u) * width;
        rows_at(rows, sources, offset);
        rows_at(mix_rows, grad_mixes, offset);
        rows_at(results, grads, offset);
        for (int64_t i = 0; i < wants; ++i) {
          const Element *arrival = all_arriving[wanted[i]];
          starts[i] = arrival ? arrival + offset : zeros.data();
        }
        if (grad_logits) {
          products(rows.data(), count, mix_rows.data(), mixes, width, found.data(), AHEAD * width);
          for (int64_t k = 0; k < count; ++k)
            for (int64_t m = 0; m < mixes; ++m)
              slopes[(mixed[m] * count + k) * TOKENS + u] = found[k * mixes + m];
        }
        combinations(mix_rows.data(), mixes, {shares.data() + u, TOKENS, mixes * TOKENS},
                     starts.data(), results.data(), wants, width, AHEAD * width);
      }
      for (int64_t j = 0; grad_logits && j < sites; ++j) {
        const Real *alphas = weights + j * tokens + t;
        Real *slope = &slopes[j * count * TOKENS], expected[TOKENS];
        count_slopes(slope, alphas, sites * tokens, count, some, expected);
        for (int64_t k = 0; k < count; ++k) {
          int64_t row = (k * sites + j) * tokens + t;
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            grad_logits[row + u] = weights[row + u] * (slope[k * TOKENS + u] - expected[u]
                                                       + grad_statistics[2 * j * tokens + t + u]);
        }
      }
    });
  });
}
