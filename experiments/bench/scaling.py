"""Two processes against one: steps of dpo.py and kd.py themselves, started by a real torchrun: wall seconds.

    python experiments/bench/scaling.py                                 1 and 2 processes, in turn, one thread each

Both train a random model on random digits, kd.py from another one of the same size. They have the toy's tokenizer, of 22
tokens: there is next to no head. The work of a step is the same for any number of processes; all collectives go over
gloo. Seconds are those of the last step's line in metrics.jsonl: reading, forward, backward, AdamW; not DPO's pass of the
reference. (Sample, check and splice need no communication.) Half of one process's seconds is linear scaling: a ratio of
0.50. Checked: losses and gradient norms of three steps are those of one process.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from harness import ROOT, compare, make_parser, random_model

import dpo
import kd
from lib import models, runs


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    parser.add_argument("--examples", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=100, help="of the prompt; as many of each response")
    parser.add_argument("--folder", type=Path, help="with --kind: of models, data and runs")
    return parser.parse_args(argv)


def make_inputs(args, folder):
    """Student and teacher, and a file that both commands read."""
    tokenizer, digits = models.load_tokenizer(ROOT / "toy/student"), random.Random(0)
    args.vocab = len(tokenizer)
    for seed, name in enumerate(("student", "teacher")):
        for part in (random_model(args, seed, runs.DTYPES["float32"]), tokenizer):
            part.save_pretrained(folder / name)
    draw = lambda: "".join(digits.choices("0123456789", k=args.tokens))
    rows = [{key: draw() for key in ("prompt", "chosen", "rejected", "response")} for _ in range(args.examples)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def measure(args):
    student, teacher, rows = (str(args.folder / name) for name in ("student", "teacher", "rows.jsonl"))
    flags = f"--batch-size {args.examples} --max-steps 3 --lr 1e-3 --device {args.device} --threads {args.threads}"
    commands = {"dpo": (dpo.main, ["--model", student, "--pairs", rows])}
    commands["kd"] = (kd.main, ["--student", student, "--teacher", teacher, "--data", rows, "--eval-limit", "0"])
    stages, found = {}, []
    for name, (command, own) in commands.items():
        out = args.folder / "runs" / name
        command([*own, *flags.split(), "--dtype", args.dtype, "--out", str(out)])
        steps = runs.read_jsonl(out / "metrics.jsonl")
        stages[name] = {"s": steps[-1]["seconds"]}
        found.append([[step["loss"], step["grad_norm"]] for step in steps])
    return {"stages": stages, "check": {"losses": found}} if runs.from_environment("RANK", 0) == 0 else None


def main(argv=None):
    args, argv = parse_args(argv), sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as folder:
        if not args.kind:
            make_inputs(args, Path(folder))
            argv = [*argv, "--folder", folder]

        def launch(processes):
            shutil.rmtree(Path(folder) / "runs", ignore_errors=True)
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]

        return compare(__file__, argv, args, measure, ["1", "2"], launch=launch, rtol=1e-3, atol=0)


if __name__ == "__main__":
    runs.run(main)
