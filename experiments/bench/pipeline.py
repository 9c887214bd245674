"""The method from samples to a warmed-up student: this project beside the same built from generate and TRL.

    pip install -r experiments/bench/requirements.txt
    python experiments/bench/pipeline.py

Both start from the same student and teacher (random models) and the same prompts:

    sample      N responses a prompt, with the student's log-probs. Peer: generate(num_return_sequences=N), then a forward
    check       the teacher's log-probs. Peer: a forward over the full rows
    splice      the teacher writes on from t*. Peer: generate on prompt + y_<t*
    dpo         one optimizer step over all pairs, reference log-probs included. Peer: TRL's DPOTrainer with its fastest
                settings, its reference model a copy that runs in every step (one epoch: nothing to precompute for)

How long responses and continuations are is drawn beforehand, and both go on from the same samples, so that both do the
same work. Checked: what splice.py checks, and the loss, ln 2. Generation is in --dtype, DPO in float32.
"""

import argparse
import copy

import sampling
import splice
import torch
from dpo_step import LR, SCHEDULE, our_model, our_step, trl_step, trl_trainer
from harness import Stages, add_generation_arguments, compare, make_parser, random_model

from lib import runs, training


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    add_generation_arguments(parser, prompts=4)
    parser.add_argument("--mismatch", type=float, default=0.02, help="share of the tokens whose margin is above eta")
    return parser.parse_args(argv)


def sample(kind, student, batch):
    """Step 1, with the student's log-probs."""
    way = sampling.ours if kind == "ours" else sampling.generate
    way(student, batch["prompts"], batch["n"], batch["mask"].sum(-1))
    if kind != "ours":
        splice.check_plain(student, batch)


def make_pairs(batch, t_star, written):
    """The preference pairs of the spliced rows, the shortest first."""
    pairs, continuations = [], iter(written)
    for i, (response, t) in enumerate(zip(batch["responses"], t_star.tolist())):
        if t >= 0:
            pair = {"prompt_ids": batch["prompts"][i // batch["n"]], "chosen_ids": response[:t] + next(continuations)}
            pairs.append({**pair, "rejected_ids": response})
    return sorted(pairs, key=lambda pair: sum(map(len, pair.values())))


def measure(args):
    student, teacher = random_model(args, seed=1), random_model(args, seed=0)
    torch.manual_seed(0)
    batch = splice.make_batch(student, teacher, args)
    way = "ours" if args.kind == "ours" else "plain"
    agreed, stages = splice.check(way, teacher, batch), Stages(args.device)
    t_star = torch.tensor(agreed["t_star"], device=batch["mask"].device)
    stages("sample", lambda: sample(args.kind, student, batch))
    _, scored = stages("check", lambda: splice.WAYS[way][0](teacher, batch))
    written = stages("splice", lambda: splice.WAYS[way][1](teacher, batch, t_star, scored))
    pairs, size = make_pairs(batch, t_star, written), 8  # in one forward of DPO
    student, args = student.float(), argparse.Namespace(**{**vars(args), "dtype": "float32"})
    if args.kind == "ours":
        model = our_model(student, args)
        step = lambda part: our_step(model, part, share=len(part) / len(pairs))
    else:
        trainer = trl_trainer(student, copy.deepcopy(student), args, size)
        model = trainer.model
        step = lambda part: trl_step(trainer, part) * len(part) / len(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def align():
        loss = sum(step(pairs[k : k + size]) for k in range(0, len(pairs), size))
        training.optimizer_step(model, optimizer, 0, 1, SCHEDULE)
        return loss

    loss = stages("dpo", align)
    stages.stages["all"] = {"s": sum(stage["s"] for stage in stages.stages.values())}
    return stages.result(**agreed, loss=loss)


def main(argv=None):
    return compare(__file__, argv, parse_args(argv), measure, ["ours", "generate+trl"], atol=1e-3, rtol=0)


if __name__ == "__main__":
    runs.run(main)
