"""The method from samples to a warmed-up student: this project beside the same built from generate and TRL, seconds.

    pip install -r bench/requirements.txt
    python bench/pipeline.py

Both, in turn in one process of each kind, from the same student and teacher (random models) and the same prompts:

    sample      N responses a prompt, with the student's log-probs. Peer: generate(num_return_sequences=N), then a forward
    check       the teacher's log-probs, t*. Peer: a forward over the full rows
    splice      the teacher writes on from t*. Peer: generate on prompt + y_<t*
    dpo         one optimizer step over all pairs, reference log-probs included. Peer: TRL's DPOTrainer with its fastest
                settings, its reference model a copy that runs in every step (one epoch: nothing to precompute for)

How long responses and continuations are is drawn beforehand, and both go on from the same samples, so that both do the
same work; the stages themselves are held against each other's results by sampling.py, splice.py and dpo_step.py. Checked
here: the same t*, so pairs of the same lengths, and the peer's check against ours in float32. Generation is in --dtype,
DPO in float32. The last line is JSON.
"""

import argparse
import copy
import json
import sys

import dpo_step
import sampling
import splice
import torch
from harness import DTYPES, SHAPES, add_arguments, child, clock, random_model, show, spread

# harness.py has put the project on the path
import training

STAGES = ("sample", "check and splice", "dpo", "all")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-6-layers")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=100, help="the longest; lengths are drawn from half of it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--hazard", type=float, default=0.02, help="probability that a token is a response's last")
    parser.add_argument("--mismatch", type=float, default=0.02, help="share of the tokens whose margin is above eta")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="pairs in one forward of DPO")
    parser.add_argument("--only", choices=["ours", "peer"], help="one run of one kind, as JSON")
    return parser.parse_args(argv)


def sample(kind, student, batch):
    """Step 1, with the student's log-probs."""
    way = sampling.ours if kind == "ours" else sampling.generate
    way(student, batch["prompts"], batch["n"], batch["mask"].sum(-1), 0)
    if kind == "peer":
        splice.plain_logprobs(student, batch)


def make_pairs(batch, t_star, written):
    """The preference pairs of the spliced rows."""
    pairs, continuations = [], iter(written)
    for i, (response, t) in enumerate(zip(batch["responses"], t_star.tolist())):
        if t >= 0:
            chosen = response[:t] + next(continuations)
            prompt = batch["prompts"][i // batch["n"]]
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": response})
    return pairs


def align(kind, lm, pairs, args):
    """Step 4: one optimizer step over all pairs; returns (loss, seconds without building models and trainers)."""
    lengths = [sum(len(pair[name]) for name in pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: lengths[i])
    size = args.micro_batch_size
    parts = [[pairs[i] for i in order[k : k + size]] for k in range(0, len(pairs), size)]
    args = argparse.Namespace(**{**vars(args), "dtype": "float32"})
    if kind == "ours":
        model = dpo_step.our_model(lm, args)
    else:
        trainer = dpo_step.trl_trainer(lm, copy.deepcopy(lm), args, size, accumulation=1)
        model = trainer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=dpo_step.LR)
    began, loss = clock(args.device), 0.0
    for part in parts:
        if kind == "ours":
            with torch.no_grad():
                reference = model(**dpo_step.dpo.collate_pairs(part, 0, False, args.device))
            loss += dpo_step.our_step(model, part, reference, len(part) / len(pairs))
        else:
            loss += dpo_step.trl_step(trainer, part) * len(part) / len(pairs)
    training.optimizer_step(model, optimizer, dpo_step.LR, 1.0)
    return loss, clock(args.device) - began


def measure(args):
    """One run of one kind: seconds of each stage."""
    torch.set_num_threads(args.threads)
    student, teacher = (random_model(args.shape, DTYPES[args.dtype], args.device, seed) for seed in (1, 0))
    torch.manual_seed(0)
    batch = splice.make_batch(student, teacher, args)
    splice.check(teacher, batch)
    began = clock(args.device)
    sample(args.only, student, batch)
    seconds = {"sample": clock(args.device) - began}
    way = splice.ours if args.only == "ours" else splice.plain
    _, t_star, written, checking, splicing = way(teacher, batch)
    seconds["check and splice"] = checking + splicing
    pairs = make_pairs(batch, t_star, written)
    loss, seconds["dpo"] = align(args.only, student.float(), pairs, args)
    seconds["all"] = sum(seconds.values())
    return {**seconds, "loss": loss, "pairs": len(pairs), "t_star": t_star.tolist()}


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    runs = {"ours": [], "peer": []}
    for _ in range(args.repeat):
        for kind, results in runs.items():
            results.append(child(__file__, argv or sys.argv[1:], "--only", kind))
    ours, peer = runs["ours"][0], runs["peer"][0]
    print(f"check: {ours['pairs']} pairs, loss {ours['loss']:.4f} and {peer['loss']:.4f}, which is ln 2")
    assert abs(ours["loss"] - 0.6931) < 1e-3 and abs(peer["loss"] - 0.6931) < 1e-3
    assert ours["t_star"] == peer["t_star"]
    summary = {"pairs": ours["pairs"]}
    for stage in STAGES:
        for kind, results in runs.items():
            summary[f"{kind} {stage}"] = spread([r[stage] for r in results])
            show(f"{stage} {kind}", summary[f"{kind} {stage}"], "s")
        ratio = summary[f"ratio {stage}"] = summary[f"peer {stage}"]["median"] / summary[f"ours {stage}"]["median"]
        print(f"{stage} ratio {ratio:.2f}", flush=True)
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
