"""Text that every machine has: the source of the running interpreter's standard library.

Evaluation reads a fixed list of modules that the reference model never saw; calibration reads
others. The text depends on the Python version, so a figure is only comparable beside the same
`sha256`: each comes with both.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import DataError

# Never trained on, nor vendored copies of them (recognised by content). Modules of many kinds and
# authors, present in every Python from 3.12 on.
HELD_OUT = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "colorsys.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "difflib.py",
    "fractions.py",
    "ftplib.py",
    "getopt.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "http/cookies.py",
    "mailbox.py",
    "netrc.py",
    "optparse.py",
    "pprint.py",
    "queue.py",
    "reprlib.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "tomllib/_parser.py",
    "wave.py",
    "xml/etree/ElementPath.py",
    "zipapp.py",
)

CALIBRATION = (
    "ast.py",
    "asyncio/base_events.py",
    "asyncio/tasks.py",
    "codecs.py",
    "collections/__init__.py",
    "concurrent/futures/thread.py",
    "contextlib.py",
    "datetime.py",
    "email/message.py",
    "enum.py",
    "functools.py",
    "gettext.py",
    "gzip.py",
    "http/client.py",
    "importlib/_bootstrap.py",
    "inspect.py",
    "ipaddress.py",
    "json/decoder.py",
    "logging/__init__.py",
    "multiprocessing/pool.py",
    "pickle.py",
    "random.py",
    "shutil.py",
    "socket.py",
    "subprocess.py",
    "tarfile.py",
    "tempfile.py",
    "threading.py",
    "traceback.py",
    "unittest/mock.py",
    "uuid.py",
    "zipfile/__init__.py",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Documents and where they are from.

    Attributes:
      documents: source text of each module, in the order of the list.
      modules: their names, relative to the standard library.
      python: version of the interpreter whose library this is.
      sha256: hex digest over the documents.
    """

    documents: tuple[str, ...]
    modules: tuple[str, ...]
    python: str
    sha256: str

    def provenance(self) -> dict[str, str | int]:
        """What a published figure carries."""
        size = sum(len(document.encode()) for document in self.documents)
        return {"python": self.python, "sha256": self.sha256, "bytes": size}


def held_out() -> Text:
    """The evaluation text. Raises DataError, naming the modules, if any is missing."""
    return read_modules(HELD_OUT)


def calibration() -> Text:
    """The calibration text, disjoint from `held_out`. Raises DataError likewise."""
    return read_modules(CALIBRATION)


def read_modules(modules: tuple[str, ...], root: Path | None = None) -> Text:
    """Read modules of the running interpreter's standard library.

    Args:
      modules: paths relative to the library.
      root: another library; None: the running interpreter's.

    Raises:
      DataError: naming every module that is not there.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    missing = [module for module in modules if not (root / module).is_file()]
    if missing:
        raise DataError(
            f"{root} lacks the source of {', '.join(missing)}; evaluation and calibration read the "
            "standard library's own text: use a complete CPython installation"
        )
    documents = tuple((root / module).read_text(encoding="utf-8") for module in modules)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document.encode())
    return Text(
        documents=documents,
        modules=modules,
        python=platform.python_version(),
        sha256=digest.hexdigest(),
    )


def token_windows(text: Text, tokenizer: Any, *, count: int, seq_len: int) -> np.ndarray:
    """Cut documents into windows of tokens and take some, evenly spread over all of them.

    Windows do not overlap and do not cross documents; what is left at a document's end is unused.
    No special tokens are added.

    Args:
      tokenizer: a transformers tokenizer.
      count: number of windows.
      seq_len: tokens in each, 2 or more.

    Returns:
      int32 [count, seq_len].

    Raises:
      DataError: the text holds fewer windows than `count`.
    """
    if count < 1 or seq_len < 2:
        raise DataError(f"{count} windows of {seq_len} tokens: need 1 or more of 2 or more tokens")
    windows = windows_of(text.documents, tokenizer, seq_len)
    if len(windows) < count:
        raise DataError(
            f"the text holds {len(windows)} windows of {seq_len} tokens, not {count}; ask for fewer"
        )
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
    return np.asarray([windows[i] for i in chosen], np.int32)


def windows_of(documents: Iterable[str], tokenizer: Any, seq_len: int) -> list[list[int]]:
    """All windows of `seq_len` tokens, document by document; see `token_windows`."""
    windows = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [ids[at : at + seq_len] for at in range(0, len(ids) - seq_len + 1, seq_len)]
    return windows
