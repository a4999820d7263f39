"""A pytest plugin: the tests of this process run on the library that AUTOQUANT_SANITIZED names.

``test_sanitized`` builds it with AddressSanitizer and UndefinedBehaviorSanitizer, which end the
process where the C code reads or writes beyond a buffer, or does what C leaves undefined.
"""

import os
from pathlib import Path

from autoquant.kernels.cpu import gates, int16, library, native

LOADED = library.load(Path(os.environ["AUTOQUANT_SANITIZED"]))

for module in (library, native, gates, int16):
    module.library = lambda: LOADED
