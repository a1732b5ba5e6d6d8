"""A model larger than memory: block by block from disk to disk, and a cache of 8 bits.

    python examples/quantize_large.py [checkpoint] [output]

Stop it and start it again: it goes on behind the last block that it finished.
"""

import sys

import qjax


def main(path: str = "checkpoints/reference", out: str = "reference-w4a8") -> None:
    report = qjax.quantize_checkpoint(
        path,
        out,
        qjax.preset("w4a8_awq", kv="fp8"),
        calib=qjax.CalibConfig(num_samples=16, max_seq_length=256, dataset="stdlib"),
        spill=True,  # activations wait in host memory
        overwrite=True,
        progress=lambda done, total: print(f"block {done} of {total}"),
    )
    print(report)
    prepared = qjax.load_prepared(out)  # laid out for the kernels, its cache in fp8
    print(prepared.generate("import os\n", max_new_tokens=16).text[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
