"""What holds for every test."""

import hypothesis

# The same examples on every machine, and no test of timing.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("house")
