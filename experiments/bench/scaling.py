"""Two processes against one, each stage of the method, started by a real torchrun: wall seconds.

    python experiments/bench/scaling.py                                 1 and 2 processes, in turn, one thread each

The work of a stage is fixed and divided over the processes as the scripts do it: micro-batches of prompts for sample,
check and splice, which need no communication; FSDP over gloo, with all its collectives, for a DPO and a KD step.
Seconds are those from barrier to barrier, memory is that of rank 0. Half of one process's seconds is linear scaling: a
ratio of 0.50. Checked: all tokens, and the losses (in bfloat16 to 1e-3), are those of one process.
"""

import argparse
import functools
import sys
import time

import sampling
import splice
import torch
from dpo_step import LR, SCHEDULE, draw_pairs, our_model, our_step
from harness import SHAPES, Stages, add_generation_arguments, compare, load, make_parser, random_model

import kd
from lib import responses, runs, training


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of prompts, in all")
    add_generation_arguments(parser, max_new_tokens=48)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a DPO step, examples of a KD step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    return parser.parse_args(argv)


def generation_stages(args, world, stages):
    """Steps 1 to 3 over this rank's share of the micro-batches; returns a sum that depends on every rank's tokens."""
    student, teacher = load(None, args, seed=0), load(None, args, seed=1)
    torch.manual_seed(0)
    vocab_size = SHAPES[args.shape][-1]
    prompts = [sampling.draw_prompts(args.prompts, args.prompt_length, vocab_size) for _ in range(args.batches)]
    lengths = torch.full((args.prompts * args.samples,), args.max_new_tokens, device=student.device)
    t_star = lengths // 2  # every row is spliced there
    mine = range(world.rank, args.batches, world.size)
    batches = {k: {"prompts": prompts[k], "n": args.samples, "room": lengths - t_star} for k in mine}

    def sample(batch):
        batch["responses"] = sampling.ours(student, batch["prompts"], batch["n"], lengths)[0]

    def check(batch):
        batch["scored"] = splice.check_ours(teacher, batch)[1]

    def continue_by_teacher(batch):
        batch["written"] = splice.splice_ours(teacher, batch, t_star, batch["scored"])

    for name, work in (("sample", sample), ("check", check), ("splice", continue_by_teacher)):
        stages(name, lambda work=work: [work(batch) for batch in batches.values()])
    total = 0
    for k, batch in batches.items():
        total += sum((k + 1) * token for row in batch["responses"] + batch["written"] for token in row)
    return int(world.sum({"total": total})["total"])


def kd_step(model, teacher, part, share):
    """As `dpo_step.our_step`, forward KL and CE; all responses have one length."""
    rows = responses.collate([(pair["prompt_ids"], pair["chosen_ids"], True) for pair in part], 0, teacher.lm.device)
    loss = share / len(rows["target"]) * model(**rows, teacher_logits=teacher(rows, None))[0]
    loss.backward()
    return loss.item()


def training_stage(args, world, stages, name):
    """A DPO or a KD step under FSDP, as dpo.py and kd.py take them, after one to warm up; returns the loss."""
    torch.manual_seed(1)
    vocab_size, half = SHAPES[args.shape][-1], args.max_new_tokens // 2
    pairs = draw_pairs(args.pairs, vocab_size, args.prompt_length, half, half)
    lm = random_model(args.shape, device=args.device)
    if name == "dpo":
        model, step = our_model(lm, args, world), our_step
    else:
        model = training.shard(kd.KDModel(lm, vocab_size, kd.forward_kl, 0.5, 1.0), lm, runs.DTYPES[args.dtype], world)
        teacher = responses.LiveTeacher(load(None, args, seed=1).requires_grad_(False), vocab_size)
        step = functools.partial(kd_step, teacher=teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def take_step():
        total = 0
        for indices in training.micro_batches(range(args.pairs), [1] * args.pairs, args.micro_batch_size, world):
            total += step(model, part=[pairs[i] for i in indices], share=world.size * len(indices) / args.pairs)
        training.optimizer_step(model, optimizer, 0, 1, SCHEDULE)
        return world.sum({"total": total})["total"] / world.size

    take_step()
    return stages(name, take_step)


def measure(args):
    world = runs.start_processes(args.device, args.threads)

    def from_barrier(device):
        world.barrier()
        return time.perf_counter()

    stages = Stages(args.device, from_barrier)
    generation_stages(argparse.Namespace(**{**vars(args), "max_new_tokens": 2}), world, stages)  # warm-up
    tokens = generation_stages(args, world, stages)
    losses = [training_stage(args, world, stages, name) for name in ("dpo", "kd")]
    return stages.result(tokens=tokens, losses=losses) if world.rank == 0 else None


def main(argv=None):
    args = parse_args(argv)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return compare(__file__, argv, args, measure, ["1", "2"], launch=lambda n: [*torchrun, n], rel_tol=1e-3)


if __name__ == "__main__":
    runs.run(main)
