"""What the training loops of dpo.py and kd.py share: FSDP2, micro-batches, optimizer step, checkpoints, saving."""

import contextlib
import functools
import gc
import json
import math
import os
import resource
import shutil
import signal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lib import decode, models, runs
from lib.runs import DTYPES, UserError, one_line

# ---------------------------------------------------------------------------------------------------------------------
# FSDP2 and the optimizer
# ---------------------------------------------------------------------------------------------------------------------


def decoder_blocks(lm):
    """The list of transformer blocks of a Hugging Face causal language model."""
    lists = (m for m in lm.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    return next(m for m in lists if len(m) == lm.config.num_hidden_layers)


def load_trainable(path, args, tokenizer):
    """A language model to train: float32 parameters, no dropout, activations checkpointed if so asked."""
    # On the CPU: fully_shard moves each shard to its GPU
    lm = models.load_model(path, torch.float32, "cpu", args.trust_remote_code)
    models.check_vocabulary(lm, tokenizer, path)
    if args.activation_checkpointing:
        for block in decoder_blocks(lm):  # by torch: transformers has renamed its own switch
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return lm


def shard(root, lm, dtype, world):
    """FSDP2: shards each block of `lm`, then `root`, the module whose forward calls all of `lm`, lm_head included.

    Parameters stay float32 (an update of 5e-7 would be lost in bfloat16); blocks compute in `dtype`, gradients are
    reduced in float32. FSDP averages gradients over ranks: a loss that is already normalised by the whole step's counts
    has to be multiplied by `World.size` before its backward.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in decoder_blocks(lm):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(root, mesh=mesh, mp_policy=policy)


def shard_blocks(lm, world):
    """For a teacher that does not fit: shards the blocks alone, so that embeddings and lm_head can be called freely.

    All ranks must then take equally many forwards; `decode.decode` does, given `World.any`.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in decoder_blocks(lm):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # by default a block that is a root stays gathered
    return lm.to(world.device)


def load_teacher(args, world, tokenizer):
    """The teacher, frozen: a replica on every rank, or with --shard-teacher spread over all."""
    if args.shard_teacher:
        return shard_blocks(models.load_frozen(args.teacher, args, world, tokenizer, "cpu"), world)
    return models.load_frozen(args.teacher, args, world, tokenizer)


@functools.lru_cache(maxsize=1)
def epoch_order(epoch, count, seed):
    """A seeded permutation of range(count), int64."""
    index = torch.arange(count)
    fields = torch.full_like(index, epoch), torch.zeros_like(index), index
    return decode.uniform_noise(seed, decode.ORDER_STAGE, *fields).argsort()


def batch_of_step(step, count, batch_size, seed):
    """Indices of the examples of step `step` (from 0): a permutation an epoch, whose last batch may be short."""
    epoch, position = divmod(step, math.ceil(count / batch_size))
    return epoch_order(epoch, count, seed)[position * batch_size : (position + 1) * batch_size].tolist()


def micro_batches(indices, lengths, micro_batch_size, world):
    """This rank's share of a global batch, in micro-batches; every rank gets equally many, some perhaps empty.

    Indices are dealt out in order of length, so that rows of similar length meet and ranks finish together.
    """
    indices = sorted(indices, key=lambda i: (lengths[i], i))
    count = math.ceil(math.ceil(len(indices) / world.size) / micro_batch_size)
    mine = indices[world.rank :: world.size]
    return [mine[k * micro_batch_size : (k + 1) * micro_batch_size] for k in range(count)]


def learning_rate(step, total_steps, args):
    """Of step `step` (from 0): linear warm-up over --lr-warmup-ratio of the steps, then cosine to --lr-final-ratio."""
    warmup_steps = math.ceil(args.lr_warmup_ratio * total_steps)
    if step < warmup_steps:
        return args.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return args.lr * (args.lr_final_ratio + (1 - args.lr_final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, args):
    """AdamW as the flags say."""
    betas = tuple(args.adam_betas)
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=betas, weight_decay=args.weight_decay)


def optimizer_step(model, optimizer, lr, max_grad_norm):
    """Clips, steps, clears the gradients. Returns the gradient's norm before clipping, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        return norm  # the caller stops the run; nothing has been changed
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(metrics, prompt_ids, out):
    """Raises UserError if the step's loss or gradient norm is not a number; the weights have not been touched by it."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {metrics['step']}"
        todo = "lower --lr or use --dtype float32; the last checkpoint is kept"
        raise UserError(f"{what}, prompts {prompt_ids}", f"in {out}", todo)


def speed(tokens, seconds, world):
    """Logged with every step: tokens a second over all ranks, and this rank's peak memory so far in GB."""
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    return {"seconds": seconds, "tokens": int(tokens), "tokens_per_second": tokens / seconds, "peak_memory_gb": peak}


def release_memory():
    """Frees models that nothing refers to any more. FSDP's modules are in cycles, which take two collections."""
    gc.collect()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGTERM and Ctrl-C do not end the process: they add their number to the list that is yielded.

    The loop finishes its step, writes a checkpoint and raises `runs.Stopped`.
    """
    received = []
    handlers = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser, lr):
    """Flags of every training loop."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=runs.ABOVE_0, default=lr, help="peak learning rate of AdamW")
    group.add_argument("--lr-warmup-ratio", type=runs.SHARE, default=0.03, help="share of the steps with a rising rate")
    group.add_argument("--lr-final-ratio", type=runs.SHARE, default=0.1, help="the cosine ends at this share of --lr")
    beta = runs.ranged(float, lambda x: 0 <= x < 1, "from 0 to below 1")
    group.add_argument("--adam-betas", type=beta, nargs=2, default=[0.9, 0.95], help="decay of AdamW's averages")
    group.add_argument("--weight-decay", type=runs.NOT_NEGATIVE, default=0.0, help="AdamW's decoupled weight decay")
    group.add_argument("--max-grad-norm", type=runs.ABOVE_0, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--epochs", type=runs.COUNT, default=1, help="passes over the data")
    group.add_argument("--max-steps", type=runs.LIMIT, default=0, help="optimizer steps; 0: as --epochs says")
    group.add_argument("--batch-size", type=runs.COUNT, default=64, help="examples a step, over all ranks")
    group.add_argument("--micro-batch-size", type=runs.COUNT, default=4, help="examples in one forward")
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--save-every", type=runs.COUNT, default=100, help="steps from one checkpoint to the next")
    dtype_help = "of OUT/student; bfloat16 halves it and rounds most of a small learning rate's updates away"
    group.add_argument("--save-dtype", choices=list(DTYPES), default="float32", help=dtype_help)


def accumulation_steps(args, world):
    """How many micro-batches make each rank's share of the global batch. Raises UserError if that is no whole number."""
    share, rest = divmod(args.batch_size, world.size)
    if rest or share % min(args.micro_batch_size, share):
        what = f"--batch-size {args.batch_size} does not divide over {world.size} processes"
        what += f" with micro-batches of {args.micro_batch_size}"
        raise UserError(what, "on the command line", "give a multiple of processes x --micro-batch-size")
    return share // min(args.micro_batch_size, share)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the trained model
# ---------------------------------------------------------------------------------------------------------------------


def training_state(model, optimizer):
    """The tensors of a checkpoint by name: weights, sharded, and what AdamW keeps of each. Its settings come from the flags."""
    tensors = {}
    for name, weight in model.named_parameters():  # tied ones once
        kept = optimizer.state[weight]
        if not kept:  # before the first step
            kept.update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        tensors.update({name: weight.detach(), **{f"{name}.{key}": value for key, value in kept.items()}})
    return tensors


def save_checkpoint(folder, model, optimizer, step, world):
    """Writes folder/step-000123, whole or not at all; older ones are then deleted.

    Each rank writes its shards as safetensors (torch.distributed.checkpoint): nothing in it is a pickle. files.json,
    written last, has every file's size, since a missing shard would otherwise go unnoticed.
    """
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that failed
        partial.mkdir(parents=True)
    world.barrier()
    tensors = training_state(model, optimizer)
    # The writer holds two copies of a file in memory: 16 tensors a file
    files = {name: 1 + number // 16 for number, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True, fqn_to_index_mapping=files)
    dcp.save(tensors, storage_writer=writer)
    world.barrier()
    if world.rank == 0:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        runs.write_json(partial / "files.json", sizes)
        os.rename(partial, final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    world.barrier()


def load_checkpoint(folder, model, optimizer, world):
    """Loads the newest checkpoint in `folder`, of any number of processes. Returns its step, 0 without one.

    Raises UserError if a file of it is missing or cut.
    """
    newest = world.first(lambda: max(folder.glob("step-*"), default=None))
    if newest is None:
        return 0
    try:
        for name, size in runs.read_json(newest / "files.json").items():
            if (newest / name).stat().st_size != size:
                raise ValueError(f"{name} is cut")
        dcp.load(training_state(model, optimizer), storage_reader=HuggingFaceStorageReader(str(newest)))  # in place
    except (OSError, ValueError, AttributeError, CheckpointException) as error:
        todo = "delete it, and training starts again from the initial student"
        raise UserError(f"the checkpoint is damaged ({one_line(error)})", f"in {newest}", todo)
    step = int(newest.name.removeprefix("step-"))
    if world.rank == 0:
        print(f"checkpoint: continues after step {step}")
    return step


def save_model(folder, root, lm, tokenizer, dtype, world):
    """Gathers the sharded `root` and writes `lm` and tokenizer as a Hugging Face folder in `dtype`, whole or not at all."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(root, options=options)
    if world.rank == 0:
        prefix = next(name for name, module in root.named_modules() if module is lm) + "."
        state = {key.removeprefix(prefix): value.to(dtype) for key, value in state.items()}
        for tied in lm.all_tied_weights_keys:  # gathered twice; from_pretrained ties them again
            state.pop(tied, None)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        lm.save_pretrained(partial, state_dict=state)
        lm.config.dtype = dtype  # save_pretrained has written that of the parameters
        lm.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    world.barrier()


def open_metrics(path, step, world):
    """Cuts metrics.jsonl back to `step`: a killed run may have logged steps after its last checkpoint. Returns path."""
    if world.rank == 0 and path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]  # a line that a kill has cut is dropped, too
        try:
            rows = [row for row in map(json.loads, whole.splitlines()) if row["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            what = "repair or delete it: it is a record for readers, training continues without it"
            raise UserError(f"the file is damaged ({one_line(error)})", f"in {path}", what)
        runs.write_jsonl(path, rows)
    return path
