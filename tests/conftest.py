"""One run of the tests is like the next: examples are drawn from the test's own name.

`--hypothesis-profile=default` looks for new ones.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
