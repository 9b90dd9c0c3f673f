// One site of Block Attention Residuals on a CPU, in one pass over all that it mixes. The formulas
// stand in phase2.py of this package; names of arguments are those of the schemas in
// cpp_library.py.
//
// All tensors are contiguous with the channels last: `tokens` rows of `width` elements. Rows stay
// in the first-level cache while a token is worked on, so each is read from memory once. Every
// thread has a contiguous run of tokens, and sums over tokens are formed per thread and added up in
// the order of threads, so that results do not vary from run to run. Null pointers stand for what
// is missing or what nobody wants. Arguments are in the order of these schemas, results last, and
// after them the sizes.

// With `statistics` the first of the sources is phase 1's mix, and these are its logits. The last
// may be a partial sum: then `branch`, unless it is null, is added to it, with `branch_bias`, into
// `partial`. The query may come as two factors, of which `gain` is one. `saved` holds a row of
// logits per source but phase 1's, then one of inverse RMS for each of them, then the norm's scale
// and mean. `wide` says that normed rows are of type Real.
extern "C" void phase2(const Element **sources, int64_t count, const Real *statistics,
                       const Element *branch, const Element *branch_bias, const Real *query,
                       const Real *gain, double eps, double factor, int64_t norm,
                       const Real *weight, const Real *bias, double norm_eps, int64_t wide,
                       Element *partial, Element *mixed, void *normed, Real *saved, int64_t tokens,
                       int64_t width, int64_t threads) {
  std::vector<Real> product(query, query + width);
  for (int64_t d = 0; gain && d < width; ++d) product[d] *= gain[d];
  int64_t first = statistics != nullptr, others = count - first;
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> mixes(TOKENS * width), betas(count * TOKENS), shares(count);
    std::vector<Real> unsaved(saved ? 0 : 2 * TOKENS);
    std::vector<const Element *> tensors(sources, sources + count), rows(count);
    if (branch) tensors.back() = partial;
    int64_t batch = batch_of(width);
    in_batches(begin, end, batch, [&](int64_t t, int64_t some) {
      int64_t after = (t + batch) * width;
      if (statistics) std::copy_n(statistics + t, some, betas.begin());
      for (int64_t k = first; k < count; ++k) {
        Real *logits = saved ? saved + (k - first) * tokens + t : unsaved.data();
        Real *inverses = saved ? logits + others * tokens : unsaved.data() + TOKENS;
        Real *beta = &betas[k * TOKENS];
        const Element *next = k + 1 < count ? sources[k + 1] + t * width : sources[0] + after;
        Rows source{sources[k] + t * width, next, width};
        if (branch && k == count - 1) {
          Rows more{branch + t * width, branch + after, width};
          SummedRows sum{source, more, branch_bias, partial + t * width};
          measure(sum, some, product.data(), width, inverses, logits);
        } else {
          measure(source, some, product.data(), width, inverses, logits);
        }
#pragma omp simd
        for (int64_t u = 0; u < some; ++u) {
          inverses[u] = 1 / std::sqrt(inverses[u] / width + Real(eps));
          beta[u] = logits[u] *= inverses[u];
        }
      }
      softmax(betas.data(), count, some);
      Real means[TOKENS], scales[TOKENS];
      for (int64_t u = 0; u < some; ++u) {
        rows_at(rows, tensors.data(), (t + u) * width);
        for (int64_t k = 0; k < count; ++k) shares[k] = Real(factor) * betas[k * TOKENS + u];
        Real *row = &mixes[u * width];
        mix_row(row, rows.data(), count, shares.data(), width, batch * width, &means[u],
                &scales[u]);
        if (mixed) copy_row(mixed + (t + u) * width, row, width);
      }
      if (norm == NONE) return;
      if (norm == RMS) std::fill_n(means, some, Real(0));
      for (int64_t u = 0; norm == LAYER && u < some; ++u) {
        means[u] /= width;
        scales[u] = square_sum(&mixes[u * width], means[u], width);
      }
      for (int64_t u = 0; u < some; ++u)
        scales[u] = 1 / std::sqrt(scales[u] / width + Real(norm_eps));
      if (saved) std::copy_n(scales, some, saved + 2 * others * tokens + t);
      if (saved && norm == LAYER)
        std::copy_n(means, some, saved + (2 * others + 1) * tokens + t);
      for (int64_t u = 0; u < some; ++u) {
        Normed state{scales[u], means[u]};
        const Real *row = &mixes[u * width];
        int64_t offset = (t + u) * width;
        if (wide)
          write_normed((Real *)normed + offset, row, state, weight, bias, width);
        else
          write_normed((Element *)normed + offset, row, state, weight, bias, width);
      }
    });
  });
}

// Gradients that have `arrived` for some sources are added to those that are `wanted`. What is
// wanted for the branch's bias is the sum over tokens of the last source's gradient.
extern "C" void phase2_backward(const Element **sources, int64_t count, const Real *statistics,
                                const Element **arriving, const int64_t *arrived,
                                int64_t arrivals, const Element *grad_mixed,
                                const void *grad_normed, int64_t wide, const Real *query,
                                double factor, int64_t norm, const Real *weight, const Real *saved,
                                Element **grads, const int64_t *wanted, int64_t wants,
                                Real *grad_statistics, Real *grad_query, Real *grad_weight,
                                Real *grad_bias, Real *grad_branch_bias, int64_t tokens,
                                int64_t width, int64_t threads) {
  int64_t first = statistics != nullptr, others = count - first;
  auto all_arriving = placed(arriving, arrived, arrivals, count);
  auto all_grads = placed(grads, wanted, wants, count);
  Shares sums(threads, 4 * width);
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    std::vector<Real> row(width), total(width), scratch(width);
    std::vector<Real> shares(count), slopes(count), towards_query(count), towards_self(count);
    // Rows of scalars lie a power of two apart, for the cache on top of each other: a batch of them
    // is copied.
    std::vector<Real> logits(count * TOKENS), inverses(count * TOKENS), betas(count * TOKENS);
    std::vector<const Element *> rows(count);
    Real *to_query = sums.of(thread), *to_weight = to_query + width, *to_bias = to_weight + width,
         *to_branch_bias = to_bias + width;
    in_batches(begin, end, TOKENS, [&](int64_t start, int64_t some) {
      if (statistics) std::copy_n(statistics + start, some, logits.begin());
      for (int64_t k = first; k < count; ++k) {
        const Real *logit = saved + (k - first) * tokens + start;
        std::copy_n(logit, some, &logits[k * TOKENS]);
        std::copy_n(logit + others * tokens, some, &inverses[k * TOKENS]);
      }
      betas = logits;
      softmax(betas.data(), count, some);
      for (int64_t u = 0; u < some; ++u) {
        int64_t t = start + u;
        rows_at(rows, sources, t * width);
        for (int64_t k = 0; k < count; ++k) shares[k] = Real(factor) * betas[k * TOKENS + u];
        const Element *read = grad_mixed ? grad_mixed + t * width : nullptr;
        if (!grad_normed && read) {
          copy_row(total.data(), read, width);
        } else if (!grad_normed) {
          std::fill(total.begin(), total.end(), Real(0));
        } else {
          Real sum, squares;
          mix_row(row.data(), rows.data(), count, shares.data(), width, AHEAD * width, &sum,
                  &squares);
          Normed state{saved[2 * others * tokens + t],
                       norm == LAYER ? saved[(2 * others + 1) * tokens + t] : 0};
          if (wide)
            normed_backward(total.data(), read, (const Real *)grad_normed + t * width, row.data(),
                            scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
          else
            normed_backward(total.data(), read, (const Element *)grad_normed + t * width, row.data(),
                            scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
        }
        dots(total.data(), rows.data(), count, width, slopes.data());
        // Counted from that of the largest weight: a weight near one would leave next to nothing of
        // the difference of its slope and the expected one.
        int64_t largest = 0;
        for (int64_t k = 1; k < count; ++k)
          if (betas[k * TOKENS + u] > betas[largest * TOKENS + u]) largest = k;
        if (grad_statistics) grad_statistics[tokens + t] = shares[0] * slopes[0];
        Real level = slopes[largest], expected = 0;
        for (int64_t k = 0; k < count; ++k) slopes[k] -= level;
        for (int64_t k = 0; k < count; ++k) expected += betas[k * TOKENS + u] * slopes[k];
        if (grad_statistics) grad_statistics[t] = shares[0] * (slopes[0] - expected);
        for (int64_t k = first; k < count; ++k) {
          Real inverse = inverses[k * TOKENS + u];
          towards_query[k] = shares[k] * (slopes[k] - expected) * inverse;
          towards_self[k] = towards_query[k] * inverse * logits[k * TOKENS + u] / width;
        }
        combine(rows.data() + first, others, towards_query.data() + first, width, 0,
                [&](auto value, int, int64_t d) INLINE {
                  store(to_query + d, load<decltype(value)>(to_query + d) + value);
                });
        for (int64_t k = 0; k < count; ++k) {
          if (!all_grads[k]) continue;
          Real share = shares[k], slope = towards_query[k], to_self = towards_self[k];
          const Element *source = rows[k];
          const Element *more = all_arriving[k] ? all_arriving[k] + t * width : nullptr;
          Element *out = all_grads[k] + t * width;
          if (k < first) {  // no query has read it here
            each(width, EACH {
              auto grad = share * load<KIND>(total.data() + d);
              if (more) grad += load<KIND>(more + d);
              store(out + d, grad);
            });
            continue;
          }
          auto write = [&](auto adds, auto sums_up) INLINE {
            each(width, EACH {
              auto grad = share * load<KIND>(total.data() + d) + slope * load<KIND>(query + d)
                          - to_self * load<KIND>(source + d);
              if (adds) grad += load<KIND>(more + d);
              if (adds && d % LINE<Element> == 0) __builtin_prefetch(more + d + AHEAD * width);
              store(out + d, grad);
              if (sums_up) store(to_branch_bias + d, load<KIND>(to_branch_bias + d) + grad);
            });
          };
          bool sums_up = k == count - 1 && grad_branch_bias;
          std::true_type yes;
          std::false_type no;
          if (more && sums_up) write(yes, yes);
          else if (more) write(yes, no);
          else if (sums_up) write(no, yes);
          else write(no, no);
        }
      }
    });
  });
  sums.add_up(grad_query, 0, width);
  sums.add_up(grad_weight, width, width);
  sums.add_up(grad_bias, 2 * width, width);
  sums.add_up(grad_branch_bias, 3 * width, width);
}
