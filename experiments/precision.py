"""Does bfloat16 cost log p(x)?

Question: trained for the same epochs with the hidden layers in bfloat16, is the test log p(x) that
          of float32?
Command:  python experiments/precision.py --data-root DATA
Hardware: two cores with bfloat16 instructions, no GPU; about eight minutes.
Expected: within 0.1 nats; the estimates themselves are always in float32.

MNIST, binarized dynamically, 50 epochs of which 12 warm the KL up; the first 2,000 test data.
Writes experiments/results/precision.json and .png.
"""

from _swap import main, table

ROWS = {
    "MNIST, 32-true": "--data mnist --epochs 50 --kl-warmup 12 --precision 32-true",
    "MNIST, bf16-mixed": "--data mnist --epochs 50 --kl-warmup 12 --precision bf16-mixed",
}
COMMON = "--compile true"

__all__ = ["COMMON", "ROWS", "table"]

if __name__ == "__main__":
    main(__file__, ROWS, COMMON)
