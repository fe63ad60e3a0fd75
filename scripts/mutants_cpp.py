"""The bugs that scripts/mutants.py plants into the C++ kernels: each into one file, for one instruction set."""

ATTENTION = "tests/test_cpu_attention.py::"
GRADIENTS = "tests/test_cpu_attention_backward.py::"
NORMS = "tests/test_cpu_backward.py::"
LOSS = "tests/test_linear_cross_entropy.py::"
WINDOW = ATTENTION + "test_window[base-17]"
RING = ATTENTION + "test_chunks_equal_one_shot[base-16]"
ATTENTION_DOUBLE = ATTENTION + "test_float64_equals_eager[base-gaussian]"
GRADIENTS_DOUBLE = GRADIENTS + "test_float64_equals_eager[base-gaussian]"

TILE, DECODE, BACKWARD = "cpu/attention.cpp", "cpu/attention_decode.cpp", "cpu/attention_backward.cpp"
ROWS = "cpu/attention_backward_tile.h"
NORM, ENTROPY = "cpu/rms_norm_backward.cpp", "cpu/linear_cross_entropy.cpp"

# (bug, file, what stands in it once, what it becomes, the test that must fail)
BUGS = (
    ("window one key too wide", TILE, "first_visible(t.a, t.s, query + r) - base,",
     "first_visible(t.a, t.s, query + r) - base - 1,", WINDOW),
    ("window one key too narrow", TILE, "first_visible(t.a, t.s, query + r) - base,",
     "first_visible(t.a, t.s, query + r) - base + 1,", WINDOW),
    ("diagonal off by one", TILE, "end_visible(t.a, t.s, query + r) - base);",
     "end_visible(t.a, t.s, query + r) - base - 1);", WINDOW),
    ("missing tail mask", TILE, "end_visible(t.a, t.s, query + r) - base);", "last - first);",
     ATTENTION_DOUBLE),
    ("missing scale", "cpu/attention_tile.h", "(Scalar)(scaling(a.scale).magnitude * log2_e)", "(Scalar)log2_e",
     ATTENTION + "test_scale[base-3.0]"),
    ("KV head h % Hkv", "cpu/attention_tile.h", "item.head / (a.heads / a.kv_heads) * a.panels",
     "item.head % a.kv_heads * a.panels", ATTENTION + "test_long_sums"),
    ("lse sign", "cpu/attention_math.h", "state.top * scaling(a.scale).magnitude + __builtin_log(",
     "-state.top * scaling(a.scale).magnitude - __builtin_log(", ATTENTION_DOUBLE),
    ("last block of keys left out", TILE, "key < last; key += block_keys<M>)",
     "key + block_keys<M> < last; key += block_keys<M>)", ATTENTION_DOUBLE),
    ("window one key too narrow in the ring", DECODE, "first - s.key, last - s.key);",
     "first - s.key + 1, last - s.key);", RING),
    ("one piece of a decoded sequence left out", "cpu/attention_decode_join.h",
     "least(joined_at_once, row.count - first);", "least(joined_at_once, row.count - first - 1);",
     ATTENTION + "test_decode_over_the_ring[dtype0]"),
    ("codes' values without their scale", DECODE, "t.codes ? t.v_scale : nullptr", "nullptr",
     ATTENTION + "test_decode_over_codes[dtype0]"),
    ("missing scale of dQ", ROWS, "t.columns + d) * (Scalar)t.a.scale)", "t.columns + d))", GRADIENTS_DOUBLE),
    ("missing scale of dK", BACKWARD, "all.add_up(0, key, d) * scale", "all.add_up(0, key, d)", GRADIENTS_DOUBLE),
    ("sign of the gradient of lse", ROWS, "delta / sum - dlse", "delta / sum + dlse", GRADIENTS_DOUBLE),
    ("gradient of the scores without the row's sum", ROWS, "- rows[r].less - (M::step == 1 ? rows[r].rest : 0))",
     ")", GRADIENTS_DOUBLE),
    ("one part of dK and dV left out", BACKWARD, "p < count; p++", "p < count - 1; p++",
     GRADIENTS_DOUBLE),
    ("dK and dV without the last queries of the window", BACKWARD, "key + strip_rows - 1 - offset + t.a.window);",
     "key - offset + t.a.window);", GRADIENTS_DOUBLE),
    ("missing tail", "cpu/rms_norm.cpp", "row.at(i, n - i);\n    if constexpr (kAdd)",
     "row.at(i, 0);\n    if constexpr (kAdd)", "tests/test_cpu.py::test_parity_of_tails[base-dtype0]"),
    ("missing tail of the next row's sum", "cpu/rms_norm.cpp", "load_n(next + i, left);", "load_n(next + i, 0);",
     "tests/test_cpu.py::test_a_row_has_the_same_bits_in_a_batch[base-dtype0]"),
    ("sum of the row itself in place of the next one's", "cpu/rms_norm.cpp", "load_two<order>(next + i);",
     "load_two<order>(x + i);", "tests/test_cpu.py::test_a_row_has_the_same_bits_in_a_batch[base-dtype0]"),
    ("dropped residual gradient", NORM, "out += load(row[r].dtotal + i);", "out += 0 * load(row[r].dtotal + i);",
     NORMS + "test_float64_equals_eager[base-add_rms_norm]"),
    ("dW without one row block", NORM, "done % block_rows == 0 || done == a.of", "done % block_rows == 0",
     NORMS + "test_float64_equals_eager[base-rms_norm]"),
    ("gradient of the norm without its mean", NORM, "(d * by - normed * mean[r]) * rstd[r]", "d * by * rstd[r]",
     NORMS + "test_float64_equals_eager[base-rms_norm]"),
    ("swapped rotary halves", "cpu/rope.cpp", "out + j, a);\n    put<T, kStream>(out + half + j, b);",
     "out + j, b);\n    put<T, kStream>(out + half + j, a);",
     "tests/test_cpu.py::test_float64_equals_eager[base-rope]"),
    ("rotation not inverted", "cpu/rope.cpp", "if constexpr (kInverse) s = -s;", "if constexpr (kInverse) s = +s;",
     NORMS + "test_float64_equals_eager[base-rope]"),
    ("sign in the gradient of silu", "cpu/swiglu_backward.cpp", "(gate * (1 - s) + 1)", "(gate * (s - 1) + 1)",
     NORMS + "test_float64_equals_eager[base-swiglu]"),
    ("tail of the product left out", "cpu/linear.cpp", "if (at < k) step(", "if (at + 1 < k) step(",
     "tests/test_linear.py::test_parity[base-dtype0]"),
    ("gradient of the loss without the label", ENTROPY, "if (here) L::write_n(", "if (false) L::write_n(",
     LOSS + "test_is_torchs_cross_entropy[cpu-5-mean]"),
    ("last word left out", ENTROPY, "least(sum_words, b.words - i), state)",
     "least(sum_words, b.words - i - 1), state)", LOSS + "test_is_torchs_cross_entropy[cpu-5-mean]"),
)  # fmt: skip
