// From tensors to addresses, upon PyTorch's stable ABI. One function per operator follows, generated
// by cpp_library.py: it hands what an operator is called with to its function.

#include <optional>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;

// The address of a tensor that a function can read as it is; becomes the pointer it asks for.
struct Address {
  void *address;
  template <typename T> operator T *() const { return static_cast<T *>(address); }
};

using torch::headeronly::ScalarType;
constexpr ScalarType REAL = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
#if defined(FOR_BFLOAT16)
constexpr ScalarType ELEMENT = ScalarType::BFloat16;
#else
constexpr ScalarType ELEMENT = REAL;
#endif

Address address_of(const Tensor &tensor) {
  ScalarType type = tensor.scalar_type();
  bool fits = tensor.is_contiguous() && (type == ELEMENT || type == REAL);
  STD_TORCH_CHECK(fits, "the C++ library was handed a tensor that is not contiguous, or not of the "
                        "dtype of the stream or its sums; this is a bug of attnres-compile");
  return {tensor.data_ptr()};
}
Address address_of(const std::optional<Tensor> &tensor) { return tensor ? address_of(*tensor) : Address{nullptr}; }

// The addresses of several.
struct Addresses {
  std::vector<void *> addresses;
  explicit Addresses(const std::vector<Tensor> &tensors) {
    for (const Tensor &tensor : tensors) addresses.push_back(address_of(tensor).address);
  }
  template <typename T> operator T **() { return (T **)addresses.data(); }
};

// Those of a source, [*tokens, width].
struct Sizes {
  int64_t tokens, width, threads;

  explicit Sizes(const Tensor &like) : width(like.size(like.dim() - 1)) {
    tokens = width ? like.numel() / width : 0;
    threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(tokens, 1));
  }
};

}  // namespace

