"""A DPO step on splice pairs: dpo.py (a pair is one row) beside TRL's DPOTrainer.

    pip install -r experiments/bench/requirements.txt
    python experiments/bench/dpo_step.py                                        6 layers of SmolLM2-135M's shape
    python experiments/bench/dpo_step.py --shape qwen2.5-0.5b --dtype bfloat16 --device cuda

All start from the same weights, pairs and (random) reference log-probs. A step is: collate, loss, gradient, clip,
AdamW. TRL runs with its fastest settings for this: precomputed reference log-probs, no activation checkpointing. On a
CPU it sends prompts and padding through its head, too: `trl`; `trl-compact` is made to take label positions alone, as on
a GPU. In bfloat16 ours is under FSDP, which keeps float32 weights, and TRL computes under autocast. Not the same in both:
TRL's step has the sums that it logs, ours has not those of dpo.py (`batch_loss`), nor FSDP in float32. The first step
measures memory. Checked: the losses of all steps, to 1e-4 (in bfloat16 to 0.05).
"""

import tempfile
from types import SimpleNamespace

import torch
from harness import ROOT, Stages, compare, make_parser, random_model

import dpo
from lib import models, runs, training

BETA, LR = 0.1, 1e-5
SCHEDULE = SimpleNamespace(lr=LR, lr_warmup_ratio=0, lr_final_ratio=1, max_grad_norm=1)


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-6-layers")
    parser.add_argument("--pairs", type=int, default=8)
    parts = "tokens of the prompt, of y_<t*, which both responses share, and of each response from t* on"
    parser.add_argument("--lengths", type=int, nargs=3, default=[100, 40, 100], help=parts)
    return parser.parse_args(argv)


def draw_pairs(count, vocab_size, prompt, prefix, suffix):
    """Random pairs after a splice."""
    draw = lambda n: torch.randint(3, vocab_size, (n,)).tolist()
    pairs = []
    for _ in range(count):
        shared = draw(prefix)
        chosen, rejected = shared + draw(suffix), shared + draw(suffix)
        pairs.append({"prompt_ids": draw(prompt), "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def our_model(lm, args):
    """PairModel; in bfloat16 under FSDP, which keeps float32 weights and computes in --dtype."""
    model = dpo.PairModel(lm, lm.config.vocab_size)
    if args.dtype == "bfloat16":
        world = runs.start_processes(args.device, args.threads)
        model = training.shard(model, lm, runs.DTYPES[args.dtype], world)
    return model.to(args.device)


def our_step(model, part, reference=None, share=1.0):
    """Forward and backward over one micro-batch, `share` of the step's pairs; returns the loss.

    reference: (B, 2) chosen and rejected log-probs; None: the policy's own, from a forward of its own.
    """
    rows = dpo.collate_pairs(part, 0, False, model.lm.device)
    if reference is None:
        with torch.no_grad():
            reference = torch.stack(dpo.response_logps(model(**rows), None, False), -1)
    policy = dpo.response_logps(model(**rows), None, False)
    loss = share * dpo.dpo_loss(*policy, *reference.to(model.lm.device).T, BETA)[0].mean()
    loss.backward()
    return loss.item()


def trl_trainer(lm, reference_lm, args, batch_size):
    """TRL's trainer, built on one line of text; it is then given our token ids through its own collator.

    reference_lm: the reference model, which runs in every step; None: the pairs bring their reference log-probs.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    # In that module it only decides which positions the head takes: on a CPU all of them
    trl.trainer.utils._use_triton = lambda device: args.kind != "trl"
    machine = {"bf16": args.dtype == "bfloat16", "use_cpu": args.device == "cpu", "gradient_checkpointing": False}
    work = {"per_device_train_batch_size": batch_size, "precompute_ref_log_probs": reference_lm is None}
    config = DPOConfig(tempfile.mkdtemp(), beta=BETA, report_to=[], disable_tqdm=True, **machine, **work)
    data = Dataset.from_list([{"prompt": "1+1", "chosen": "2", "rejected": "3"}])
    tokenizer = models.load_tokenizer(ROOT / "toy/student")
    trainer = DPOTrainer(lm, ref_model=reference_lm, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # as Trainer.train does
    return trainer


def trl_step(trainer, pairs, reference=None):
    """As `our_step`, by DPOTrainer's collator and training_step; reference: None for a trainer that has a model."""
    if reference is not None:
        columns = zip(pairs, reference.tolist())
        pairs = [{**pair, "ref_chosen_logps": c, "ref_rejected_logps": r} for pair, (c, r) in columns]
    return trainer.training_step(trainer.model, trainer.data_collator(pairs)).item()


def measure(args):
    lm, losses = random_model(args, dtype=torch.float32, std=0.02), []
    torch.manual_seed(1)
    pairs = draw_pairs(args.pairs, lm.config.vocab_size, *args.lengths)
    reference = 3 * torch.randn(args.pairs, 2)  # only the difference of the two counts
    if args.kind == "ours":
        model = our_model(lm, args)
    else:
        trainer = trl_trainer(lm, None, args, args.pairs)
        model = trainer.model
    optimizer, stages = torch.optim.AdamW(model.parameters(), lr=LR), Stages(args.device)

    def step():
        losses.append(our_step(model, pairs, reference) if args.kind == "ours" else trl_step(trainer, pairs, reference))
        training.optimizer_step(model, optimizer, 0, 1, SCHEDULE)

    stages.memory("memory", step)
    for name in ("step 1", "step 2"):
        stages(name, step)
    assert len(set(losses)) > 1, "nothing is learnt"
    return stages.result(losses=losses)


def main(argv=None):
    args = parse_args(argv)
    tolerance = {"rtol": 0, "atol": 1e-4 if args.dtype == "float32" else 0.05}
    return compare(__file__, argv, args, measure, ["ours", "trl-compact", "trl"], **tolerance)


if __name__ == "__main__":
    runs.run(main)
