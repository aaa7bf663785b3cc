"""``python benchmarks/forgetting``: the folder above, and not the root, on the import path (the root has our kernels/)."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":  # not in the processes that are started from here
    try:
        from forgetting.cli import main
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is missing: pip install ".[forgetting]"')
    main()
