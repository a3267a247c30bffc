"""Starts a script with the parameters that W&B chose, given as JSON.

W&B's own flags do not fit: --anneal_lr=False is no flag of the scripts, and its form without
booleans leaves False out, whatever the default is.
"""

import json
import runpy
import sys


def flags(parameters: dict) -> list[str]:
    """The parameters as the scripts take them."""
    words = []
    for name, value in parameters.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


if __name__ == "__main__":
    _, script, parameters = sys.argv
    sys.argv = [script, "--track", *flags(json.loads(parameters))]
    runpy.run_path(script, run_name="__main__")
