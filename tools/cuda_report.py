"""Reports every CUDA kernel of a build, by what tools/ptxas_log.sh keeps there, and fails if one spills or is missing.

python tools/cuda_report.py build/native [NAME...]     only kernels whose names hold a NAME
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import ptxas

ARCHITECTURES = re.compile(r'set\(PYREG_CUDA_ARCHITECTURES "([\d;]+)"')


def main() -> None:
    folder, *wanted = sys.argv[1:]
    logs = [path.with_name(f"{path.name}.ptxas") for path in sorted(Path(folder).rglob("*.cu.o"))]
    usages = [usage for log in logs for usage in ptxas.parse(log.read_text())]
    if not usages:
        sys.exit(f"{folder} holds no kernels: was it built with nvcc?")
    default = ARCHITECTURES.search((Path(__file__).parents[1] / "CMakeLists.txt").read_text())
    if default is None:
        sys.exit("CMakeLists.txt sets no PYREG_CUDA_ARCHITECTURES")
    counts = Counter(usage.architecture for usage in usages)
    for architecture in default[1].split(";"):
        if counts[f"sm_{architecture}"] != len({usage.kernel for usage in usages}):
            sys.exit(
                f"{folder}: {counts[f'sm_{architecture}']} kernels for sm_{architecture}, other architectures differ"
            )
    if wanted:
        names = ptxas.short_names(usage.kernel for usage in usages)
        usages = [usage for usage in usages if any(word in names[usage.kernel] for word in wanted)]
    sys.exit(ptxas.report("CUDA", usages))


if __name__ == "__main__":
    main()
