"""Where compiled programs are kept, who decides, and that a second process finds them."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# A process of its own: jax opens its cache once.
CODE = """
import json, sys, warnings
import jax
from jax._src import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
from qjax import compile_cache
exec(sys.argv[1])
found = compile_cache.status()
print(json.dumps({
    "path": None if found.path is None else str(found.path),
    "reason": found.reason,
    "config": jax.config.jax_compilation_cache_dir,
    "seconds": jax.config.jax_persistent_cache_min_compile_time_secs,
    "hits": events.count("/jax/compilation_cache/cache_hits"),
}))
"""
ENABLE = "compile_cache.enable()"
GENERATE = """
import jax.numpy
jax.numpy.zeros(3).block_until_ready()  # jax has compiled something before
from tiny import tiny_lm
compile_cache.MIN_SECONDS = 0.0
print(tiny_lm(num_hidden_layers=1).generate([[5, 6, 7]], 3).token_ids.tolist())
"""


def run(code: str, **environment: str) -> list:
    """Lines of JSON that the process prints."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("QJAX_COMPILATION_CACHE", "XDG_CACHE_HOME", "XLA_FLAGS")
        and not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE_COMPILATION"))
    }
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, code],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.heavy
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    (tokens, first), (again, second) = (run(GENERATE, XDG_CACHE_HOME=str(tmp_path)) for _ in "ab")
    folder = tmp_path / "qjax" / "jax"
    assert first["path"] == first["config"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert first["hits"] == 0
    assert second["hits"] >= 2  # prefill and decode
    assert any(file.name.startswith("jit_decode-") for file in folder.iterdir())
    assert again == tokens


@pytest.mark.parametrize("off", ["0", "off", " No "])
def test_it_can_be_switched_off(off, tmp_path):
    (found,) = run(ENABLE, QJAX_COMPILATION_CACHE=off, HOME=str(tmp_path))
    assert found["path"] is found["config"] is None
    assert "QJAX_COMPILATION_CACHE is" in found["reason"]
    assert found["seconds"] == 1.0
    assert not list(tmp_path.iterdir())


def test_it_is_in_the_home_folder_by_default(tmp_path):
    (found,) = run(ENABLE, HOME=str(tmp_path), XDG_CACHE_HOME="relative")
    assert found["path"] == found["config"] == str(tmp_path / ".cache" / "qjax" / "jax")
    assert found["seconds"] == 0.3


def test_a_folder_can_be_named(tmp_path):
    (found,) = run(ENABLE, QJAX_COMPILATION_CACHE=str(tmp_path / "here"))
    assert found["config"] == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("code", "environment", "config"),
    [
        ("jax.config.update('jax_compilation_cache_dir', '/theirs')", {}, "/theirs"),
        ("", {"JAX_COMPILATION_CACHE_DIR": "/theirs"}, "/theirs"),
        ("", {"JAX_COMPILATION_CACHE_DIR": "/theirs", "QJAX_COMPILATION_CACHE": "0"}, "/theirs"),
        ("", {"JAX_ENABLE_COMPILATION_CACHE": "0"}, None),
    ],
)
def test_jax_settings_of_the_user_stay(code, environment, config, tmp_path):
    (found,) = run(f"{code}\n{ENABLE}", HOME=str(tmp_path), **environment)
    assert found["path"] == found["config"] == config
    assert found["seconds"] == 1.0
    assert "jax_" in found["reason"]
    assert not list(tmp_path.iterdir())


def test_a_threshold_of_the_user_stays(tmp_path):
    seconds = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "5"}
    (found,) = run(ENABLE, HOME=str(tmp_path), **seconds)
    assert found["seconds"] == 5.0
    assert found["config"] is not None


def test_without_a_place_to_write_it_is_off(tmp_path):
    (tmp_path / "file").write_text("")
    code = "print(json.dumps(compile_cache.enable().reason))"
    reason, found = run(code, QJAX_COMPILATION_CACHE=str(tmp_path / "file" / "folder"))
    assert "cannot be made" in reason
    assert found["config"] is None


def test_info_says_where_it_is(tmp_path):
    (tmp_path / "x-cache").write_bytes(b"12")
    code = "from qjax.cli import info\nprint(json.dumps(info._compilation_cache()))"
    told, _ = run(code, QJAX_COMPILATION_CACHE=str(tmp_path))
    assert told == {
        "path": str(tmp_path),
        "reason": "QJAX_COMPILATION_CACHE says so",
        "programs": 1,
        "bytes": 2,
    }
