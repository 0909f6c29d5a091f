"""The result table of several seeds of one preset, as Markdown, from the runs' evaluation files.

.venv/bin/python tools/results.py runs/NAME-HASH1 runs/NAME-HASH2 ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from instructrec_jax.evaluation.table import EvaluationResult

METRICS = ("ndcg@10", "hr@10", "mrr@10")


def main(run_dirs: list[str], protocol: str = "full") -> None:
    runs = [json.loads((Path(d) / "evaluation" / f"{protocol}.json").read_text(encoding="utf-8")) for d in run_dirs]
    print(f"{len(runs)} run(s), best steps {', '.join(str(r['best_step']) for r in runs)}\n")
    for part in ("next_item", "search", "likelihood", "wordings"):
        results = [EvaluationResult.from_json(r[part]) for r in runs if r.get(part)]
        if not results:
            continue
        names = [m for m in METRICS if m in results[0].rows[0].metrics] or ["hr@1", "hr@3", "hr@5", "ndcg@5"]
        print(f"**{results[0].data}, {results[0].protocol}**, {results[0].split}, {results[0].cases:,} cases\n")
        print("| system | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
        for row in results[0].rows:
            cells = []
            for name in names:
                seeds = [r.row(row.name).metrics[name] for r in results]
                values = [e.mean or 0.0 for e in seeds]
                if row.baseline or len(values) == 1:
                    cells.append(f"{values[0]:.4f} ({seeds[0].low:.4f} to {seeds[0].high:.4f})")
                else:
                    every = ", ".join(f"{v:.4f}" for v in values)
                    cells.append(f"**{mean(values):.4f}** ± {stdev(values):.4f} [{every}]")
            print(f"| {row.name} | " + " | ".join(cells) + " |")
        for number, result in enumerate(results):
            for c in result.comparisons:
                if c.metric == names[0]:
                    print(f"\nrun {number}: {c.name} − {c.baseline} = {c.difference:+.4f} {c.metric} "
                          f"(95 % {c.low or 0:+.4f} to {c.high or 0:+.4f}), paired p = {c.p:.3f}")  # fmt: skip
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
