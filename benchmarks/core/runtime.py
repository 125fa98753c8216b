"""Two settings of the process that decide the time of a step on CPU; `__main__` makes them first.

Both were found by profiling steps whose time doubled for no reason in the program:

* XLA allocates the temporary arrays of a step as one block, and the GNU C library hands freed
  blocks of more than 32 MB back to the system at once. Every step then starts on fresh pages and
  pays for each: at 32.3 MB, where a step here happens to lie, 1.6 times the time of one at 31 MB.
* The QR route of the solver runs in OpenBLAS, whose threads wait by spinning. Where another
  process needs the core, a step of milliseconds can take a second.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_NEVER = 2**31 - 1


def prepare_process() -> None:
    """Keep freed memory, and do not spin. Call it before JAX is imported.

    The same from a shell: OPENBLAS_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1073741824
    MALLOC_TRIM_THRESHOLD_=2147483647. Does nothing where the C library is another.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 2**30)
            mallopt(_M_TRIM_THRESHOLD, _NEVER)
