"""Two processes against one, each stage of the method, started by a real torchrun: seconds and share of the ideal.

    python bench/scaling.py                                 1 and 2 processes, in turn, one thread each

The work of a stage is fixed and dealt out over the processes, as the scripts do it: micro-batches of prompts for sample,
check and splice, which need no communication; FSDP over gloo, with all its collectives, for a DPO and a KD step. Every
process prints nothing but rank 0, which writes the wall seconds of each stage from barrier to barrier. The share is
seconds of 1 / (processes x seconds of that many). Checked: all tokens, and the losses, are those of one process. CPU
seconds, summed over processes, tell whether time is lost to waiting or to work. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from harness import DTYPES, SHAPES, add_arguments, random_model, show, spread
from sampling import draw_prompts

# harness.py has put the project on the path
import common
import decode
import dpo
import kd
import kd_data
import training

STAGES = ("sample", "check", "splice", "dpo", "kd")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-6-layers")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of prompts, in all")
    parser.add_argument("--prompts", type=int, default=2, help="prompts in a micro-batch")
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a DPO step, examples of a KD step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--worker", action="store_true", help="what torchrun starts")
    return parser.parse_args(argv)


def generation_stages(args, world, student, teacher, laps):
    """Steps 1 to 3 over this rank's share of the micro-batches; returns a number that depends on every token."""
    n, longest, vocab, device = args.samples, args.max_new_tokens, student.config.vocab_size, world.device
    torch.manual_seed(0)
    batches = [draw_prompts(args.prompts, args.prompt_length, vocab) for _ in range(args.batches)]
    mine, total = range(world.rank, args.batches, world.size), 0
    lengths = {k: torch.full((args.prompts * n,), longest, device=device) for k in mine}
    start = torch.full((args.prompts * n,), longest // 2, device=device)  # where every row is spliced
    samples, scored = {}, {}
    sample_ids = torch.arange(n, device=device).repeat(args.prompts)
    names = lambda k: torch.arange(args.prompts, device=device).repeat_interleave(n) + k * args.prompts
    with laps("sample"):
        for k in mine:
            rows = decode.expand(decode.prefill(student, batches[k], 0, device), n)
            choose = decode.sampler(0, 0, names(k), sample_ids, torch.zeros_like(start), 1.0, 1.0)
            samples[k] = decode.decode(student, rows, choose, lengths[k], [-1], vocab)[0]
    with laps("check"):
        for k in mine:
            rows = decode.expand(decode.prefill(teacher, batches[k], 0, device), n)
            scored[k] = decode.score(teacher, rows, samples[k], vocab)
    with laps("splice"):
        for k in mine:
            rows, hidden, _ = scored[k]
            choose = decode.sampler(0, 1, names(k), sample_ids, start, 1.0, 1.0)
            rows = decode.rewind(rows, start, hidden)
            written = decode.decode(teacher, rows, choose, longest - start, [-1], vocab)[0]
            total += sum((k + 1) * token for row in samples[k] + written for token in row)
    return total


def training_stages(args, world, laps):
    """A DPO and a KD step under FSDP, as dpo.py and kd.py take them; returns both losses, summed over ranks."""
    dtype, losses = DTYPES[args.dtype], []
    torch.manual_seed(1)
    vocab = SHAPES[args.shape][-1]
    draw = lambda n: torch.randint(3, vocab, (n,)).tolist()
    longest = args.max_new_tokens
    pairs = [
        {
            "prompt_ids": draw(args.prompt_length),
            "chosen_ids": shared + draw(longest),
            "rejected_ids": shared + draw(longest),
        }
        for shared in (draw(longest // 2) for _ in range(args.pairs))
    ]
    sizes = [len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs]
    teacher = random_model(args.shape, dtype, world.device, 1).requires_grad_(False)
    for stage in ("dpo", "kd"):
        lm = random_model(args.shape, seed=0)
        model = dpo.PairModel(lm, vocab) if stage == "dpo" else kd.KDModel(lm, vocab, kd.forward_kl, 0.5, 1.0)
        model = training.shard(model, lm, dtype, world)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for step in range(2):  # the first warms up
            total = torch.zeros(1, device=world.device)
            with laps(stage if step else "warm-up"):
                for indices in training.micro_batches(range(args.pairs), sizes, args.micro_batch_size, world):
                    part = [pairs[i] for i in indices]
                    loss = dpo_loss(model, part) if stage == "dpo" else kd_loss(model, teacher, part)
                    (world.size / args.pairs * loss).backward()
                    total += loss.detach()
                training.optimizer_step(model, optimizer, 1e-5, 1.0)
        torch.distributed.all_reduce(total)
        losses.append(total.item() / args.pairs)
    return losses


def dpo_loss(model, part):
    sums = model(**dpo.collate_pairs(part, 0, False, model.lm.device))
    return dpo.dpo_loss(sums[:, 1], sums[:, 2], sums[:, 1].detach(), sums[:, 2].detach(), 0.1)[0].sum()


def kd_loss(model, teacher, part):
    rows = kd_data.collate([(p["prompt_ids"], p["chosen_ids"], True) for p in part], 0, teacher.device)
    with torch.no_grad():
        hidden = kd_data.response_hidden(teacher, rows["token_ids"], rows["source"])
    teacher_logits = lambda chunk: decode.next_logits(teacher, hidden[chunk], teacher.config.vocab_size)
    return model(**rows, teacher_logits=teacher_logits)[0] / len(part[0]["chosen_ids"])


class Laps:
    """`with laps(name): ...` keeps the wall seconds from barrier to barrier, and the CPU seconds of all processes."""

    def __init__(self, world):
        self.world, self.wall, self.cpu = world, {}, {}

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.world.barrier()
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        cpu = time.process_time() - self.began[1]
        self.world.barrier()
        self.wall[self.name] = time.perf_counter() - self.began[0]
        self.cpu[self.name] = self.world.sum([cpu])[0]


def worker(args):
    world = common.start_processes(args.device, args.threads)
    laps = Laps(world)
    student, teacher = (random_model(args.shape, DTYPES[args.dtype], world.device, seed) for seed in (0, 1))
    generation_stages(argparse.Namespace(**{**vars(args), "max_new_tokens": 2}), world, student, teacher, laps)
    tokens = world.sum([generation_stages(args, world, student, teacher, laps)])[0]
    del student, teacher
    losses = training_stages(args, world, laps)
    if world.rank == 0:
        print(json.dumps({"wall": laps.wall, "cpu": laps.cpu, "tokens": tokens, "losses": losses}))


def main(argv=None):
    args = parse_args(argv)
    if args.worker:
        common.run(lambda: worker(args))
        return
    runs = {count: [] for count in args.processes}
    for _ in range(args.repeat):
        for count, results in runs.items():
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), __file__]
            command = [sys.executable, *command, *(argv or sys.argv[1:]), "--worker"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    first = runs[args.processes[0]][0]
    for count, results in runs.items():
        apart = max(abs(a - b) for a, b in zip(first["losses"], results[0]["losses"]))
        print(f"check: {count} processes: the same tokens, losses {apart:.1e} apart")
        assert results[0]["tokens"] == first["tokens"] and apart < 1e-3 * max(first["losses"])
    summary = {}
    for stage in STAGES:
        for count, results in runs.items():
            result = summary[f"{stage} {count}"] = spread([r["wall"][stage] for r in results])
            show(f"{stage}, {count} processes", result, "s")
            one = summary[f"{stage} {args.processes[0]}"]["median"] * args.processes[0]
            result["share"] = one / (count * result["median"])
            result["cpu"] = spread([r["cpu"][stage] for r in results])["median"]
            print(
                f"{stage}, {count} processes: {result['share']:.2f} of linear, {result['cpu']:.2f} CPU seconds in all"
            )
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
