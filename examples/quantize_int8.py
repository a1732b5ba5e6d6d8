"""8-bit weights and activations: one static scale, after SmoothQuant has evened out the inputs.

python examples/quantize_int8.py [checkpoint] [output]
"""

import sys

import qjax
from qjax.evaluate import evaluate_perplexity
from qjax.text import held_out, token_windows


def main(path: str = "checkpoints/reference", out: str = "reference-int8") -> None:
    lm = qjax.load(path)
    # What to calibrate on: 'cnn_dailymail', 'c4', a text file, a list of strings, token batches ...
    calib = qjax.CalibConfig(num_samples=32, max_seq_length=512, dataset="stdlib")
    smooth = qjax.quantize_model(lm, "int8_sq", calib=calib)
    print(smooth.quantization_report)
    for row in smooth.quantization_report.weights[:7]:
        print(f"{row.name}: alpha {row.alpha}, its input is divided by {row.scaled_by}")
    smooth.save(out, overwrite=True)
    windows = token_windows(held_out(), lm.tokenizer, count=8, seq_len=256)
    base = evaluate_perplexity(lm, windows)
    change, _ = evaluate_perplexity(qjax.load(out), windows).change_from(base)
    print(f"perplexity {base.perplexity:.3f}, change {change:+.2%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
