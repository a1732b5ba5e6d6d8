"""Checkpoints: our own (Orbax + qjax.json) and Hugging Face directories."""

from qjax.checkpoint.orbax import restore as restore
from qjax.checkpoint.orbax import save as save
