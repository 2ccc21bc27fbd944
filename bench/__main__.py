"""`python -m bench NAME [options]` runs `bench.NAME.main(options)`."""

import importlib
import pkgutil
import sys

import bench


def main() -> int:
    """Dispatch to the named bench module."""
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name[0] != "_")
    names = [name for name in names if name not in {"measure"}]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"usage: python -m bench {{{','.join(names)}}} [options]", file=sys.stderr)
        return 2
    module = importlib.import_module(f"bench.{sys.argv[1]}")
    result = module.main(sys.argv[2:])
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
