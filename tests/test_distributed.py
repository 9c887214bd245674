"""Several processes, for real: gloo on the CPU, FSDP2. The number of processes changes no result, nor does a kill.

One launch of workers.py does all jobs with 0 (no RANK), 2, 3 and 8 processes; the tests read their folders.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_identical, launch_jobs, logged, weights
from safetensors.torch import load_file
from test_dpo import two_row_loss
from transformers import AutoModelForCausalLM
from workers import free_port

from lib import runs, training

SHARED = "--batch-size 6 --micro-batch-size 1 --threads 1 --device cpu"
# 14 prompts in 4 micro-batches, 6 prompts of the closing table: 8 processes have too few of both. 24 divides by 1, 2, 3
# and 8: one step an epoch of 10 pairs or 14 examples, and most of 8 ranks have one or none
PAIRS = "--samples 4 --max-new-tokens 10 --prompts-per-batch 4 --limit 14 --eta 1.5 --eval-limit 6"
PAIRS += " --max-steps 1 --batch-size 24"
TURNS = "--samples 1 --max-new-tokens 6 --prompts-per-batch 1 --limit 7 --eta 4 --eval-limit 0 --max-steps 1"
# 10 pairs, 6 of them a step: 6 steps, three checkpoints, students after 2 and 4 steps
TRAIN = "--epochs 3 --lr 1e-3 --save-every 2 --save-students 2"
EIGHT = "--batch-size 24 --epochs 4 --lr 1e-3"
KD = "--mode teacher --loss reverse_kl --max-new-tokens 12 --prompts-per-batch 3 --limit 14 --eval-limit 0 --save-every 2"
# 13 examples, 6 a step: the third step's one leaves a rank without an example. The teacher writes 5 files of responses of
# unlike lengths, the last one on one rank alone
KD_SHORT = "--limit 13 --max-steps 3 --max-new-tokens 40 --prompts-per-batch 3"
KD_MODES = {
    "kd-teacher": "--mode teacher --teacher-decoding sample",
    "kd-student": "--mode student --on-policy 0.6",
    "kd-cache": "--teacher-top-k 5",
}
# name -> policy, reference, number of pairs, flags. Steps are of 6 + 1 or 6 + 4 pairs: ranks without a pair, or with
# fewer micro-batches than others. --micro-batch-size 1 accumulates (6 times with one process), 6 does not
GRADIENTS = {
    "sum": ("student", "teacher", 7, "--micro-batch-size 1 --label-smoothing 0.1"),
    "nll": ("student", "teacher", 10, "--micro-batch-size 6 --nll-weight 0.5"),
    "mean": ("teacher", "student", 10, "--micro-batch-size 1 --logprobs mean"),
    "checkpointed": ("student", "teacher", 7, "--micro-batch-size 1 --label-smoothing 0.1 --activation-checkpointing"),
}
TWINS = {"nll": {"nll_weight": 0.5}, "mean": {"average": True}}  # the same for the slow twin
APPEND, STOPPED = "lib.runs.append_jsonl", 128 + signal.SIGTERM
# Where a training run is killed, one after the other; each time it is started again. (function, words in its arguments)
DEATHS = [
    ("os.replace", "pairs.arrow"),  # the pairs are written, not yet renamed
    (APPEND, "'step': 2,"),  # before any checkpoint
    ("os.rename", "students/step-000002"),  # a student on the way is written, not yet renamed
    ("lib.training.HuggingFaceStorageWriter", "step-000002"),  # on rank 1; rank 0 begins to write
    ("os.rename", "checkpoint/step-000002"),  # the checkpoint is written, not yet renamed
    (APPEND, "'step': 4,"),  # one step after a checkpoint
    ("os.rename", "checkpoint/step-000004"),
    ("shutil.rmtree", "checkpoint/step-000002"),  # two checkpoints are there
    ("os.rename", "broken/student "),  # the model is written, not yet renamed
]


def make_pairs(count):
    """Random pairs of unequal lengths: nothing shared, some tokens shared, one response the beginning of the other."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda low, high: torch.randint(3, 16, (int(torch.randint(low, high, (), generator=draw)),), generator=draw)
    pairs = []
    for i in range(count):
        prompt, shared, chosen, rejected = (ids(*span).tolist() for span in ((1, 9), (0, 5), (1, 12), (1, 12)))
        shared, chosen = ([] if i % 4 == 0 else shared), (shared + [5] if i % 4 == 1 else chosen)
        rejected = chosen + rejected if i % 4 == 1 else rejected
        pairs.append({"prompt_ids": prompt, "chosen_ids": shared + chosen, "rejected_ids": shared + rejected})
    return pairs


class Jobs:
    """The jobs by the name of their folder, which several can share, and what became of them."""

    def __init__(self, root, models, prompts_file):
        self.root, self.models, self.prompts_file = root, models, prompts_file
        for count in (7, 10):
            runs.write_jsonl(root / f"pairs-{count}.jsonl", make_pairs(count))
        self.jobs = list(self.plan())
        for name, job in self.jobs:
            job["argv"] += ["--out", str(root / name)]
        self.codes, self.printed = launch_jobs(root / "jobs", [job for _, job in self.jobs])

    def method(self, name, processes, flags, main="warmup_distill", **extra):
        """A job of warmup_distill.py or kd.py."""
        argv = ["--teacher", self.models["teacher"], "--student", self.models["student"]]
        argv += ["--data", str(self.prompts_file), *f"--template none --lr 1e-3 {SHARED} {flags}".split()]
        return name, {"main": main, "argv": argv, "processes": processes, **extra}

    def dpo(self, name, processes, flags=TRAIN, policy="student", reference="student", count=10, **extra):
        """A job of dpo.py; `at`, `call`, ...: what makes it die."""
        argv = ["--model", self.models[policy], "--reference", self.models[reference]]
        argv += ["--pairs", str(self.root / f"pairs-{count}.jsonl"), *f"{SHARED} {flags}".split()]
        return name, {"main": "dpo", "argv": argv, "processes": processes, **extra}

    def plan(self):
        for n in (0, 2, 3, 8):
            yield self.method(f"pairs-{n}", n, PAIRS)
        for n in (0, 3, 8):
            yield self.method(f"eight-kd-{n}", n, f"{KD} {EIGHT}", "kd")
        for n in (0, 8):
            yield self.dpo(f"eight-{n}", n, EIGHT)
        for n in (0, 2):
            for name, flags in KD_MODES.items():
                flags += (
                    f" --teacher-cache {self.root}/cache-{n}" if name == "kd-cache" else " --shard-teacher" * (n == 2)
                )
                yield self.method(f"{name}-{n}", n, f"{KD_SHORT} {flags}", "kd")
        yield self.dpo("train-4", 4, f"{TRAIN} --shard-size 2", die={"at": APPEND, "call": "'step': 5,"})
        yield self.dpo("train-4", 4, f"{TRAIN} --shard-size 2")
        for n in (0, 2, 3):
            yield self.dpo(f"train-{n}", n)
            for name, (policy, reference, count, flags) in GRADIENTS.items():
                yield self.dpo(f"{name}-{n}", n, flags, policy, reference, count, record=True)
        yield self.dpo("bfloat16", 2, TRAIN + " --dtype bfloat16")
        for n in (2, 3):
            yield self.method(f"turns-{n}", n, TURNS)
            yield self.method(f"turns-sharded-{n}", n, TURNS + " --shard-teacher")
        yield self.method("no-pair", 2, TURNS + " --shard-teacher --eta 100")
        # Begun with 2 processes, continued with 1, ended with 3
        yield self.dpo("chain", 2, die={"at": APPEND, "call": "'step': 3,"})
        yield self.dpo("chain", 0, die={"at": APPEND, "call": "'step': 5,"})
        yield self.dpo("chain", 3)
        # Rank 0 alone is told to stop, at steps that are none of --save-every
        for step, number in ((3, signal.SIGTERM), (5, signal.SIGINT)):
            yield self.dpo("stopped", 2, die={"at": APPEND, "call": f"'step': {step},", "signal": int(number)})
        yield self.dpo("stopped", 2)
        for at, call in DEATHS:
            yield self.dpo("broken", 2, die={"at": at, "call": call, "rank": int(at.endswith("Writer"))})
        yield self.dpo("broken", 2)
        for file in ("pairs/00001.jsonl", "pairs/00003.jsonl", "/mismatch.json"):
            yield self.method("pairs-broken", 2, PAIRS, die={"at": "os.replace", "call": file})
        yield self.method("pairs-broken", 2, PAIRS)

    def out(self, name):
        """A folder, after a look at the exit statuses of all who worked in it."""
        for (folder, job), codes, printed in zip(self.jobs, self.codes, self.printed, strict=True):
            if folder != name:
                continue
            if "die" in job and "signal" not in job["die"]:
                assert -signal.SIGKILL in codes and 0 not in codes, printed
            else:
                assert set(codes) == {STOPPED if "die" in job else 0}, printed
        return self.root / name

    def said(self, name):
        """What all jobs of a folder have printed."""
        return "".join(printed for (folder, _), printed in zip(self.jobs, self.printed) if folder == name)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, pair_of_models, prompts_file):
    return Jobs(tmp_path_factory.mktemp("distributed"), pair_of_models, prompts_file)


def distance(a, b):
    """|a - b| / |b| over all tensors of two dicts."""
    assert a.keys() == b.keys()
    square = lambda values: sum(v.double().square().sum().item() for v in values)
    return (square(a[k] - b[k] for k in b) / square(b.values())) ** 0.5


def files_of(out, *patterns):
    """The files that must not depend on processes or kills: name -> bytes."""
    return {str(f.relative_to(out)): f.read_bytes() for pattern in patterns for f in out.glob(pattern)}


def pair_files(out):
    return files_of(out, "pairs.jsonl", "mismatch.json", "pairs/*.jsonl")


def assert_same_training(ours, alone, models, steps):
    """Losses, and what is added to the student's weights, to float32 rounding."""
    assert [row["step"] for row in logged(alone)] == list(range(1, steps + 1))
    for row, expected in zip(logged(ours), logged(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    start = load_file(models["student"] + "/model.safetensors")
    update, expected = ({k: w[k] - start[k] for k in start} for w in (weights(ours), weights(alone)))
    assert all(v.abs().max() > 1e-4 for v in expected.values())
    assert distance(update, expected) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The number of processes changes nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8])
def test_pairs_and_closing_table(jobs, n):
    """Pairs are the same bytes in all their files; the table but for rounding."""
    ours, alone = jobs.out(f"pairs-{n}"), jobs.out("pairs-0")
    assert len(pair_files(alone)) == 6 and pair_files(alone)["pairs.jsonl"].count(b"\n") > 10
    assert pair_files(ours) == pair_files(alone)
    ours, alone = (runs.read_json(out / "summary.json") for out in (ours, alone))
    for name in ("teacher", "student before", "student after"):
        assert ours[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def plain(pair_of_models):
    """name -> for each step: the loss and gradients of two rows a pair in float64, nothing sharded."""
    result = {name: [] for name in GRADIENTS}
    for name, (policy, reference, count, _) in GRADIENTS.items():
        lm, fixed = (AutoModelForCausalLM.from_pretrained(pair_of_models[m]).double() for m in (policy, reference))
        pairs, batches = make_pairs(count), [training.batch_of_step(step, count, 6, 0) for step in range(2)]
        assert sorted(batches[0] + batches[1]) == list(range(count))
        for batch in batches:
            loss = two_row_loss(lm, fixed, [pairs[i] for i in batch], **TWINS.get(name, {"label_smoothing": 0.1}))
            loss.backward()
            result[name].append((loss.item(), {key: p.grad for key, p in lm.named_parameters()}))
            lm.zero_grad()
    return result


@pytest.mark.parametrize("n", [0, 2, 3])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_plain_loop(jobs, plain, name, n):
    """What reaches the optimizer, before clipping: relative 1e-5 in every tensor, whatever the ranks had to do."""
    out = jobs.out(f"{name}-{n}")
    steps = torch.load(out / "gradients.pt")
    assert len(steps) == len(plain[name]) == 2
    for step, row, (loss, expected) in zip(steps, logged(out), plain[name]):
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert {key.removeprefix("lm.") for key in step} == expected.keys()
        for key, gradient in expected.items():
            assert distance({key: step["lm." + key].double()}, {key: gradient}) < 1e-5, key


@pytest.mark.parametrize(
    "name, n, steps",
    [*(("train", n, 6) for n in (2, 3, 4)), ("eight", 8, 4), ("eight-kd", 3, 4), ("eight-kd", 8, 4)]
    + [(name, 2, 3) for name in KD_MODES],
)
def test_training_does_not_depend_on_processes(jobs, pair_of_models, name, n, steps):
    """In DPO and KD; most of 8 ranks have one example of a step, or none. The teacher's responses are the same bytes.

    4 processes hold two copies of the weights, in shards of half a copy, and are killed once.
    """
    ours, alone = jobs.out(f"{name}-{n}"), jobs.out(f"{name}-0")
    assert_same_training(ours, alone, pair_of_models, steps)
    responses = files_of(alone, "responses/0*")
    assert files_of(ours, "responses/0*") == responses and len(responses) == 5 * (name in ("eight-kd", "kd-teacher"))
    if name == "kd-cache":
        caches = [files_of(jobs.root / f"cache-{k}", "*.safetensors") for k in (0, n)]
        assert caches[0] == caches[1] and len(caches[0]) == 5


def test_bfloat16(jobs):
    """The policy computes in bfloat16, 8 bits of mantissa; weights and reductions stay in float32."""
    out = jobs.out("bfloat16")
    for row, expected in zip(logged(out), logged(jobs.out("train-2")), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.03)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert all(v.dtype == torch.float32 for v in weights(out).values())


@pytest.mark.parametrize("n", [2, 3])
def test_sharded_teacher(jobs, n):
    """Same tokens, log-probs to 1e-4: also in turns where a rank has no mismatch, or (the last) no micro-batch."""
    ours, usual = (
        [runs.read_jsonl(file) for file in sorted(jobs.out(f"{name}-{n}").glob("pairs/*.jsonl"))]
        for name in ("turns-sharded", "turns")
    )
    touched = [any(r["t_star"] >= 0 for r in batch) for batch in usual]
    turns = [touched[k : k + n] for k in range(0, len(touched), n)]
    assert any(any(turn) and not all(turn) for turn in turns[:-1]) and len(turns[-1]) < n and touched[-1]
    for batch, expected in zip(ours, usual, strict=True):
        for a, b in zip(batch, expected, strict=True):
            assert a.keys() == b.keys()
            for key in b:
                assert a[key] == (pytest.approx(b[key], abs=1.1e-4) if "logprobs" in key else b[key])


def test_no_pair_at_all(jobs, pair_of_models):
    """No rank has a mismatch in any turn: no hang, no pair, and the student comes out as it went in."""
    out = jobs.out("no-pair")
    assert (out / "pairs.jsonl").read_text() == ""
    assert distance(weights(out), load_file(pair_of_models["student"] + "/model.safetensors")) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Killed, told to stop, started again
# ---------------------------------------------------------------------------------------------------------------------


def test_killed_runs_end_as_if_unbroken(jobs):
    """Training is killed in nine places, sampling in three, and started again each time."""
    assert_identical(jobs.out("broken"), jobs.out("train-2"))
    students = files_of(jobs.out("broken"), "students/*/*")
    assert students == files_of(jobs.out("train-2"), "students/*/*") and len(students) >= 8
    assert pair_files(jobs.out("pairs-broken")) == pair_files(jobs.out("pairs-0"))


def test_resume_with_two_then_one_then_three_processes(jobs, pair_of_models):
    assert_same_training(jobs.out("chain"), jobs.out("train-3"), pair_of_models, 6)
    assert "continues after step 4" in jobs.said("chain")


def test_stopped_training_ends_as_if_unbroken(jobs):
    """SIGTERM in step 3, Ctrl-C in step 5, to rank 0 alone: all ranks write a checkpoint and leave together."""
    assert_identical(jobs.out("stopped"), jobs.out("train-2"))
    for step in (3, 5):
        assert f"stopped after step {step}, whose checkpoint is written" in jobs.said("stopped")


def test_two_nodes(jobs, tmp_path):
    """The README's command for two machines, on one: two torchrun agents that meet on loopback. Bit for bit the files and
    weights of two processes that were forked."""
    readme = re.search(r"torchrun (--nnodes 2 .*?) warmup_distill.py", (ROOT / "README.md").read_text(), re.DOTALL)
    words = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 1", readme[1])
    words = words.replace("HOST:29500", f"localhost:{free_port()}").split()
    argv = [str(ROOT / "warmup_distill.py"), *jobs.method("", 2, PAIRS)[1]["argv"], "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        agents = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for _ in range(2)]
    try:
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert pair_files(tmp_path / "out") == pair_files(jobs.out("pairs-2"))
    assert_identical(tmp_path / "out", jobs.out("pairs-2"))
