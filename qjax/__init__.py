"""qjax: quantize language models and run them fast on NVIDIA GPUs, in JAX."""

from qjax._version import __version__ as __version__

from qjax import nn as nn  # isort: skip
from qjax.calibrate import calibrate as calibrate
from qjax.checkpoint import restore as restore
from qjax.checkpoint import save as save
from qjax.config import CalibConfig as CalibConfig
from qjax.config import QuantConfig as QuantConfig
from qjax.config import Rule as Rule
from qjax.errors import CheckpointError as CheckpointError
from qjax.errors import ConfigError as ConfigError
from qjax.errors import DataError as DataError
from qjax.errors import QJaxError as QJaxError
from qjax.lm import LanguageModel as LanguageModel
from qjax.lm import load as load
from qjax.plan import Plan as Plan
from qjax.plan import plan as plan
from qjax.prepare import load_prepared as load_prepared
from qjax.prepare import prepare as prepare
from qjax.presets import PRESETS as PRESETS
from qjax.presets import preset as preset
from qjax.qarray import InputSpec as InputSpec
from qjax.qarray import QArray as QArray
from qjax.qarray import dequantize as dequantize
from qjax.qarray import quantize_array as quantize_array
from qjax.quantize import dequantize_tree as dequantize_tree
from qjax.quantize import quantize as quantize
from qjax.quantize_checkpoint import quantize_checkpoint as quantize_checkpoint
from qjax.quantize_model import quantize_model as quantize_model
from qjax.result import Generation as Generation
from qjax.speculate import PromptLookup as PromptLookup
