"""The tolerances of the tests, by name. A looser one needs a comment with its cause where it is used."""

EXACT = 0.0  # the same numbers, bit for bit
F64 = 1e-10  # float64 against another implementation
F32 = 1e-5  # float32 against another order of the same operations
BF16 = 2e-2  # bfloat16 against float32

ESTIMATE = 0.15
"""Of the measured peak. Besides there are batches on their way, kernels' scratch space and JIT code."""
