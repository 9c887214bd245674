"""out/ledger/SEED/out/NAME/summary.json of runs/ledger.sh -> runs/ledger.json and a Markdown table."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent


def collect():
    """{name: {seed: {"before", "after", "kl_teacher_student", "kl_student_teacher", "pairs"}}} of all finished runs."""
    results = {}
    for file in sorted((ROOT / "out/ledger").glob("*/out/*/summary.json")):
        seed, name, summary = file.parts[-4], file.parts[-2], json.loads(file.read_text())
        after = summary["student after"]
        results.setdefault(name, {})[seed] = {
            "before": summary["student before"]["accuracy"],
            "after": after["accuracy"],
            "kl_teacher_student": after["kl_teacher_student"],
            "kl_student_teacher": after["kl_student_teacher"],
            "pairs": json.loads((file.parent / "mismatch.json").read_text())["pairs"],
        }
    return results


def table(results):
    """Markdown: points of accuracy, mean and standard deviation over seeds, and the paired difference to the default."""
    lines = [
        "| variant | pairs | accuracy after, % | minus no warm-up, points | minus default, points |",
        "|---|---|---|---|---|",
    ]
    mean_sd = lambda values: f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    base = results["default"]
    assert all(runs.keys() == base.keys() for runs in results.values()), "not every variant has all seeds"
    lines.append(f"| no warm-up | | {mean_sd([100 * r['before'] for r in base.values()])} | | |")
    for name in sorted(results, key=lambda n: (n != "default", n)):
        runs = results[name]
        gain = mean_sd([100 * (r["after"] - r["before"]) for r in runs.values()])
        difference = [100 * (runs[s]["after"] - base[s]["after"]) for s in runs]
        pairs = round(statistics.mean(r["pairs"] for r in runs.values()))
        after = mean_sd([100 * r["after"] for r in runs.values()])
        lines.append(f"| {name} | {pairs} | {after} | {gain} | {'' if name == 'default' else mean_sd(difference)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = collect()
    (ROOT / "runs/ledger.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
