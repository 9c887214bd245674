"""Two processes against one: steps of dpo.py and kd.py themselves, started by a real torchrun: wall seconds.

    python experiments/bench/scaling.py                                 1 and 2 processes, in turn, one thread each

Both train a random model that has the toy's tokenizer, kd.py with a teacher of the same size, on random digits. The work
of a step is the same for any number of processes; all collectives go over gloo. Seconds are those of the last step's
line in metrics.jsonl. (Sample, check and splice need no communication.) Half of one process's seconds is linear scaling:
a ratio of 0.50. Checked: the losses are those of one process.
"""

import json
import random
import shutil
import sys

from harness import ROOT, compare, make_parser, random_model

import dpo
import kd
from lib import models, runs

FOLDER = ROOT / "out/bench-scaling"


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    parser.add_argument("--examples", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=100, help="of the prompt; as many of each response")
    return parser.parse_args(argv)


def make_inputs(args):
    """The model, and a file that both commands read."""
    tokenizer = models.load_tokenizer(ROOT / "toy/student")
    args.vocab = len(tokenizer)
    for part in (random_model(args, dtype=runs.DTYPES["float32"]), tokenizer):
        part.save_pretrained(FOLDER / "model")
    draw = lambda: "".join(random.choices("0123456789", k=args.tokens))
    rows = [{key: draw() for key in ("prompt", "chosen", "rejected", "response")} for _ in range(args.examples)]
    (FOLDER / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def measure(args):
    model, rows, stages, losses = str(FOLDER / "model"), str(FOLDER / "rows.jsonl"), {}, []
    flags = f"--batch-size {args.examples} --max-steps 3 --device {args.device} --threads {args.threads}".split()
    commands = {"dpo": (dpo.main, ["--model", model, "--pairs", rows])}
    commands["kd"] = (kd.main, ["--student", model, "--teacher", model, "--data", rows, "--eval-limit", "0"])
    for name, (command, own) in commands.items():
        out = FOLDER / "runs" / name
        command([*own, *flags, "--dtype", args.dtype, "--out", str(out)])
        steps = runs.read_jsonl(out / "metrics.jsonl")
        stages[name] = {"s": steps[-1]["seconds"]}
        losses.append([step["loss"] for step in steps])
    return {"stages": stages, "check": {"losses": losses}} if runs.from_environment("RANK", 0) == 0 else None


def main(argv=None):
    args = parse_args(argv)
    if not args.kind:
        shutil.rmtree(FOLDER, ignore_errors=True)
        make_inputs(args)

    def launch(processes):
        shutil.rmtree(FOLDER / "runs", ignore_errors=True)
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]

    return compare(__file__, argv, args, measure, ["1", "2"], launch=launch, rtol=1e-3, atol=0)


if __name__ == "__main__":
    runs.run(main)
