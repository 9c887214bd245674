"""lm_head and KD loss over chunks (kd.ChunkedHeadLoss) beside the dense computation and TRL's.

    python experiments/bench/kd_loss.py                                        forward KL + CE, 2,048 tokens; 12 GiB
    python experiments/bench/kd_loss.py --loss jsd --kd-rate 1 --tokens 512    a divergence alone, beside TRL's
    python experiments/bench/kd_loss.py --device cuda --tokens 8192

All start from the same random hidden states and two heads of Qwen2.5's vocabulary. Kinds: `ours`, kd.ChunkedHeadLoss;
`dense`, the same loss on all logits at once; `trl`, GKDTrainer.generalized_jsd_loss on all logits (float32, as in the
other two), which has jsd and its limits forward_kl and reverse_kl, without cross-entropy. Checked, to 1e-3: the loss and
the norms of its gradients.
"""

import torch
import torch.nn.functional as F
from harness import Stages, compare, make_parser

import kd
from lib import decode, runs

TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896, help="that of Qwen2.5-0.5B")
    parser.add_argument("--loss", choices=list(kd.LOSSES), default="forward_kl")
    parser.add_argument("--kd-rate", type=float, default=0.5, help="1: the divergence alone, without cross-entropy")
    return parser.parse_args(argv)


def token_losses(args, logits, teacher_logits, targets):
    """Losses a token, (M,): a tuple, the first of which is differentiated."""
    if args.kd_rate == 1:
        return (kd.LOSSES[args.loss](logits, teacher_logits),)
    return kd.total_loss(logits, teacher_logits, targets, kd.LOSSES[args.loss], args.kd_rate, temperature=1.0)


def trl_loss(name, logits, teacher_logits):
    """The mean over tokens of TRL's divergence."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=TRL_BETA[name], reduction="sum")
    return loss / len(logits)


def mean_loss(args, hidden, weight, teacher_hidden, teacher_weight, targets):
    """The loss of `args.kind`, ready for backward. hidden: (M, D); weight: (V, D); targets: (M,)."""
    teacher = lambda part: F.linear(teacher_hidden[part], teacher_weight)
    if args.kind == "ours":

        def chunk_losses(part):
            p_logits = teacher(part)
            return lambda logits, rows: token_losses(args, logits, p_logits[rows].float(), targets[part][rows])

        chunk = 2 * decode.head_chunk(len(weight))  # as in kd.KDModel
        return kd.ChunkedHeadLoss.apply(hidden, weight, None, chunk_losses, chunk)[0] / len(hidden)
    logits, teacher_logits = F.linear(hidden, weight).float(), teacher(slice(None)).float()
    if args.kind == "dense":
        return token_losses(args, logits, teacher_logits, targets)[0].mean()
    return trl_loss(args.loss, logits, teacher_logits)


def measure(args):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(args.device, runs.DTYPES[args.dtype])
    hidden, weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    teacher_hidden, teacher_weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    targets = torch.randint(args.vocab, (args.tokens,)).to(args.device)
    hidden.requires_grad_(), weight.requires_grad_()
    if args.kind == "trl":
        trl_loss(args.loss, torch.zeros(1, 2), torch.zeros(1, 2))  # its import is no part of the time

    def step():
        loss = mean_loss(args, hidden, weight, teacher_hidden, teacher_weight, targets)
        loss.backward()
        return loss.item()

    stages = Stages(args.device)
    loss = stages(args.loss, step)
    norms = [values.grad.float().norm().item() for values in (hidden, weight)]
    return stages.result(loss=loss, gradient_norms=norms)


def main(argv=None):
    args = parse_args(argv)
    kinds = ["ours", "dense"] + ["trl"] * (args.loss in TRL_BETA and args.kd_rate == 1)
    return compare(__file__, argv, args, measure, kinds, rel_tol=1e-3)


if __name__ == "__main__":
    runs.run(main)
