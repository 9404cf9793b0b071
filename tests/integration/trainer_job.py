"""A script for PsaTrainer, with small random models: GPT-2, T5, BERT, and GPT-2 with LoRA."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WORDS = 61


class Texts(Dataset[dict[str, Any]]):
    """Sequences of unlike length; what a model is given as labels depends on its kind."""

    def __init__(self, kind: str, count: int) -> None:
        draw = torch.Generator().manual_seed(5)
        self._kind = kind
        self._rows = [
            torch.randint(1, WORDS, (int(torch.randint(4, 12, (), generator=draw)),), generator=draw)
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {"input_ids": row, "labels": row.sum() % 3 if self._kind == "bert" else row.clone()}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    rows = [sample["input_ids"] for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    labels = [sample["labels"] for sample in samples]
    if labels[0].dim():
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    else:
        batch["labels"] = torch.stack(labels)
    return batch


def make_model(kind: str, dropout: bool = True) -> torch.nn.Module:
    torch.manual_seed(1)
    model = _new_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float) and not dropout:
            module.dropout = 0.0  # T5's attention
    return model


def _new_model(kind: str) -> torch.nn.Module:
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=3, **sizes))
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    if kind != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0")


class Dies(TrainerCallback):  # type: ignore[misc]
    """Kill this process in a step, or in saving one, once over all processes; say what is logged."""

    def __init__(self, at: int, note: Path | None) -> None:
        self._at = at
        self._note = note

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._note is not None and state.global_step == self._at and not self._note.exists():
            self._note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"logged {state.global_step} {logs['loss']:.6f} {logs['learning_rate']:.6g}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job")
    options.add_argument("--kind", default="gpt2")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--die-at", type=int, default=-1)
    options.add_argument("--note", type=Path)
    options.add_argument("--resume", default=None)
    options.add_argument("--patience", type=int)
    options.add_argument("--no-dropout", action="store_true")
    options.add_argument("--count", type=int, default=50, help="samples to train with")
    options.add_argument("--plain", action="store_true", help="transformers' own Trainer, in this process")
    options.add_argument("more", nargs="*", help="name=value of TrainingArguments")
    args = options.parse_args()
    torch.set_num_threads(1)
    more = {name: _value(value) for name, _, value in (each.partition("=") for each in args.more)}
    base = {
        "output_dir": str(args.out),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    arguments = TrainingArguments(**{**base, **more})
    kind = Trainer
    own: dict[str, Any] = {}
    if not args.plain:
        from psa_store.integrations.transformers import PsaTrainer

        kind, own = PsaTrainer, {"job": args.job}
    callbacks = [Dies(args.die_at, args.note)]
    if args.patience is not None:
        callbacks.append(EarlyStoppingCallback(args.patience))
    trainer = kind(
        model=make_model(args.kind, not args.no_dropout),
        args=arguments,
        data_collator=collate,
        processing_class=make_tokenizer(),
        train_dataset=Texts(args.kind, args.count),
        eval_dataset=Texts(args.kind, 9),
        callbacks=callbacks,
        **own,
    )
    done = trainer.train(resume_from_checkpoint=True if args.resume == "True" else args.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"done {done.global_step} {done.training_loss:.6f} best {trainer.state.best_metric}", flush=True)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


if __name__ == "__main__":
    main()
