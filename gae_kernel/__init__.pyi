from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Float = TypeVar("_Float", np.float32, np.float64)

def compute_gae(
    rewards: NDArray[_Float],
    values: NDArray[_Float],
    terminations: NDArray[np.bool_],
    truncations: NDArray[np.bool_],
    gamma: float,
    gae_lambda: float,
) -> tuple[NDArray[_Float], NDArray[_Float]]:
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16), over steps t:

        delta_t = rewards_t + gamma * (1 - terminations_t) * values_{t+1} - values_t
        A_t     = delta_t + gamma * gae_lambda * (1 - (terminations_t | truncations_t)) * A_{t+1}
        returns = A + values

    A termination has no successor; a truncation bootstraps from `values_{t+1}`; both cut the trace.

    Args:
        rewards: (T, N) or (T,), float32 or float64.
        values: (T+1, N) or (T+1,), the dtype of `rewards`; the last row is the bootstrap.
        terminations, truncations: the shape of `rewards`, bool.
        gamma, gae_lambda: in [0, 1].

    Returns:
        (advantages, returns), of the shape and dtype of `rewards`: the halves of one new array.

    Raises:
        TypeError: an argument is no NumPy array, or its dtype is wrong.
        ValueError: a shape does not fit, or gamma or gae_lambda is outside [0, 1].
        RuntimeError: another Rust extension is writing to an argument.
        OSError: the system refuses a thread.

    Any memory layout is read, C-contiguous arrays without a copy. No input is written. The GIL is
    released, so no other thread may write the inputs meanwhile. From 2**20 elements on, threads
    share the work, as many as the process has processors. They end with the call.
    """
