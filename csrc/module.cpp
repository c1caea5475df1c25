// Native kernels of holdfast: arrays arrive as addresses, counts are in elements, no call holds the GIL.
#include <nanobind/nanobind.h>

#include <cstdlib>

#include "attention_merge.h"
#include "best_fit.h"
#include "bit_sums.h"
#include "crc32c.h"
#include "fixed_point.h"
#include "instruction_set.h"
#include "packing.h"
#include "permutation.h"
#include "philox.h"
#include "swiglu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace holdfast {

void define_file_engine(nb::module_& module);  // module_files.cpp

namespace {

using Address = std::uintptr_t;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class Value>
Value* at(Address address) {
  return reinterpret_cast<Value*>(address);
}

template <class Gradient>
void define_accumulate(nb::module_& module, const char* name, const char* rows_name) {
  module.def(
      name,
      [](Address accumulator, Address gradient, std::int64_t count, int fraction_bits, bool first) {
        return accumulate(at<std::int64_t>(accumulator), at<const Gradient>(gradient), count,
                          fraction_bits, first);
      },
      "accumulator"_a, "gradient"_a, "count"_a, "fraction_bits"_a, "first"_a = false, Unlocked());
  module.def(
      rows_name,
      [](Address accumulator, Address gradient, Address rows, std::int64_t row_count,
         std::int64_t row_elements, int fraction_bits) {
        return accumulate_rows(at<std::int64_t>(accumulator), at<const Gradient>(gradient),
                               at<const std::int64_t>(rows), row_count, row_elements,
                               fraction_bits);
      },
      "accumulator"_a, "gradient"_a, "rows"_a, "row_count"_a, "row_elements"_a, "fraction_bits"_a,
      Unlocked());
}

template <class Value>
void define_conversion(nb::module_& module, const char* convert_name, const char* squares_name) {
  module.def(
      convert_name,
      [](Address sums, Address output, std::int64_t count, int fraction_bits) {
        return reduce_convert(at<const std::int64_t>(sums), at<Value>(output), count,
                              fraction_bits);
      },
      "sums"_a, "output"_a, "count"_a, "fraction_bits"_a, Unlocked());
  module.def(
      squares_name,
      [](Address values, std::int64_t count) { return sum_squares(at<const Value>(values), count); },
      "values"_a, "count"_a, Unlocked());
}

template <class Value>
void define_distributions(nb::module_& module, const char* uniform_name, const char* normal_name,
                          const char* box_name) {
  module.def(
      uniform_name,
      [](Address output, std::int64_t count, std::uint64_t key, std::uint64_t stream,
         std::int64_t offset) {
        philox_uniform(at<Value>(output), count, {key, stream, offset});
      },
      "output"_a, "count"_a, "key"_a, "stream"_a, "offset"_a, Unlocked());
  module.def(
      normal_name,
      [](Address output, std::int64_t count, std::uint64_t key, std::uint64_t stream,
         std::int64_t offset, double mean, double std) {
        philox_normal(at<Value>(output), count, {key, stream, offset}, mean, std);
      },
      "output"_a, "count"_a, "key"_a, "stream"_a, "offset"_a, "mean"_a, "std"_a, Unlocked());
  module.def(
      box_name,
      [](Address output, std::int64_t rows, std::int64_t columns, std::int64_t row_start,
         std::int64_t column_start, std::int64_t total_columns, std::uint64_t key,
         std::uint64_t stream, double mean, double std) {
        philox_normal_box(at<Value>(output),
                          {rows, columns, row_start, column_start, total_columns},
                          {key, stream, 0}, mean, std);
      },
      "output"_a, "rows"_a, "columns"_a, "row_start"_a, "column_start"_a, "total_columns"_a,
      "key"_a, "stream"_a, "mean"_a, "std"_a, Unlocked());
}

template <class Value>
void define_dropout(nb::module_& module, const char* name) {
  module.def(
      name,
      [](Address output, Address input, std::int64_t count, std::uint64_t key,
         std::uint64_t stream, std::int64_t offset, double probability) {
        dropout_scale(at<Value>(output), at<const Value>(input), count, {key, stream, offset},
                      probability);
      },
      "output"_a, "input"_a, "count"_a, "key"_a, "stream"_a, "offset"_a, "probability"_a,
      Unlocked());
}

template <class Word>
void define_bit_sum(nb::module_& module, const char* name) {
  module.def(
      name,
      [](Address values, std::int64_t count, std::uint64_t first) {
        return bit_sum(at<const Word>(values), count, first);
      },
      "values"_a, "count"_a, "first"_a, Unlocked());
}

template <class Value, class Sum>
void define_merge(nb::module_& module, const char* name) {
  module.def(
      name,
      [](Address out1, Address lse1, Address out2, Address lse2, std::int64_t rows,
         std::int64_t dim) {
        merge_attention(at<Value>(out1), at<Sum>(lse1), at<const Value>(out2), at<const Sum>(lse2),
                        rows, dim);
      },
      "out1"_a, "lse1"_a, "out2"_a, "lse2"_a, "rows"_a, "dim"_a, Unlocked());
}

}  // namespace
}  // namespace holdfast

NB_MODULE(_native, module) {
  using namespace holdfast;
  module.doc() = "Native kernels of holdfast.";
  // A command ends without a last collection, so objects are left; a person should not read of it.
  nb::set_leak_warnings(false);
  const char* wanted = std::getenv("HOLDFAST_NATIVE_ISA");
  choose_instruction_set(wanted ? wanted : "auto");
  module.def("isa", &instruction_set_name);

  define_accumulate<float>(module, "accumulate_f32", "accumulate_rows_f32");
  define_accumulate<bfloat16>(module, "accumulate_bf16", "accumulate_rows_bf16");
  define_accumulate<double>(module, "accumulate_f64", "accumulate_rows_f64");
  module.def(
      "add_i64",
      [](Address accumulator, Address other, std::int64_t count) {
        return add_integers(at<std::int64_t>(accumulator), at<const std::int64_t>(other), count);
      },
      "accumulator"_a, "other"_a, "count"_a, Unlocked());
  define_conversion<float>(module, "reduce_convert_f32", "sum_squares_f32");
  define_conversion<double>(module, "reduce_convert_f64", "sum_squares_f64");

  define_bit_sum<std::uint16_t>(module, "bit_sum_16");
  define_bit_sum<std::uint32_t>(module, "bit_sum_32");
  define_bit_sum<std::uint64_t>(module, "bit_sum_64");

  module.def("packed_bound", &packed_bound, "count"_a, Unlocked());
  module.def(
      "pack_i64",
      [](Address sums, std::int64_t count, Address output) {
        return pack_integers(at<const std::int64_t>(sums), count, at<std::uint8_t>(output));
      },
      "sums"_a, "count"_a, "output"_a, Unlocked());
  module.def(
      "unpack_add_i64",
      [](Address packed, std::int64_t packed_bytes, Address base, Address output,
         std::int64_t count) {
        return unpack_add(at<const std::uint8_t>(packed), packed_bytes,
                          at<const std::int64_t>(base), at<std::int64_t>(output), count);
      },
      "packed"_a, "packed_bytes"_a, "base"_a, "output"_a, "count"_a, Unlocked());

  module.def(
      "crc32c",
      [](Address data, std::size_t nbytes, std::uint32_t initial) {
        return crc32c(at<const unsigned char>(data), nbytes, initial);
      },
      "data"_a, "nbytes"_a, "initial"_a = 0, Unlocked());
  module.def(
      "copy_crc32c",
      [](Address destination, Address source, std::size_t nbytes, std::uint32_t initial) {
        return copy_crc32c(at<unsigned char>(destination), at<const unsigned char>(source), nbytes,
                           initial);
      },
      "destination"_a, "source"_a, "nbytes"_a, "initial"_a = 0, Unlocked());
  module.def("crc32c_combine", &crc32c_combine, "a"_a, "b"_a, "length_b"_a, Unlocked());

  module.def(
      "philox_uint32",
      [](Address output, std::int64_t count, std::uint64_t key, std::uint64_t stream,
         std::int64_t offset) {
        philox_words(at<std::uint32_t>(output), count, {key, stream, offset});
      },
      "output"_a, "count"_a, "key"_a, "stream"_a, "offset"_a, Unlocked());
  define_distributions<float>(module, "philox_uniform_f32", "philox_normal_f32",
                              "philox_normal_box_f32");
  define_distributions<double>(module, "philox_uniform_f64", "philox_normal_f64",
                               "philox_normal_box_f64");
  define_dropout<float>(module, "dropout_scale_f32");
  define_dropout<bfloat16>(module, "dropout_scale_bf16");
  define_dropout<double>(module, "dropout_scale_f64");

  module.def(
      "swiglu_f32",
      [](Address gate_up, Address out, std::int64_t rows, std::int64_t width) {
        swiglu(at<const float>(gate_up), at<float>(out), rows, width);
      },
      "gate_up"_a, "out"_a, "rows"_a, "width"_a, Unlocked());
  module.def(
      "swiglu_backward_f32",
      [](Address gradient, Address gate_up, Address out, Address by_gate_up, std::int64_t rows,
         std::int64_t width) {
        swiglu_backward(at<const float>(gradient), at<const float>(gate_up), at<float>(out),
                        at<float>(by_gate_up), rows, width);
      },
      "gradient"_a, "gate_up"_a, "out"_a, "by_gate_up"_a, "rows"_a, "width"_a, Unlocked());
  define_merge<float, float>(module, "merge_attention_f32");
  define_merge<bfloat16, float>(module, "merge_attention_bf16");
  define_merge<double, double>(module, "merge_attention_f64");

  define_file_engine(module);

  module.def("permute_index", &permute_index, "index"_a, "size"_a, "key"_a, Unlocked());
  module.def(
      "permute_indices",
      [](Address output, std::int64_t start, std::int64_t count, std::int64_t size,
         std::uint64_t key) {
        permute_indices(at<std::int64_t>(output), start, count, size, key);
      },
      "output"_a, "start"_a, "count"_a, "size"_a, "key"_a, Unlocked());
  module.def(
      "best_fit",
      [](Address bins, Address sizes, std::int64_t count, std::int64_t room, std::int64_t open) {
        return best_fit(at<std::int64_t>(bins), at<const std::int64_t>(sizes), count, room, open);
      },
      "bins"_a, "sizes"_a, "count"_a, "room"_a, "open"_a, Unlocked());
}
