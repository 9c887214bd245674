"""lm_head and KD loss over chunks (kd.ChunkedHeadLoss) beside the dense computation and TRL's: seconds, memory, gradients.

    python bench/kd_memory.py --dtype bfloat16 --repeat 3               forward KL + CE, 2,048 tokens; dense needs 12 GiB
    python bench/kd_memory.py --loss all --kd-rate 1 --tokens 512       each divergence alone, beside TRL where it has it
    python bench/kd_memory.py --device cuda --tokens 8192

Each run is a process of its own, the kinds in turn, on the same random inputs: hidden states and two heads of Qwen2.5's
151,936-entry vocabulary. Kinds:

    chunked        kd.ChunkedHeadLoss
    dense          the same loss on all logits at once
    trl            GKDTrainer.generalized_jsd_loss on all logits (float32, as in the other two): jsd, and its two limits,
                   forward_kl and reverse_kl; with --kd-rate 1, since it has no cross-entropy

Memory is the peak above the inputs. Loss and gradient norms must agree to 1e-3. The last line is JSON.
"""

import argparse
import functools
import json

import torch
import torch.nn.functional as F
from harness import DTYPES, PeakMemory, add_arguments, child, clock, show, spread

# harness.py has put the project on the path
import decode
import kd

TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896, help="that of Qwen2.5-0.5B")
    parser.add_argument("--loss", choices=["all", *kd.LOSSES], nargs="+", default=["forward_kl"])
    parser.add_argument("--kd-rate", type=float, default=0.5, help="1: the divergence alone, without cross-entropy")
    parser.add_argument("--only", choices=["chunked", "dense", "trl"], help="one run of one kind, as JSON")
    return parser.parse_args(argv)


def token_losses(name, kd_rate):
    """(student logits, teacher logits, targets) -> a tuple of losses a token, the first of which is differentiated."""
    if kd_rate == 1:
        return lambda student, teacher, targets: (kd.LOSSES[name](student, teacher),)
    return functools.partial(kd.total_loss, divergence=kd.LOSSES[name], kd_rate=kd_rate, temperature=1.0)


def trl_loss(name, logits, teacher_logits):
    """The mean over tokens of TRL's divergence."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=TRL_BETA[name], reduction="sum")
    return loss / len(logits)


def mean_loss(kind, name, kd_rate, hidden, weight, teacher_hidden, teacher_weight, targets):
    """The loss of one kind, ready for backward."""
    loss_of = token_losses(name, kd_rate)
    if kind == "chunked":
        chunk_loss = lambda logits, part: loss_of(
            logits, F.linear(teacher_hidden[part], teacher_weight).float(), targets[part]
        )
        chunk = 2 * decode.head_chunk(len(weight))  # as in kd.KDModel
        return kd.ChunkedHeadLoss.apply(hidden, weight, None, chunk_loss, chunk)[0] / len(hidden)
    logits, teacher_logits = F.linear(hidden, weight).float(), F.linear(teacher_hidden, teacher_weight).float()
    if kind == "dense":
        return loss_of(logits, teacher_logits, targets)[0].mean()
    return trl_loss(name, logits, teacher_logits)


def measure(args):
    """One forward and backward; returns {"seconds", "gib", "loss", "grad_hidden", "grad_weight"}, the latter two norms."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(args.device, DTYPES[args.dtype])
    hidden, weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    teacher_hidden, teacher_weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    targets = torch.randint(args.vocab, (args.tokens,)).to(args.device)
    hidden.requires_grad_(), weight.requires_grad_()
    if args.only == "trl":
        trl_loss(args.loss[0], torch.zeros(1, 2), torch.zeros(1, 2))  # its import is no part of the time
    with PeakMemory(args.device) as peak:
        began = clock(args.device)
        inputs = (hidden, weight, teacher_hidden, teacher_weight, targets)
        loss = mean_loss(args.only, args.loss[0], args.kd_rate, *inputs)
        loss.backward()
        seconds = clock(args.device) - began
    norms = {"grad_hidden": hidden.grad.float().norm().item(), "grad_weight": weight.grad.float().norm().item()}
    return {"seconds": seconds, "gib": peak.gib, "loss": loss.item(), **norms}


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    flags = {name: value for name, value in vars(args).items() if name not in ("loss", "only", "repeat")}
    flags = [part for name, value in flags.items() for part in ("--" + name.replace("_", "-"), str(value))]
    summary = {}
    for name in list(kd.LOSSES) if "all" in args.loss else args.loss:
        kinds = ["chunked", "dense"] + ["trl"] * (name in TRL_BETA and args.kd_rate == 1)
        runs = {kind: [] for kind in kinds}
        for _ in range(args.repeat):
            for kind in kinds:
                runs[kind].append(child(__file__, flags, "--loss", name, "--only", kind))
        for kind in kinds[1:]:
            for key in ("loss", "grad_hidden", "grad_weight"):
                ours, theirs = runs["chunked"][0][key], runs[kind][0][key]
                assert abs(ours - theirs) <= 1e-3 * abs(theirs), f"{name} {key}: {ours} chunked, {theirs} {kind}"
        summary[name] = {kind: {} for kind in kinds}
        for key, unit in (("seconds", "s"), ("gib", "GiB")):
            for kind in kinds:
                result = summary[name][kind][key] = spread([r[key] for r in runs[kind]])
                show(f"{name} {kind}", result, unit)
                if kind != "chunked":
                    result["ratio"] = result["median"] / max(summary[name]["chunked"][key]["median"], 1e-9)
                    print(f"{name} {kind} {key}: {result['ratio']:.2f} times ours", flush=True)
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
