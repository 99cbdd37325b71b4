"""`python -m illada_kernels doctor [--json | --selftest]`"""

from __future__ import annotations

import sys

from . import doctor

if __name__ == "__main__":
    try:
        code = doctor.main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor | head`
        sys.stderr.close()
        code = 141
    sys.exit(code)
