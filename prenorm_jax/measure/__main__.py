"""Prints the tables of comparisons that were written before: python -m prenorm_jax.measure compare.json [...]"""

import json
import pathlib
import sys

from prenorm_jax.measure.comparison import answers_table, times_table


def main(paths: list[str]) -> int:
    """Prints the tables of each file; exit status 2 where one is not a comparison."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    for path in paths:
        try:
            result = json.loads(pathlib.Path(path).read_text())
            print(f"{path}\n\n{answers_table(result)}\n\n{times_table(result)}\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: not a comparison as train.py writes it ({error!r})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
