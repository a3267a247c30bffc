import torch
from hypothesis import settings

# `pytest --hypothesis-profile full tests/test_gae.py` tries 10,000 cases.
settings.register_profile("fast", max_examples=500, derandomize=True, database=None, deadline=None)
settings.register_profile("full", settings.get_profile("fast"), max_examples=10_000)
settings.load_profile("fast")

torch.set_num_threads(1)  # as train does, so that sums have the same order in all tests
