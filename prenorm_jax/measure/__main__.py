"""Prints the tables of files that train.py and eval.py wrote: python -m prenorm_jax.measure compare.json equivalence.json [...]"""

import json
import pathlib
import sys

from prenorm_jax.measure.comparison import answers_table, times_table
from prenorm_jax.measure.equivalence import Report


def main(paths: list[str]) -> int:
    """Prints the tables of each file; exit status 2 where one can't be read."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    for path in paths:
        try:
            result = json.loads(pathlib.Path(path).read_text())
            tables = [answers_table(result)]
            tables.append(Report.of_json(result).as_markdown() if "errors" in result else times_table(result))
            print("\n\n".join([path, *tables]) + "\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: not as train.py or eval.py writes it ({error!r})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
