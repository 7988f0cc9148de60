"""Too little memory, of the host or of a device, in one line."""

import jax

LESS = "train.accumulate, model.remat or a smaller train.batch_size (or eval_batch_size) take less; --config.estimate=True says how much"


def in_a_line(error: Exception) -> str | None:
    """What to say of an error that is one of memory; None for any other.

    >>> in_a_line(MemoryError("Unable to allocate 2 PiB")).partition(";")[0]
    'out of memory (Unable to allocate 2 PiB)'
    >>> in_a_line(ValueError("no"))
    """
    lines = str(error).strip().splitlines()
    first = lines[0][:200] if lines else type(error).__name__
    device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in first
    return f"out of memory ({first}); {LESS}" if device or isinstance(error, MemoryError) else None
