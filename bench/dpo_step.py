"""A DPO step on splice pairs: dpo.py (a pair is one row) beside TRL's DPOTrainer, seconds and peak memory.

    pip install -r bench/requirements.txt
    python bench/dpo_step.py                        random models, 6 layers of SmolLM2-135M's shape

Each run is a process of its own, the kinds in turn, on the same weights and pairs, float32, from the same (random)
reference log-probs. A step is: collate, loss, gradient, clip, AdamW. Kinds:

    ours           collate_pairs, PairModel, dpo_loss, without FSDP
    trl            DPOTrainer's collator and training_step, reference log-probs precomputed, no activation checkpointing:
                   the fastest settings it has for this
    trl-default    its defaults: activation checkpointing, and a reference model that runs in every step

Step 0 warms up; the losses of all steps must agree between ours and trl to 1e-4 (trl-default has another reference).
Seconds are of the process's CPU time, memory is the peak of the resident size above that before the first step, and
all of it (total), model and optimizer included. The last line is JSON.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
from kd_memory import resident_gib
from transformers import LlamaConfig, LlamaForCausalLM

# kd_memory.py has put the project on the path
import dpo
import training

BETA, LR = 0.1, 1e-5
KINDS = ("ours", "trl", "trl-default")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt")
    parser.add_argument("--prefix", type=int, default=40, help="tokens that both responses share, y_<t*")
    parser.add_argument("--suffix", type=int, default=100, help="tokens of each response from t* on")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process")
    parser.add_argument("--repeat", type=int, default=1, help="processes of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=KINDS, help="one process of one kind, as JSON")
    return parser.parse_args(argv)


def make_model(args):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_pairs(args):
    """Random pairs after a splice, and reference log-probs: what a uniform model gives, with noise."""
    draw = lambda n: torch.randint(3, args.vocab, (n,)).tolist()
    pairs = []
    for _ in range(args.pairs):
        prefix = draw(args.prefix)
        chosen, rejected = prefix + draw(args.suffix), prefix + draw(args.suffix)
        pairs.append({"prompt_ids": draw(args.prompt), "chosen_ids": chosen, "rejected_ids": rejected})
    uniform = -(args.prefix + args.suffix) * torch.log(torch.tensor(float(args.vocab)))
    return pairs, uniform + 3 * torch.randn(args.pairs, 2)


def our_loss(args, pairs, reference):
    """(model, a function that runs forward and backward and returns the loss)."""
    model = dpo.PairModel(make_model(args), args.vocab)

    def step():
        sums = model(**dpo.collate_pairs(pairs, 0, False, "cpu"))
        chosen, rejected = dpo.response_logps(sums, None, False)
        loss = dpo.dpo_loss(chosen, rejected, reference[:, 0], reference[:, 1], BETA)[0].mean()
        loss.backward()
        return loss.item()

    return model, step


def trl_loss(args, pairs, reference, defaults):
    """The same by TRL. The trainer is built on one line of text, then given our token ids through its own collator."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", ACCELERATE_USE_CPU="true")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import toy

    logging.disable(logging.WARNING)
    fast = {} if defaults else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    config = DPOConfig(
        tempfile.mkdtemp(),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=args.pairs,
        report_to=[],
        disable_tqdm=True,
        **fast,
    )
    trainer = DPOTrainer(
        make_model(args),
        ref_model=make_model(args) if defaults else None,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1", "chosen": "2", "rejected": "3"}]),
        processing_class=toy.make_tokenizer(),
    )
    model = trainer.model
    if not defaults:
        values = zip(pairs, reference.tolist())
        pairs = [{**pair, "ref_chosen_logps": c, "ref_rejected_logps": r} for pair, (c, r) in values]
    if defaults and trainer.args.gradient_checkpointing:  # Trainer.train does this
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = 1  # and this

    def step():
        return trainer.training_step(model, trainer.data_collator(pairs)).item()

    return model, step


def measure(args):
    """Runs the steps of one kind; returns seconds and loss of each, and memory."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    pairs, reference = make_pairs(args)
    if args.only == "ours":
        model, step = our_loss(args, pairs, reference)
    else:
        model, step = trl_loss(args, pairs, reference, defaults=args.only == "trl-default")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    start, peak, done = resident_gib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    losses, seconds = [], []
    for _ in range(args.steps + 1):
        began = time.process_time()
        losses.append(step())
        training.optimizer_step(model, optimizer, LR, 1.0)
        seconds.append(time.process_time() - began)
    done.set()
    watcher.join()
    return {"seconds": seconds[1:], "loss": losses, "gib": peak[0] - start, "total_gib": peak[0]}


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    runs = {kind: [] for kind in KINDS}
    for _ in range(args.repeat):
        for kind, results in runs.items():
            command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--only", kind]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(kind, results[-1], flush=True)
    losses = [runs[kind][0]["loss"] for kind in ("ours", "trl")]
    apart = max(abs(a - b) for a, b in zip(*losses))
    print(f"check: the losses of {len(losses[0])} steps differ by {apart:.1e} at most")
    assert apart < 1e-4 and len(set(losses[0])) > 1, losses
    summary = {}
    for kind, results in runs.items():
        seconds = [value for r in results for value in r["seconds"]]
        summary[kind] = {
            "seconds": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)],
            "gib": statistics.median(r["gib"] for r in results),
            "total_gib": statistics.median(r["total_gib"] for r in results),
        }
        print(
            f"{kind:12} {min(seconds):6.2f} {summary[kind]['seconds']:6.2f} {max(seconds):6.2f}  s a step, min median max;"
            f"  {summary[kind]['gib']:.2f} GiB above the model, {summary[kind]['total_gib']:.2f} GiB in all"
        )
    for kind in KINDS[1:]:
        for key in ("seconds", "gib", "total_gib"):
            summary[kind][f"{key}_ratio"] = summary[kind][key] / summary["ours"][key]
            print(f"{kind:12} {key:9} {summary[kind][f'{key}_ratio']:.2f} times ours")
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
