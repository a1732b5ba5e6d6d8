"""Calibration data: token batches, texts, a text file or a data set -> batches of token ids."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qjax.config import CalibConfig
from qjax.errors import DataError
from qjax.text import calibration, windows_of

STDLIB = "stdlib"
# What the reference model is calibrated on, and whoever asks for that text by name.
STDLIB_CALIBRATION = CalibConfig(num_samples=64, dataset=STDLIB)

# name -> (arguments of datasets.load_dataset, column of the text). What the toolkits calibrate on:
# ModelOpt and TensorRT-LLM on cnn_dailymail, GPTQ on c4, AutoAWQ on the Pile, llm-compressor on
# ultrachat.
DATASETS: dict[str, tuple[dict[str, str], str]] = {
    "cnn_dailymail": (
        {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "train"},
        "article",
    ),
    "c4": ({"path": "allenai/c4", "name": "en", "split": "train"}, "text"),
    "pile": ({"path": "mit-han-lab/pile-val-backup", "split": "validation"}, "text"),
    "wikitext": ({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
                 "text"),
    "ultrachat": ({"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}, "messages"),
}  # fmt: skip
COLUMNS = ("text", "article", "messages", "content", "prompt")


def check_ids(input_ids: Any, config: Any) -> np.ndarray:
    """input_ids as int32 [batch, seq], or DataError saying what is wrong with them.

    Args:
      config: of the model: its vocab_size and max_position_embeddings.
    """
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise DataError(f"input_ids must be [batch, seq]: {error}") from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise DataError(
            f"input_ids must be non-empty integers [batch, seq], not {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise DataError(
            f"token ids {ids.min()}..{ids.max()} are outside the vocabulary, "
            f"0..{config.vocab_size - 1}"
        )
    context = config.max_position_embeddings
    if ids.shape[1] > context:
        raise DataError(f"{ids.shape[1]} tokens do not fit the model's context of {context}")
    return ids.astype(np.int32)


def calibration_data(data: Any, tokenizer: Any, calib: CalibConfig | None) -> list[np.ndarray]:
    """Token batches of whatever `qjax.quantize_model` takes as its data.

    Args:
      data: batches of token ids [batch, tokens] (any iterable of arrays); a list of strings; the
        name of a data set, 'stdlib', the path of a text file or of a local data set; None: what
        `calib` names.
      tokenizer: a transformers tokenizer; needed for texts only.
      calib: how much text; None: CalibConfig(). Batches that are given are taken as they are.

    Returns:
      integers [batch, tokens], all of them from given batches, or num_samples sequences in all.

    Raises:
      DataError: there is no tokenizer, no such data set, not enough text.
    """
    if data is None and calib is None:
        return []
    if data is not None and not isinstance(data, str | Path):
        data = list(data)
        if not data:
            return []
        if not isinstance(data[0], str):
            return [np.asarray(batch) for batch in data]
    calib = calib or CalibConfig()
    if tokenizer is None:
        raise DataError("calibration on text needs a tokenizer, and this checkpoint has none; pass "
                        "batches of token ids")  # fmt: skip
    source = calib.dataset if data is None else data
    if isinstance(source, str) and source == STDLIB:
        windows = windows_of(calibration().documents, tokenizer, calib.max_seq_length)
        return _batches(_chosen(windows, calib), calib)
    texts = iter(source) if isinstance(source, list) else _texts(source, calib)
    return _batches(_joined(texts, tokenizer, calib), calib)


def _batches(windows: np.ndarray, calib: CalibConfig) -> list[np.ndarray]:
    size = calib.batch_size
    return [windows[at : at + size] for at in range(0, len(windows), size)]


def _chosen(windows: list[list[int]], calib: CalibConfig) -> np.ndarray:
    """num_samples of the windows, by the seed."""
    if len(windows) < calib.num_samples:
        raise DataError(
            f"the text holds {len(windows)} sequences of {calib.max_seq_length} tokens, not "
            f"{calib.num_samples}; lower num_samples or max_seq_length"
        )
    order = np.random.default_rng(calib.seed).permutation(len(windows))
    return np.asarray([windows[i] for i in order[: calib.num_samples]], np.int32)


def _joined(texts: Iterable[str], tokenizer: Any, calib: CalibConfig) -> np.ndarray:
    """Texts one after the other, cut into sequences; none is padded."""
    needed = calib.num_samples * calib.max_seq_length
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [] if end is None else [end]
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise DataError(
            f"the calibration text has {len(ids)} tokens; {calib.num_samples} sequences of "
            f"{calib.max_seq_length} need {needed}: lower num_samples or max_seq_length"
        )
    return np.asarray(ids[:needed], np.int32).reshape(calib.num_samples, -1)


def _texts(source: str | Path, calib: CalibConfig) -> Iterator[str]:
    """The texts of a file, or of a data set in the order of the seed."""
    path = Path(source)
    if path.is_file() and path.suffix not in (".json", ".jsonl", ".parquet", ".csv"):
        try:
            return iter([path.read_text(encoding="utf-8")])
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the calibration text {path} cannot be read: {error}") from error
    return _dataset(str(source), path, calib)


def _dataset(name: str, path: Path, calib: CalibConfig) -> Iterator[str]:
    known = DATASETS.get(name)
    if known is None and not path.exists():
        raise DataError(
            f"there is no calibration data {name!r}: choose one of {', '.join(sorted(DATASETS))}, "
            "'stdlib', or the path of a text file or of a data set"
        )
    try:
        import datasets  # half a second, and only needed here
    except ImportError as error:
        raise DataError(
            f"calibration data {name!r} needs the package 'datasets', which is not installed; "
            "install it, pass texts or token batches, or use dataset='stdlib'"
        ) from error
    try:
        rows = _rows(datasets, known, path)
        column = known[1] if known is not None else _column(name, rows.column_names)
        return (_text(row[column]) for row in rows.shuffle(seed=calib.seed))
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"calibration data {name!r} cannot be read ({type(error).__name__}: {reason}); without "
            "the network pass the path of a local copy or of a text file, texts or token batches, "
            "or dataset='stdlib', the source of this machine's Python"
        ) from error


def _rows(datasets: Any, known: tuple[dict[str, str], str] | None, path: Path) -> Any:
    if known is not None:
        return datasets.load_dataset(**known[0])
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), split="train")
    kind = {".jsonl": "json"}.get(path.suffix, path.suffix.removeprefix("."))
    return datasets.load_dataset(kind, data_files=str(path), split="train")


def _column(name: str, columns: list[str]) -> str:
    for column in COLUMNS:
        if column in columns:
            return column
    raise DataError(f"the data set {name} has the columns {columns}; one must be of {COLUMNS}")


def _text(value: Any) -> str:
    """A text, or the messages of a conversation as one."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message["content"]) for message in value)
