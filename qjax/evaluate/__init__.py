"""What quantization costs in quality: perplexity, per-layer error, comparisons, reports."""

from qjax.evaluate.compare import Comparison as Comparison
from qjax.evaluate.compare import compare as compare
from qjax.evaluate.layers import layer_errors as layer_errors
from qjax.evaluate.perplexity import Perplexity as Perplexity
from qjax.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
from qjax.evaluate.report import write_report as write_report
