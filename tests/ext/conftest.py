"""Before torch is loaded: its threads sleep while they wait for each other.

Spinning, the default, makes small operations 40 times slower where other processes want the same cores.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes depends on what else the machine does.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
