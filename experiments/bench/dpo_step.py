"""A DPO step on splice pairs: dpo.py (a pair is one row) beside TRL's DPOTrainer, seconds and peak memory.

    pip install -r bench/requirements.txt
    python bench/dpo_step.py                                                    6 layers of SmolLM2-135M's shape
    python bench/dpo_step.py --shape qwen2.5-0.5b --dtype bfloat16 --device cuda

Each run is a process of its own, the kinds in turn, on the same weights and pairs, from the same (random)
reference log-probs. A step is: collate, loss, gradient, clip, AdamW. Kinds:

    ours           collate_pairs, PairModel, dpo_loss; without FSDP in float32, under FSDP in --dtype bfloat16
    trl            DPOTrainer's collator and training_step, reference log-probs precomputed, no activation checkpointing:
                   the fastest settings it has for this
    trl-default    its defaults: activation checkpointing, and a reference model that runs in every step

Step 0 warms up; the losses of all steps must agree between ours and trl to 1e-4
(in bfloat16 to 0.05: TRL computes under autocast); trl-default has another reference. Memory is the peak above that before the first step, and all of it
(total), model and optimizer included. The last line is JSON.
"""

import argparse
import json
import logging
import os
import sys
import tempfile

import torch
from harness import DTYPES, SHAPES, PeakMemory, add_arguments, child, clock, random_model, show, spread

# harness.py has put the project on the path
import common
import dpo
import training

BETA, LR = 0.1, 1e-5
KINDS = ("ours", "trl", "trl-default")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, dtype="float32", repeat=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-6-layers")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt")
    parser.add_argument("--prefix", type=int, default=40, help="tokens that both responses share, y_<t*")
    parser.add_argument("--suffix", type=int, default=100, help="tokens of each response from t* on")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process")
    parser.add_argument("--only", choices=KINDS, help="one process of one kind, as JSON")
    return parser.parse_args(argv)


def make_pairs(args):
    """Random pairs after a splice, and reference log-probs: what a uniform model gives, with noise."""
    vocab = SHAPES[args.shape][-1]
    draw = lambda n: torch.randint(3, vocab, (n,)).tolist()
    pairs = []
    for _ in range(args.pairs):
        prefix = draw(args.prefix)
        chosen, rejected = prefix + draw(args.suffix), prefix + draw(args.suffix)
        pairs.append({"prompt_ids": draw(args.prompt), "chosen_ids": chosen, "rejected_ids": rejected})
    uniform = -(args.prefix + args.suffix) * torch.log(torch.tensor(float(vocab)))
    return pairs, uniform + 3 * torch.randn(args.pairs, 2)


def our_model(lm, args):
    """PairModel; in bfloat16 as dpo.py does it: FSDP keeps float32 weights and computes in bfloat16."""
    model = dpo.PairModel(lm, lm.config.vocab_size)
    if args.dtype == "bfloat16":
        model = training.shard(model, lm, DTYPES[args.dtype], common.start_processes(args.device, args.threads))
    return model.to(args.device)


def our_step(model, pairs, reference, share=1.0):
    """Forward and backward over one micro-batch, `share` of the step's pairs; returns the loss. reference: (B, 2 or 3)."""
    sums = model(**dpo.collate_pairs(pairs, 0, False, model.lm.device))
    policy = dpo.response_logps(sums, None, False)
    if reference.shape[1] == 3:
        reference = torch.stack(dpo.response_logps(reference, None, False), -1)
    loss = share * dpo.dpo_loss(*policy, *reference.to(sums.device).T, BETA)[0].mean()
    loss.backward()
    return loss.item()


def trl_trainer(lm, ref_lm, args, batch_size, accumulation=1, checkpointing=False):
    """TRL's trainer, built on one line of text; it is then given our token ids through its own collator.

    ref_lm: the reference model, which runs in every step; None: the pairs bring their reference log-probs.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import toy

    logging.disable(logging.WARNING)
    config = DPOConfig(
        tempfile.mkdtemp(),
        beta=BETA,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        per_device_train_batch_size=batch_size,
        precompute_ref_log_probs=ref_lm is None,
        gradient_checkpointing=checkpointing,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        lm,
        ref_model=ref_lm,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1", "chosen": "2", "rejected": "3"}]),
        processing_class=toy.make_tokenizer(),
    )
    if checkpointing:  # Trainer.train does this
        trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = accumulation  # and this
    return trainer


def trl_step(trainer, pairs, reference=None):
    """As `our_step`, by DPOTrainer's collator and training_step. reference: (B, 2) for a trainer without a model for it."""
    if reference is not None:
        columns = zip(pairs, reference.tolist())
        pairs = [{**pair, "ref_chosen_logps": c, "ref_rejected_logps": r} for pair, (c, r) in columns]
    return trainer.training_step(trainer.model, trainer.data_collator(pairs)).item()


def measure(args):
    """Runs the steps of one kind; returns seconds and loss of each, and memory."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    pairs, reference = make_pairs(args)
    lm = random_model(args.shape, std=0.02)
    if args.only == "ours":
        model = our_model(lm, args)
        step = lambda: our_step(model, pairs, reference)
    else:
        defaults = args.only == "trl-default"
        ref_lm = random_model(args.shape, std=0.02) if defaults else None
        trainer = trl_trainer(lm, ref_lm, args, args.pairs, checkpointing=defaults)
        model = trainer.model
        step = lambda: trl_step(trainer, pairs, None if defaults else reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, seconds = [], []
    with PeakMemory(args.device) as peak:
        for _ in range(args.steps + 1):
            began = clock(args.device)
            losses.append(step())
            training.optimizer_step(model, optimizer, LR, 1.0)
            seconds.append(clock(args.device) - began)
    return {"seconds": seconds[1:], "loss": losses, "gib": peak.gib, "total_gib": peak.total_gib}


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    runs = {kind: [] for kind in KINDS}
    for _ in range(args.repeat):
        for kind, results in runs.items():
            results.append(child(__file__, argv or sys.argv[1:], "--only", kind))
            print(kind, results[-1], flush=True)
    losses = [runs[kind][0]["loss"] for kind in ("ours", "trl")]
    apart = max(abs(a - b) for a, b in zip(*losses))
    print(f"check: the losses of {len(losses[0])} steps differ by {apart:.1e} at most")
    assert apart < (1e-4 if args.dtype == "float32" else 0.05) and len(set(losses[0])) > 1, losses
    summary = {}
    for kind, results in runs.items():
        seconds = [value for r in results for value in r["seconds"]]
        summary[kind] = {"seconds": spread(seconds)}
        summary[kind].update((key, spread([r[key] for r in results])) for key in ("gib", "total_gib"))
        for key, unit in (("seconds", "s a step"), ("gib", "GiB above the model"), ("total_gib", "GiB in all")):
            show(kind, summary[kind][key], unit)
    for kind in KINDS[1:]:
        for key in ("seconds", "gib", "total_gib"):
            ratio = summary[kind][f"{key}_ratio"] = summary[kind][key]["median"] / summary["ours"][key]["median"]
            print(f"{kind:12} {key:9} {ratio:.2f} times ours")
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
