"""`python -m illada_kernels doctor [--json | --selftest]`"""

from __future__ import annotations

import sys

from . import doctor

if __name__ == "__main__":
    sys.exit(doctor.main(sys.argv[1:]))
