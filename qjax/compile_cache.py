"""Compiled programs kept on disk: jax's persistent compilation cache, on by default.

Where it is: $QJAX_COMPILATION_CACHE, if that is a directory; else $XDG_CACHE_HOME/qjax/jax, else
~/.cache/qjax/jax. QJAX_COMPILATION_CACHE=0 switches it off. It may be deleted at any time.
"""

import dataclasses
import os
from pathlib import Path

import jax

ENV = "QJAX_COMPILATION_CACHE"
OFF = ("0", "off", "no", "false")
ON = ("", "1", "on", "yes", "true")

# Programs that compile faster are not worth a file.
MIN_SECONDS = 0.3
_JAX_MIN_SECONDS = 1.0  # jax's own default: another number is somebody's choice


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether programs are kept.

    Attributes:
      path: the directory; None: they are not.
      reason: who decided so, in words.
    """

    path: Path | None
    reason: str


def enable() -> Status:
    """Turn the cache on, unless the user has decided about jax's settings already.

    Only the first program that is compiled with a directory set makes jax open it: set your own
    `jax_compilation_cache_dir`, or JAX_COMPILATION_CACHE_DIR, before. Everything that the process
    compiles afterwards is kept, not qjax's programs alone.
    """
    found = status()
    if found.path is None or jax.config.jax_compilation_cache_dir is not None:
        return found
    try:
        # Programs are run as they are read: nobody else may write there.
        found.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return Status(None, f"{found.path} cannot be made: {error.strerror}")
    if not os.access(found.path, os.W_OK | os.X_OK):
        return Status(None, f"{found.path} cannot be written")
    jax.config.update("jax_compilation_cache_dir", str(found.path))
    if jax.config.jax_persistent_cache_min_compile_time_secs == _JAX_MIN_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return found


def status() -> Status:
    """What `enable` would do, or has done."""
    if not jax.config.jax_enable_compilation_cache:
        return Status(None, "jax_enable_compilation_cache is off")
    theirs = jax.config.jax_compilation_cache_dir
    asked = os.environ.get(ENV, "").strip()
    if theirs is not None and (asked.lower() in OFF or Path(theirs) != _path(asked)):
        return Status(Path(theirs), "jax_compilation_cache_dir is set")
    if asked.lower() in OFF:
        return Status(None, f"{ENV} is {asked}")
    by_name = asked.lower() not in ON
    return Status(_path(asked), f"{ENV} says so" if by_name else f"the default; {ENV}=0: off")


def _path(asked: str) -> Path:
    if asked.lower() not in (*ON, *OFF):
        return Path(asked).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification has it
        base = Path("~/.cache").expanduser()
    return base / "qjax" / "jax"
