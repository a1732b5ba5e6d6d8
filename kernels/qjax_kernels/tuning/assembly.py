"""What the assembler says of each Mosaic kernel that this process compiles."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Mosaic kernel as ptxas left it.

    Attributes:
      name: of the kernel's function.
      registers: of a thread.
      spills: bytes of spill stores and loads and of the stack frame.
      shared: bytes of dynamic shared memory, as launched.
      ptx: its source.
    """

    name: str
    registers: int
    spills: int
    shared: int
    ptx: str


@contextmanager
def dumped() -> Iterator[Path]:
    """A folder for what is compiled meanwhile; for one thread of a process at a time."""
    names = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_TO")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {names[0]: "1", names[1]: "1", names[2]: directory}
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def kernels_in(directory: Path) -> Iterator[Kernel]:
    """The kernels that were compiled, in order."""
    for path in sorted(directory.glob("*.ptxas"), key=lambda p: p.stat().st_mtime_ns):
        report, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
        sizes = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        yield Kernel(
            name=path.stem,
            registers=_number(r"Used (\d+) registers", report),
            spills=sum(map(int, sizes)),
            shared=_number(r"smem_scratch_bytes=(\d+)", resources),
            ptx=path.with_suffix(".ptx").read_text(),
        )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's report has no {pattern!r}: {text[:200]}")
    return int(found[1])
