"""Two processes against one: a DPO and a KD step under FSDP, started by a real torchrun: wall seconds.

    python experiments/bench/scaling.py                                 1 and 2 processes, in turn, one thread each

The work of a step is fixed and divided over the processes as dpo.py and kd.py do it, in micro-batches; all collectives
go over gloo. (Sample, check and splice need no communication.) Seconds are those from barrier to barrier. Half of one
process's seconds is linear scaling: a ratio of 0.50. Checked: the losses are those of one process.
"""

import functools
import sys
import time

import torch
from dpo_step import LR, SCHEDULE, draw_pairs, our_model, our_step
from harness import Stages, compare, make_parser, random_model

import kd
from lib import responses, runs, training


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a DPO step, examples of a KD step")
    parser.add_argument("--tokens", type=int, default=100, help="of the prompt; as many of each response")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    return parser.parse_args(argv)


def kd_step(model, teacher, part, share):
    """As `dpo_step.our_step`, forward KL and CE; all responses have one length."""
    rows = responses.collate([(pair["prompt_ids"], pair["chosen_ids"], True) for pair in part], 0, teacher.lm.device)
    loss = share / len(rows["target"]) * model(**rows, teacher_logits=teacher(rows, None))[0]
    loss.backward()
    return loss.item()


def training_stage(args, world, stages, name):
    """A DPO or a KD step, as dpo.py and kd.py take them, after one to warm up; returns the loss."""
    lm = random_model(args, dtype=torch.float32)
    vocab_size = lm.config.vocab_size
    torch.manual_seed(1)
    pairs = draw_pairs(args.pairs, vocab_size, args.tokens, args.tokens // 2, args.tokens // 2)
    if name == "dpo":
        model, step = our_model(lm, args, world), our_step
    else:
        model = training.shard(kd.KDModel(lm, vocab_size, kd.forward_kl, 0.5, 1.0), lm, runs.DTYPES[args.dtype], world)
        teacher = responses.LiveTeacher(random_model(args, seed=1).requires_grad_(False), vocab_size)
        step = functools.partial(kd_step, teacher=teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def take_step():
        total = 0
        batches = training.micro_batches(range(args.pairs), [1] * args.pairs, args.micro_batch_size, world)
        for indices, weight in batches:
            share = weight * world.size * len(indices) / args.pairs
            total += step(model, part=[pairs[i] for i in indices], share=share)
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
    losses = [training_stage(args, world, stages, name) for name in ("dpo", "kd")]
    return stages.result(losses=losses) if world.rank == 0 else None


def main(argv=None):
    args = parse_args(argv)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return compare(__file__, argv, args, measure, ["1", "2"], launch=lambda n: [*torchrun, n], rtol=1e-3, atol=0)


if __name__ == "__main__":
    runs.run(main)
