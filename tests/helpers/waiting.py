"""How long a test waits for what a fault alone keeps from happening.

No test that passes depends on how fast or how busy the machine is: it waits for events, not for a
while, and nothing ends it early. `test_package.py` looks for clocks in tests.
"""

PATIENCE = 600.0
"""Seconds after which something that blocks a test inside its own process is taken for dead."""
