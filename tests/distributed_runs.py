"""torchrun --nproc_per_node K tests/distributed_runs.py FOLDER: the runs that test_distributed.py looks at, in
FOLDER/<name>; without torchrun, the same in one process."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import evaluate  # noqa: E402
import finetune  # noqa: E402
import train_classifier  # noqa: E402
from sevloss import device  # noqa: E402

COMMON = "--data table.jsonl --lr 1e-3 --batch-size 5 --micro-tokens 90 --dtype fp32 --preprocess none"
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
RUNS = {
    "first step": "--ckpt gpt2 --max-steps 1",
    "full": "--ckpt gpt2 --max-steps 12",
    "two rows a step": "--ckpt gpt2 --max-steps 6 --batch-size 2",
    "fp16, one row a step": "--ckpt gpt2 --max-steps 4 --batch-size 1 --dtype fp16",
    "tokens": "--ckpt gpt2 --max-steps 4 --normalise token --weighting strong",
    "lora": "--ckpt llama --max-steps 12 --lora 4",
    "sharded": "--ckpt gpt2 --max-steps 12 --shard",
    "sharded bf16": "--ckpt llama --max-steps 2 --dtype bf16 --shard",
    "sharded lora": "--ckpt llama --max-steps 12 --lora 4 --shard",
    "killed": "--ckpt gpt2 --max-steps 12 --save-every 4 --resume",
}


def main():
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        if name == "killed" and FIRST_ATTEMPT:
            kill_after(6)
        sys.argv = ["finetune.py", *COMMON.split(), *RUNS[name].split(), "--out", str(folder / name)]
        finetune.main()
    if "full" in names:
        other_scripts(folder)


def kill_after(steps):
    """Rank 1 is killed in the step after these."""
    seeded = device.seed_everything

    def seed_everything(seed, step=0, rank=0):
        if rank == 1 and step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        seeded(seed, step, rank)
    device.seed_everything = seed_everything


def other_scripts(folder):
    sys.argv = ["train_classifier.py", "--data", "table.jsonl", "--epochs", "2", "--batch-size", "7", "--annotate",
                "posts.jsonl", "--to", str(folder / "annotated.jsonl"), "--out", str(folder / "classifier")]
    train_classifier.main()
    sys.argv = ["evaluate.py", str(folder / "full"), "--max-new-tokens", "8", "--temperature", "0.8", "--bertscore",
                str(folder / "classifier"), "--bertscore-layer", "1"]
    evaluate.main()


if __name__ == "__main__":
    main()
