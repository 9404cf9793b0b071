"""Arguments of the Trainer that psa can not follow."""

from __future__ import annotations

from typing import Any

from psa_store.errors import UsageError


def refuse(trainer: Any) -> None:
    """Raise UsageError for the first argument that psa can not follow, with what to do instead."""
    args = trainer.args
    refused = {
        "fp16=True": args.fp16 and "gradients of float16 need a scaler: use bf16=True",
        "deepspeed": args.deepspeed and "psa shards the optimizer itself: leave it out",
        "fsdp": args.fsdp and "psa shards the optimizer itself: leave it out",
        "auto_find_batch_size=True": args.auto_find_batch_size and "the batch size belongs to the job: say it",
        "train_sampling_strategy='batch_rebalance'": str(args.train_sampling_strategy) == "batch_rebalance"
        and "it shares samples out among processes, which psa does; use 'group_by_length' or 'random'",
        "push_to_hub=True": args.push_to_hub and "push what save_model wrote, after training",
        f"{args.world_size} processes": args.world_size > 1
        and "torchrun's process group is not used: start the script with `psa run --workers N`",
        f"{args.n_gpu} GPUs in one process": args.n_gpu > 1
        and "start one worker a GPU, and let it see one: CUDA_VISIBLE_DEVICES",
    }
    for what, why in refused.items():
        if why:
            raise UsageError(f"PsaTrainer: {what}: {why}")
