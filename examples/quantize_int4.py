"""4-bit weights: GPTQ, AWQ, and both kinds of error side by side.

python examples/quantize_int4.py [checkpoint] [output]
"""

import sys

import qjax
from qjax.evaluate import evaluate_perplexity
from qjax.text import held_out, token_windows


def main(path: str = "checkpoints/reference", out: str = "reference-int4") -> None:
    lm = qjax.load(path)
    calib = qjax.CalibConfig(num_samples=16, max_seq_length=256, dataset="stdlib")
    windows = token_windows(held_out(), lm.tokenizer, count=8, seq_len=256)
    base = evaluate_perplexity(lm, windows)
    # The grid reaches where weights matter to the inputs that came (imatrix), then GPTQ rounds.
    for preset in ("int4_wo", "int4_awq", "int4_gptq_imatrix"):
        quantized = qjax.quantize_model(lm, preset, calib=calib)
        change, _ = evaluate_perplexity(quantized, windows).change_from(base)
        print(f"{preset}: perplexity {change:+.2%}")
    quantized.save(out, overwrite=True)
    print(qjax.load(out).generate("def fibonacci(n):\n", max_new_tokens=16).text[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
