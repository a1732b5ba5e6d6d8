"""Every op that is tuned."""

from qjax_kernels.tuning import attention, linear
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.problem import Problem

PROBLEMS: dict[str, type[Problem]] = {
    "w4a16": linear.W4A16,
    "w8a16": linear.W8A16,
    "fp8": linear.Fp8,
    "int8": linear.Int8,
    "w4a8": linear.W4A8,
    "decode_attention": attention.Attention,
    "bf16": linear.Plain,
}


def problem(job: Job, m: int, cores: int) -> Problem:
    """One of a job's sizes."""
    return PROBLEMS[job.op](job, m, cores)
