"""Before torch is loaded: its threads sleep while they wait for each other.

Spinning, the default, makes small operations 40 times slower where other processes want the same cores.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
