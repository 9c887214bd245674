"""lm_head and KD loss over chunks (kd.ChunkedHeadLoss) beside the dense computation, TRL's and Liger Kernel's.

    python experiments/bench/kd_loss.py                                        forward KL, 512 tokens
    python experiments/bench/kd_loss.py --loss jsd --tokens 2048

All start from the same random hidden states and two heads of Qwen2.5's vocabulary. Kinds: `ours`, kd.ChunkedHeadLoss
with kd.total_loss, which computes cross-entropy to log it as kd.py does; `dense`, the same loss on all logits at
once; `trl-dense`, GKDTrainer.generalized_jsd_loss on all logits (float32, as in `dense`); `trl-chunked`, what
DistillationTrainer has (tiles of the vocabulary); `liger`, its fused linear JSD through torch.compile. The last three
have jsd and its limits forward_kl and reverse_kl. A first step warms up and compiles, the
second is timed, of the third the memory is counted. 512 tokens are one chunk of ours, 2,048 are three. Checked, to 1e-3:
the loss and the norms of its gradients.
"""

import torch
import torch.nn.functional as F
from harness import Stages, compare, make_parser

import kd
from lib import decode, runs

PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896, help="that of Qwen2.5-0.5B")
    parser.add_argument("--loss", choices=list(kd.LOSSES), default="forward_kl")
    return parser.parse_args(argv)


def peer_loss(args, *tensors):
    """The mean over tokens of a peer's divergence. tensors: hidden, weight, those of the teacher, targets."""
    hidden, weight, teacher_hidden, teacher_weight, targets = tensors
    beta = PEER_BETA[args.loss]
    if args.kind == "liger":
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
        return loss(hidden, weight, teacher_hidden, teacher_weight, targets)
    if args.kind == "trl-chunked":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = hidden, weight, None, teacher_hidden, teacher_weight, None
        return ChunkedDivergenceFunction.apply(*heads, beta)[0].mean()
    from trl.experimental.gkd import GKDTrainer

    logits = F.linear(hidden, weight).float(), F.linear(teacher_hidden, teacher_weight).float()
    return GKDTrainer.generalized_jsd_loss(*logits, beta=beta, reduction="sum") / len(hidden)


def mean_loss(args, hidden, weight, teacher_hidden, teacher_weight, targets):
    """The loss of `args.kind`, ready for backward. hidden: (M, D); weight: (V, D); targets: (M,)."""
    teacher = lambda part: F.linear(teacher_hidden[part], teacher_weight)
    options = kd.LOSSES[args.loss], 1.0, 1.0  # kd_rate, temperature
    if args.kind == "ours":

        def chunk_losses(part):
            p_logits = teacher(part)
            return lambda logits, rows: kd.total_loss(logits, p_logits[rows].float(), targets[part][rows], *options)

        chunk = 4 * decode.head_chunk(len(weight))  # as in kd.KDModel
        return kd.ChunkedHeadLoss.apply(hidden, weight, None, chunk_losses, chunk)[0] / len(hidden)
    logits, teacher_logits = F.linear(hidden, weight).float(), teacher(slice(None)).float()
    return kd.total_loss(logits, teacher_logits, targets, *options)[0].mean()


def measure(args):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(args.device, runs.DTYPES[args.dtype])
    hidden, weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    teacher_hidden, teacher_weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    targets = torch.randint(args.vocab, (args.tokens,)).to(args.device)
    hidden.requires_grad_(), weight.requires_grad_()
    way, stages = mean_loss if args.kind in ("ours", "dense") else peer_loss, Stages(args.device)

    def step():
        hidden.grad = weight.grad = None
        loss = way(args, hidden, weight, teacher_hidden, teacher_weight, targets)
        loss.backward()
        return loss.item()

    step()
    loss = stages("step", step)
    stages.memory("memory", step)
    norms = [values.grad.float().norm().item() for values in (hidden, weight)]
    return stages.result(loss=loss, gradient_norms=norms)


def main(argv=None):
    args = parse_args(argv)
    kinds = ["ours", "dense", *(["liger", "trl-dense", "trl-chunked"] if args.loss in PEER_BETA else [])]
    return compare(__file__, argv, args, measure, kinds, rtol=1e-3, atol=0)


if __name__ == "__main__":
    runs.run(main)
