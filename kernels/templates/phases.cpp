// The phases of Block Attention Residuals on a CPU. The formulas stand in complete.py, phase1.py
// and phase2.py of this package; function and argument names are those of plain_phases.py.
//
// All tensors are contiguous with the channels last: `tokens` rows of `width` elements. Rows stay
// in the first-level cache while a token is worked on, so each is read from memory once. Every
// thread has a contiguous run of tokens, so that results do not vary from run to run; sums over
// tokens are formed per thread in `[threads, ...]` and added up by the caller. Null pointers stand
// for what is missing or what nobody wants.

// Sources -----------------------------------------------------------------------------------------

extern "C" void complete(const Element *first, const Element *second, Element *source,
                         const Real *queries, Real *logits, Real *inverse_rms, int64_t sites,
                         double eps, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    auto query_rows = rows_of(queries, sites, width);
    for (int64_t t = begin; t < end; ++t) {
      const Element *row = first + t * width;
      Sum squares;
      if (second) {
        const Element *other = second + t * width;
        Element *sum = source + t * width;
        each(width, EACH {
          auto value = rounded(load<KIND>(row + d) + load<KIND>(other + d), row);
          store(sum + d, value);
          squares.add(way, value * value);
        });
        row = sum;
      } else {
        each(width, EACH {
          auto value = load<KIND>(row + d);
          squares.add(way, value * value);
        });
      }
      Real inverse = 1 / std::sqrt(squares.total() / width + Real(eps));
      inverse_rms[t] = inverse;
      dots(row, query_rows.data(), sites, width, logits + t, tokens);
      for (int64_t j = 0; j < sites; ++j) logits[j * tokens + t] *= inverse;
    }
  });
}

extern "C" void complete_backward(const Element *grad_source, const Real *grad_logits,
                                  const Element *source, const Real *queries, const Real *logits,
                                  const Real *inverse_rms, Element *grad, Real *grad_queries,
                                  int64_t sites, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    auto query_rows = rows_of(queries, sites, width);
    Real *own_sums = grad_queries ? grad_queries + thread * sites * width : nullptr;
    auto sum_rows = rows_of(own_sums, sites, width);
    std::vector<Real> slopes(sites * TOKENS), totals(TOKENS * width);
    auto total_rows = rows_of(totals.data(), TOKENS, width);
    in_batches(begin, end, [&](int64_t t, int64_t some) {
      Real towards_self[TOKENS] = {};
      for (int64_t j = 0; j < sites; ++j)
        for (int64_t u = 0; u < some; ++u) {
          int64_t at = j * tokens + t + u;
          slopes[j * TOKENS + u] = grad_logits[at] * inverse_rms[t + u];
          towards_self[u] += grad_logits[at] * logits[at];
        }
      auto source_rows = rows_of(source + t * width, some, width);
      if (own_sums)
        combine(source_rows.data(), some, slopes.data(), TOKENS, 1, sum_rows.data(),
                sum_rows.data(), sites, width);
      if (!grad) return;
      auto arriving = rows_of(grad_source ? grad_source + t * width : nullptr, some, width);
      combine(query_rows.data(), sites, slopes.data(), 1, TOKENS,
              grad_source ? arriving.data() : ZEROS, total_rows.data(), some, width);
      for (int64_t u = 0; u < some; ++u) {
        Real inverse = inverse_rms[t + u], along = towards_self[u] * inverse * inverse / width;
        Element *out = grad + (t + u) * width;
        each(width, EACH {
          store(out + d, load<KIND>(total_rows[u] + d) - along * load<KIND>(source_rows[u] + d));
        });
      }
    });
  });
}

// All sites of a block over its completed sources -------------------------------------------------

extern "C" void phase1(const Element **sources, const Real **logits, Element **mixes,
                       Real *statistics, int64_t count, int64_t sites, int64_t tokens,
                       int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(sites * count * TOKENS);
    std::vector<const Element *> source_rows(count);
    std::vector<Element *> mix_rows(sites);
    in_batches(begin, end, [&](int64_t t, int64_t some) {
      for (int64_t j = 0; j < sites; ++j) {
        Real *alpha = &alphas[j * count * TOKENS], top[TOKENS], sum[TOKENS] = {};
        std::copy_n(logits[0] + j * tokens + t, some, top);
        for (int64_t i = 1; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u) top[u] = std::max(top[u], logits[i][j * tokens + t + u]);
        for (int64_t i = 0; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            sum[u] += alpha[i * TOKENS + u] = exponential(logits[i][j * tokens + t + u] - top[u]);
        for (int64_t u = 0; u < some; ++u) {
          statistics[2 * j * tokens + t + u] = top[u] + std::log(sum[u]);
          statistics[(2 * j + 1) * tokens + t + u] = 0;
          sum[u] = 1 / sum[u];
        }
        for (int64_t i = 0; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u) alpha[i * TOKENS + u] *= sum[u];
      }
      for (int64_t u = 0; u < some; ++u) {
        rows_at(source_rows, sources, (t + u) * width);
        rows_at(mix_rows, mixes, (t + u) * width);
        combine(source_rows.data(), count, &alphas[u], count * TOKENS, TOKENS, ZEROS,
                mix_rows.data(), sites, width);
      }
    });
  });
}

extern "C" void phase1_backward(const Element **grad_mixes, const Real *grad_statistics,
                                const Element **grad_carriers, const Element **sources,
                                const Real **logits, const Real *statistics, Element **grads,
                                Real *grad_logits, int64_t count, int64_t sites, int64_t tokens,
                                int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(count * sites * TOKENS), slopes(sites);
    std::vector<Element> zeros(width), unwanted(width);
    std::vector<const Element *> mix_rows(sites), carrier_rows(count);
    std::vector<Element *> grad_rows(count);
    bool wants_sources = std::any_of(grads, grads + count, [](Element *grad) { return grad; });
    in_batches(begin, end, [&](int64_t t, int64_t some) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < sites; ++j)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            alphas[(i * sites + j) * TOKENS + u] = exponential(
                logits[i][j * tokens + t + u] - statistics[2 * j * tokens + t + u]);
      for (int64_t u = 0; u < some; ++u) {
        int64_t offset = (t + u) * width;
        rows_at(mix_rows, grad_mixes, offset, (const Element *)zeros.data());
        rows_at(carrier_rows, grad_carriers, offset);
        rows_at(grad_rows, grads, offset, unwanted.data());
        if (wants_sources)
          combine(mix_rows.data(), sites, &alphas[u], sites * TOKENS, TOKENS, carrier_rows.data(),
                  grad_rows.data(), count, width);
        for (int64_t i = 0; grad_logits && i < count; ++i) {
          dots(sources[i] + offset, mix_rows.data(), sites, width, slopes.data(), 1);
          for (int64_t j = 0; j < sites; ++j) {
            Real constant = grad_statistics[2 * j * tokens + t + u]
                            - grad_statistics[(2 * j + 1) * tokens + t + u];
            grad_logits[(i * sites + j) * tokens + t + u] =
                alphas[(i * sites + j) * TOKENS + u] * (slopes[j] + constant);
          }
        }
      }
    });
  });
}

// One site ----------------------------------------------------------------------------------------

// `direct` are the completed sources and, last, the partial sum, if there is one: then `branch` is
// null or is added to it, into `partial`. `saved` holds a row of logits per direct source, then
// one of inverse RMS per direct source, then the norm's scale and mean. `wide` says that normed
// rows are of type Real.
extern "C" void phase2(const Element *before, const Real *statistics, const Element **direct,
                       int64_t count, const Element *branch, Element *partial, const Real *query,
                       double eps, double factor, int norm, const Real *weight, const Real *bias,
                       double norm_eps, Element *mixed, void *normed, int wide, Real *saved,
                       int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    int64_t first = before != nullptr;
    std::vector<Real> row(width), betas(first + count);
    std::vector<const Element *> rows(first + count);
    for (int64_t t = begin; t < end; ++t) {
      if (before) {
        rows[0] = before + t * width;
        betas[0] = statistics[t];
      }
      for (int64_t k = 0; k < count; ++k) {
        const Element *source = direct[k] + t * width;
        Sum squares, along;
        if (branch && k == count - 1) {
          const Element *more = branch + t * width;
          Element *sum = partial + t * width;
          each(width, EACH {
            auto value = rounded(load<KIND>(source + d) + load<KIND>(more + d), source);
            store(sum + d, value);
            squares.add(way, value * value);
            along.add(way, value * load<KIND>(query + d));
          });
          source = sum;
        } else {
          each(width, EACH {
            auto value = load<KIND>(source + d);
            squares.add(way, value * value);
            along.add(way, value * load<KIND>(query + d));
          });
        }
        Real inverse = 1 / std::sqrt(squares.total() / width + Real(eps));
        rows[first + k] = source;
        betas[first + k] = saved[k * tokens + t] = inverse * along.total();
        saved[(count + k) * tokens + t] = inverse;
      }
      softmax(betas);
      Normed state =
          mix_row(row.data(), rows, betas, factor, Norm(norm), norm_eps, width);
      if (mixed) copy_row(mixed + t * width, row.data(), width);
      if (norm == NONE) continue;
      saved[2 * count * tokens + t] = state.scale;
      if (norm == LAYER) saved[(2 * count + 1) * tokens + t] = state.mean;
      if (wide)
        write_normed((Real *)normed + t * width, row.data(), state, weight, bias, width);
      else
        write_normed((Element *)normed + t * width, row.data(), state, weight, bias, width);
    }
  });
}

// `sums` is [threads, 3, width]: towards the query, the norm's weight and its bias.
extern "C" void phase2_backward(const Element *grad_partial, const Element *grad_mixed,
                                const void *grad_normed, int wide, const Element *before,
                                const Real *statistics, const Element **direct, int64_t count,
                                const Real *query, double factor, int norm, const Real *weight,
                                const Real *saved, Element *grad_before, Real *grad_statistics,
                                Element **grads, Real *sums, int64_t tokens, int64_t width,
                                int threads) {
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    int64_t first = before != nullptr, all = first + count;
    std::vector<Real> row(width), total(width), scratch(width), betas(all), slopes(all);
    std::vector<const Element *> rows(all);
    Real *to_query = sums + thread * 3 * width, *to_weight = to_query + width,
         *to_bias = to_weight + width;
    for (int64_t t = begin; t < end; ++t) {
      if (before) {
        rows[0] = before + t * width;
        betas[0] = statistics[t];
      }
      for (int64_t k = 0; k < count; ++k) {
        rows[first + k] = direct[k] + t * width;
        betas[first + k] = saved[k * tokens + t];
      }
      softmax(betas);
      if (grad_mixed)
        copy_row(total.data(), grad_mixed + t * width, width);
      else
        std::fill(total.begin(), total.end(), Real(0));
      if (grad_normed) {
        mix_row(row.data(), rows, betas, factor, NONE, 0, width);
        Normed state{saved[2 * count * tokens + t],
                     norm == LAYER ? saved[(2 * count + 1) * tokens + t] : 0};
        if (wide)
          normed_backward(total.data(), (const Real *)grad_normed + t * width, row.data(),
                          scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
        else
          normed_backward(total.data(), (const Element *)grad_normed + t * width, row.data(),
                          scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
      }
      Real expected = 0;
      for (int64_t m = 0; m < all; ++m) {
        slopes[m] = Real(factor) * dot(rows[m], (const Real *)total.data(), width);
        expected += betas[m] * slopes[m];
      }
      if (grad_before) {
        Element *out = grad_before + t * width;
        Real share = betas[0] * Real(factor);
        each(width, EACH { store(out + d, share * load<KIND>(total.data() + d)); });
        grad_statistics[t] = betas[0] * (slopes[0] - expected);
        grad_statistics[tokens + t] = betas[0] * slopes[0];
      }
      for (int64_t k = 0; k < count; ++k) {
        const Element *source = rows[first + k];
        Real inverse = saved[(count + k) * tokens + t], logit = saved[k * tokens + t];
        Real share = betas[first + k] * Real(factor);
        Real towards_query = betas[first + k] * (slopes[first + k] - expected) * inverse;
        Real towards_self = towards_query * inverse * logit / width;
        const Element *more = k == count - 1 && grad_partial ? grad_partial + t * width : nullptr;
        Element *out = grads[k] ? grads[k] + t * width : nullptr;
        each(width, EACH {
          auto value = load<KIND>(source + d);
          store(to_query + d, load<KIND>(to_query + d) + towards_query * value);
          if (!out) return;
          auto grad = share * load<KIND>(total.data() + d)
                      + towards_query * load<KIND>(query + d) - towards_self * value;
          if (more) grad += load<KIND>(more + d);
          store(out + d, grad);
        });
      }
    }
  });
}
