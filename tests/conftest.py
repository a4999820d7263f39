"""What every test needs before torch is loaded."""

import os

# As the command line does: idle threads that spin slow down everything else on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
