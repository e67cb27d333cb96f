"""`python limited.py BYTES ARGUMENTS...`: graft with so much address space (0: no limit); prints its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from graftlm.cli.main import run


def main() -> int:
    limit = int(sys.argv[1])
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = run(sys.argv[2:])
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmPeak")))
    return code


if __name__ == "__main__":
    sys.exit(main())
