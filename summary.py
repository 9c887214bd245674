"""The table that warmup_distill.py and kd.py close with: students before and after on the same prompts."""

import json

import common
import eval

TITLES = {
    "accuracy": "accuracy",
    "replaced_samples": "samples > eta",
    "replaced_tokens": "tokens > eta",
    "kl_teacher_student": "KL(p,q)",
    "kl_student_teacher": "KL(q,p)",
    "response_tokens": "tokens",
}


def closing_table(run, students, teacher, prompts, batch_size, eta):
    """Measures, prints and writes to OUT/summary.json; each column is defined in the README.

    students: {name: path}, before and after. teacher: () -> its model, or None where there is no whole one.
    prompts: as `data.encode_prompts` returns them. Returns the summary; on rank 0 it is on the disk, too.
    """
    with_answers = all(p["gold"] is not None and eval.final_number(p["gold"]) is not None for p in prompts)
    shared = (run.tokenizer, run.eos_ids, run.args.max_new_tokens, batch_size)
    summary = {}
    if teacher and with_answers:
        summary["teacher"] = {"accuracy": eval.greedy_accuracy(teacher(), prompts, *shared, run.world)}
    for name, path in students.items():
        model, row = run.load(path), {}
        if with_answers:
            row["accuracy"] = eval.greedy_accuracy(model, prompts, *shared, run.world)
        if teacher:
            row.update(eval.distance(model, teacher(), prompts, *shared, eta, run.args.seed, run.world))
        summary[name] = row
    if run.world.rank == 0:
        common.write_atomic(run.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        which = "training" if run.args.eval_data is None else "held-out"
        print_table(summary, f"{len(prompts)} {which} prompts, eta {eta}")
        before, after = (summary[name].get("response_tokens", 0) for name in students)
        if after > 1.5 * before > 0:
            print(f"warning: the student's responses have grown from {before:.0f} to {after:.0f} tokens")
    return summary


def print_table(summary, title):
    """{name: {column: value}} as text, a row a name."""
    columns = [c for c in TITLES if any(c in row for row in summary.values())]
    print(f"\n{title}\n{'':16}" + "".join(f"{TITLES[c]:>15}" for c in columns))
    for name, row in summary.items():
        print(f"{name:16}" + "".join(f"{row[c]:15.4f}" if c in row else f"{'-':>15}" for c in columns))
