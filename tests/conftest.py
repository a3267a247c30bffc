import pytest
import torch

torch.set_num_threads(1)  # as train does, so that sums have the same order in all tests


def pytest_sessionstart():
    """A missing kernel is a broken build, not a reason to test only the fallback."""
    try:
        from gae_kernel import compute_gae  # noqa: F401
    except ImportError as error:
        raise pytest.UsageError(
            f"The Rust kernel is not built ({error}). Build it and run the tests with "
            "`python -m uv run pytest`, or install it with `pip install .`"
        ) from error
