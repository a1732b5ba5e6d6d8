"""The reference model's corpus: Python source that any installation has, less the held-out text.

Every *.py of the running interpreter's standard library and installed packages, each text once.
Files that share passages with `qjax.text.HELD_OUT` (the modules themselves, older copies, vendored
copies) are left out, so that perplexity on those modules is measured on unseen text.
"""

import collections
import dataclasses
import importlib.metadata
import json
import math
import platform
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.errors import DataError
from qjax.text import Text

END_OF_TEXT = "<|endoftext|>"  # id 0; separates documents, and starts each
FILE_BYTES = range(200, 400_001)  # smaller files say nothing, larger ones are generated tables
OURS = {"qjax", "qjax_kernels"}
WINDOW_LINES = 5

# GPT-2's split with three changes: '_' is a letter, digits stand alone, and line ends stand apart
# from indentation, so that a prompt that ends with a line end is split as the corpus was.
SPLIT = r" ?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|\n+|[^\S\n]+(?!\S)|\s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on, and where they are from.

    Attributes:
      documents: source texts, no two equal, none sharing passages with the held-out text.
      report: what a published model says about them: files, bytes, packages, exclusions (JSON).
    """

    documents: list[str]
    report: dict[str, Any]


def source_roots() -> list[Path]:
    """The standard library and every site-packages folder of the running interpreter."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    folders += [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def passages(text: str) -> set[str]:
    """Each run of 5 consecutive lines, stripped, without lines under 4 characters.

    Runs of nothing but comments are left out: license headers are shared by unrelated files.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= 4]
    runs = (lines[i : i + WINDOW_LINES] for i in range(len(lines) - WINDOW_LINES + 1))
    return {"\n".join(run) for run in runs if not all(line.startswith("#") for line in run)}


def shares_passages(text: str, held_out: set[str]) -> bool:
    """Whether more than 10 passages of `text`, or more than 2 % of them, are held out."""
    own = passages(text)
    shared = len(own & held_out)
    return shared > 10 or shared > 0.02 * len(own)


def build_corpus(roots: Sequence[Path], held_out: Sequence[str]) -> Corpus:
    """Read every source file under `roots` that may be trained on.

    Args:
      roots: folders, searched recursively for *.py; qjax's own packages are skipped.
      held_out: texts that no document may share passages with.

    Raises:
      DataError: if nothing is left.
    """
    forbidden = set[str]().union(*map(passages, held_out))
    seen: set[str] = set()
    documents: list[str] = []
    excluded: list[str] = []
    folder_bytes = collections.Counter[str]()
    for name, text in _source_files(roots):
        if text in seen:
            continue
        seen.add(text)
        if shares_passages(text, forbidden):
            excluded.append(name)
            continue
        documents.append(text)
        folder_bytes[name.partition("/")[0]] += len(text.encode())
    if not documents:
        raise DataError(f"no Python source to train on under {', '.join(map(str, roots))}")
    installed = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    report = {
        "python": platform.python_version(),
        "files": len(documents),
        "bytes": folder_bytes.total(),
        "excluded_files": len(excluded),
        "excluded_sample": excluded[:100],
        "largest_folders_bytes": dict(folder_bytes.most_common(50)),
        "installed": sorted(installed, key=str.lower),
    }
    return Corpus(documents=documents, report=report)


def _source_files(roots: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(name relative to its root, text), in a fixed order; unsuitable files are skipped."""
    names, paths = [], []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if OURS.isdisjoint(relative.parts):
                names.append(relative.as_posix())
                paths.append(path)
    with ThreadPoolExecutor(32) as pool:  # reading waits for the disk, not for the processor
        for name, text in zip(names, pool.map(_read, paths), strict=True):
            if text is not None:
                yield name, text


def _read(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size not in FILE_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def train_tokenizer(
    documents: Sequence[str], vocab_size: int, *, sample_bytes: int = 60_000_000
) -> Tokenizer:
    """Byte-level BPE; decode(encode(text)) == text for any text.

    Args:
      documents: what to learn from; a random sample of `sample_bytes` is used.
      vocab_size: including END_OF_TEXT, which has id 0, and the 256 bytes.
    """
    sample, size = [], 0
    for document in random.Random(0).sample(documents, len(documents)):
        sample.append(document)
        size += len(document.encode())
        if size >= sample_bytes:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """uint16 [1 + tokens] of each document; the first id is END_OF_TEXT, the rest is its text."""
    tokenizer.encode_special_tokens = True  # source that spells '<|endoftext|>' is text like any
    start = [tokenizer.token_to_id(END_OF_TEXT)]
    arrays = []
    for first in range(0, len(documents), 1000):  # encodings take far more memory than their ids
        encodings = tokenizer.encode_batch_fast(documents[first : first + 1000])
        arrays += [np.array(start + encoding.ids, np.uint16) for encoding in encodings]
    return arrays


def prepare_corpus(
    folder: Path, unseen: Text, vocab_size: int, init: Path | None = None
) -> tuple[Tokenizer, np.ndarray, dict[str, Any]]:
    """The corpus of this installation; built in the first call and kept in `folder`.

    Args:
      unseen: the held-out text.
      init: an exported model, whose tokenizer is used; None: one is trained.

    Returns:
      the tokenizer; uint16 [tokens], the documents one after the other; Corpus.report with the
      number of tokens.
    """
    files = folder / "tokenizer.json", folder / "tokens.npy", folder / "corpus.json"
    if not all(file.exists() for file in files):
        corpus = build_corpus(source_roots(), unseen.documents)
        print(f"{corpus.report['files']} files, {corpus.report['bytes'] / 1e6:.0f} MB")
        if init:
            tokenizer = Tokenizer.from_file(str(init / "tokenizer.json"))
        else:
            tokenizer = train_tokenizer(corpus.documents, vocab_size)
        tokens = np.concatenate(tokenize(tokenizer, corpus.documents))
        tokenizer.save(str(files[0]))
        np.save(files[1], tokens)
        write_json(files[2], corpus.report | {"tokens": tokens.size})
    return Tokenizer.from_file(str(files[0])), np.load(files[1]), json.loads(files[2].read_text())


class HeldOut:
    """Held-out documents in windows of `length` tokens that do not overlap.

    A document's first window starts with END_OF_TEXT, and each of its tokens is predicted once.

    Args:
      unseen: the text.
      documents: uint16 [1 + tokens] of each document, from `tokenize`.

    Attributes:
      batches: int32 [batches, batch, 3, length]: input ids, target ids, and 1 where the target is
        text, 0 where it is padding.
      tokens, bytes: of the text.
      provenance: which text it is.
    """

    def __init__(
        self, unseen: Text, documents: Sequence[np.ndarray], length: int, batch: int = 64
    ) -> None:
        rows = []
        for ids in documents:
            row = np.stack([ids[:-1], ids[1:], np.ones_like(ids[1:])]).astype(np.int32)
            row = np.pad(row, ((0, 0), (0, -row.shape[1] % length)))
            rows.append(row.reshape(3, -1, length).swapaxes(0, 1))
        windows = np.concatenate(rows)
        windows = np.pad(windows, ((0, -len(windows) % batch), (0, 0), (0, 0)))
        self.batches = windows.reshape(-1, batch, 3, length)
        self.tokens = sum(len(ids) - 1 for ids in documents)
        self.bytes = sum(len(document.encode()) for document in unseen.documents)
        self.provenance = unseen.provenance() | {"modules": list(unseen.modules)}

    def scores(self, nats: float) -> tuple[float, float]:
        """Nats of the whole text -> (nats a token, bits a byte)."""
        return nats / self.tokens, nats / math.log(2) / self.bytes


def write_json(path: Path, data: Any) -> None:
    """Write `data` indented, with a final line end."""
    path.write_text(json.dumps(data, indent=2) + "\n")
