"""Lines of the product by package: `python -m tests.lines`. Exits with 1 if a file has more than 300."""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 300


def main() -> int:
    lines = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8").count("\n")
        for package in ("data_prep", "sora_train")
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    packages: Counter[str] = Counter()
    for path, count in lines.items():
        packages["/".join(path.parts[:2]) if len(path.parts) > 2 else path.parts[0]] += count
    for package, count in packages.most_common():
        print(f"{count:6}  {package}")
    print(f"{sum(lines.values()):6}  in {len(lines)} files")
    long = [f"{path}: {count}" for path, count in lines.items() if count > MOST]
    print(f"files over {MOST} lines: {', '.join(long) or 'none'}")
    return bool(long)


if __name__ == "__main__":
    sys.exit(main())
