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
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from lib import decode, models, runs
from lib.runs import DTYPES, UserError

# ---------------------------------------------------------------------------------------------------------------------
# FSDP2 and the optimizer
# ---------------------------------------------------------------------------------------------------------------------


def load_trainable(path, args, tokenizer, world):
    """A language model to train, on the CPU: float32 parameters, no dropout, activations checkpointed if so asked.

    Rank 0 alone reads the weights, which `shard` hands out: host memory holds one float32 copy, and not one a rank.
    """
    if world.rank == 0:
        lm = models.load_model(path, torch.float32, "cpu", args.trust_remote_code)
        models.check_model(lm, tokenizer, path)
    else:
        lm = models.empty_model(path, torch.float32, args.trust_remote_code)
    if args.activation_checkpointing:
        for block in models.decoder_blocks(lm):  # by torch: transformers has renamed its own switch
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return lm


@torch.no_grad()
def shard(root, lm, dtype, world, shard_size=0):
    """FSDP2: shards each block of `lm`, then `root`, the module whose forward calls all of `lm`, lm_head included.

    shard_size: processes that share one copy of the weights, such as those of a node; 0: all. All get rank 0's weights.
    Parameters stay float32 (an update of 5e-7 would be lost in bfloat16); blocks compute in `dtype`, gradients are
    reduced in float32. FSDP averages gradients over ranks: a loss that is already normalised by the whole step's counts
    has to be multiplied by `World.size` before its backward.
    """
    size = shard_size or world.size
    mesh = init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if size == world.size else mesh
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = dict(lm.named_parameters())
    for block in models.decoder_blocks(lm):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    if world.size > 1:
        for name, parameter in lm.named_parameters():  # tied ones once
            values = distribute_tensor(whole.pop(name).to(world.device), mesh, parameter.placements)
            parameter.to_local().copy_(values.to_local())
        for buffer in lm.buffers():
            dist.broadcast(buffer, src=0)
    return root


def shard_blocks(lm, world):
    """For a teacher that does not fit: shards the blocks alone, so that embeddings and lm_head can be called freely.

    All ranks must then take equally many forwards; `decode.decode` does, given `World.any`.
    """
    mesh, blocks = init_device_mesh(world.device.type, (world.size,)), models.decoder_blocks(lm)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # One root for all of them, which has no parameters of its own: blocks that are roots have a CUDA stream each
    inside = set(blocks.parameters())
    fully_shard(lm.base_model, mesh=mesh, ignored_params={p for p in lm.parameters() if p not in inside})
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
    """This rank's share of a global batch: a list of (indices of a micro-batch, weight 1.0), equally long on every rank.

    Indices are dealt out in order of length, so that rows of similar length meet and ranks finish together. A rank that
    has none left takes part in FSDP's collectives with an example of weight 0.0.
    """
    indices = sorted(indices, key=lambda i: (lengths[i], i))
    count = math.ceil(math.ceil(len(indices) / world.size) / micro_batch_size)
    mine = indices[world.rank :: world.size]
    parts = [mine[k * micro_batch_size : (k + 1) * micro_batch_size] for k in range(count)]
    return [(part, 1.0) if part else (indices[:1], 0.0) for part in parts]


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


def optimizer_step(model, optimizer, step, total_steps, args):
    """Clips, steps, clears the gradients. Returns "grad_norm", before clipping, over all ranks, and "lr"."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    lr = learning_rate(step, total_steps, args)
    if math.isfinite(norm):  # otherwise `log_step` stops the run, and nothing has been changed
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "lr": lr}


def log_step(out, metrics, prompt_ids, tokens, started, world):
    """Adds a step's metrics, with its speed and this rank's peak memory so far, to OUT/metrics.jsonl.

    tokens: computed by all ranks, since `started`. Raises UserError if the loss or the gradient norm is not finite.
    """
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {metrics['step']}"
        todo = "lower --lr or use --dtype float32; the last checkpoint is kept"
        raise UserError(f"{what}, prompts {prompt_ids}", f"in {out}", todo)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - started
    metrics |= {"seconds": seconds, "tokens": int(tokens), "tokens_per_second": tokens / seconds}
    if world.rank == 0:
        runs.append_jsonl(out / "metrics.jsonl", metrics | {"peak_memory_gb": peak / 1e9})


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
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=runs.ABOVE_0, default=lr, help="peak learning rate of AdamW")
    add("--lr-warmup-ratio", type=runs.SHARE, default=0.03, help="share of the steps with a rising rate")
    add("--lr-final-ratio", type=runs.SHARE, default=0.1, help="the cosine ends at this share of --lr")
    beta = runs.ranged(float, lambda x: 0 <= x < 1, "from 0 to below 1")
    add("--adam-betas", type=beta, nargs=2, default=[0.9, 0.95], help="decay of AdamW's averages")
    add("--weight-decay", type=runs.NOT_NEGATIVE, default=0.0, help="AdamW's decoupled weight decay")
    add("--max-grad-norm", type=runs.ABOVE_0, default=1.0, help="gradients are clipped to this norm")
    add("--epochs", type=runs.COUNT, default=1, help="passes over the data")
    add("--max-steps", type=runs.LIMIT, default=0, help="optimizer steps; 0: as --epochs says")
    add("--batch-size", type=runs.COUNT, default=64, help="examples a step, over all ranks")
    add("--micro-batch-size", type=runs.COUNT, default=4, help="examples in one forward")
    processes = max(1, runs.from_environment("WORLD_SIZE", 1))
    divides = lambda x: x >= 0 and not (x and processes % x)
    divisor = runs.ranged(int, divides, f"0 or a divisor of {processes} processes")
    add("--shard-size", type=divisor, default=0, help="processes that share a copy of the trained weights; 0: all")
    add("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    add("--save-every", type=runs.COUNT, default=100, help="steps from one checkpoint to the next")
    add("--save-students", type=runs.LIMIT, default=0, help="equally spaced copies on the way: OUT/students")
    add("--save-dtype", choices=list(DTYPES), default="float32", help="of OUT/student; bfloat16 is rounded")


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


def checkpoints(folder):
    """The checkpoints in a folder, sorted by step."""
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return [folder / f"step-{step:06d}" for step in sorted(steps)]


def is_trained(out):
    """Whether OUT/student, which `save_model` writes last, is there; then it is said. For `World.first`."""
    there = any((out / "student").glob("*.safetensors"))
    if there:
        print(f"training: {out / 'student'} was there already")
    return there


def save_checkpoint(folder, model, optimizer, step, world):
    """Writes folder/step-000123, whole or not at all; older ones are then deleted.

    Each rank writes its shards as safetensors (torch.distributed.checkpoint): nothing in it is a pickle. files.json,
    written last, says of which run and step it is, and each file's fingerprint: a missing shard would go unnoticed.
    """
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    if world.rank == 0:
        for failed in folder.glob(".step-*.partial"):
            shutil.rmtree(failed)
        partial.mkdir(parents=True)
    world.barrier()
    tensors = training_state(model, optimizer)
    # The writer holds two copies of a file in memory: 16 tensors a file
    files = {name: 1 + number // 16 for number, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True, fqn_to_index_mapping=files)
    dcp.save(tensors, storage_writer=writer)
    world.barrier()
    if world.rank == 0:
        files = {file.name: runs.fingerprint(file) for file in sorted(partial.iterdir())}
        runs.write_json(partial / "files.json", {"key": runs.run_key(folder.parent), "step": step, "files": files})
        os.rename(partial, final)
        for old in checkpoints(folder)[:-1]:
            shutil.rmtree(old)
    world.barrier()


def load_checkpoint(folder, model, optimizer, world):
    """Loads the newest checkpoint in `folder`, of any number of processes. Returns its step, 0 without one.

    Raises UserError if it is of another run, or a file of it is missing or changed.
    """
    newest = world.first(lambda: checkpoints(folder)[-1] if checkpoints(folder) else None)
    if newest is None:
        return 0
    step, todo = int(newest.name[5:]), "delete it, and training starts again from the initial student"
    with runs.reading("the checkpoint is damaged", f"in {newest}", todo):
        made = runs.read_json(newest / "files.json")
        if (made["key"], made["step"]) != (runs.run_key(folder.parent), step):
            raise ValueError("it is of another run or step")
        for name, content in made["files"].items():
            if runs.fingerprint(newest / name) != content:
                raise ValueError(f"{name} is missing, cut or changed")
        dcp.load(training_state(model, optimizer), storage_reader=HuggingFaceStorageReader(str(newest)))  # in place
    world.print(f"checkpoint: continues after step {step}")
    return step


def save_model(folder, lm, tokenizer, dtype, world):
    """Gathers the sharded `lm` and writes it and its tokenizer as a Hugging Face folder in `dtype`, whole or not at all."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(lm, options=options)
    if world.rank == 0:
        state = {key: value.to(dtype) for key, value in state.items()}
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError("the trained weights are NaN or infinite", f"for {folder}", "lower --lr or --weight-decay")
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


def begin(stage, count, unit, model, args, out, world):
    """AdamW, the number of steps over `count` examples, and a progress bar over those that the newest checkpoint leaves."""
    optimizer = make_optimizer(model, args)
    first_step = load_checkpoint(out / "checkpoint", model, optimizer, world)
    world.first(lambda: cut_metrics(out / "metrics.jsonl", first_step))
    total_steps = (args.max_steps or args.epochs * math.ceil(count / args.batch_size)) if count else 0
    world.print(f"{stage}: {count} {unit}, {total_steps} steps of {args.batch_size}")
    options = {"total": total_steps, "initial": first_step, "unit": "step"}
    bar = runs.progress(range(first_step, total_steps), desc=stage, world=world, **options)
    return optimizer, total_steps, bar


def end_step(args, step, total_steps, out, root, optimizer, tokenizer, stop, world):
    """Writes what is due after `step`, from 1: a student on the way, a checkpoint. stop: the signals received so far.

    The students of --save-students N are those at k/(N+1) of all steps, rounded up; each is written before the step's
    checkpoint: then a killed run takes a step whose student is missing again. Raises `runs.Stopped` after a signal.
    """
    passed, before = (n * (args.save_students + 1) // total_steps for n in (step, step - 1))
    folder = out / "students" / f"step-{step:06d}"
    if before < passed <= args.save_students and not world.first(folder.exists):
        save_model(folder, root.lm, tokenizer, DTYPES[args.save_dtype], world)
    stopped = world.any(stop)
    if stopped or step % args.save_every == 0 or step == total_steps:
        save_checkpoint(out / "checkpoint", root, optimizer, step, world)
    if stopped:
        raise runs.Stopped(f"stopped after step {step}, whose checkpoint is written: the same command continues")


def cut_metrics(path, step):
    """Cuts metrics.jsonl back to `step`: a killed run may have logged steps after its last checkpoint."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]  # a line that a kill has cut is dropped, too
        with runs.reading("the file is damaged", f"in {path}", "delete it: training continues without it"):
            rows = [row for row in map(json.loads, whole.splitlines()) if row["step"] <= step]
        runs.write_jsonl(path, rows)
