"""One run of the tests is like the next: examples are drawn from the test's own name, and none has
a time limit, so that a slow machine sees the same.

`--hypothesis-profile=new` looks for new ones.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("new"), derandomize=True)
settings.load_profile("repeatable")
