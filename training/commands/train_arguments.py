"""The options of `train` on the command line."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from training.commands.arguments import add_switch, adder, between, count, names, whole
from training.data.data_source import data_source

TrainMethod = Literal["medusa", "medusa2", "mtp"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
Sharding = Literal["none", "fsdp"]
# At the peak, by method.
LEARNING_RATES: Mapping[TrainMethod, float] = {
    "medusa": 2e-3,
    "medusa2": 1e-4,
    "mtp": 1e-3,
}
# Of `lora_targets`: all linear layers but the unembedding.
ALL_LINEAR = "all-linear"


def add_train(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add the options of `train`, all but those of the base model, with the defaults of a type."""
    add, default = adder(parser, options)
    add(
        "data",
        type=data_source,
        action="append",
        metavar="FILE",
        help="distilled or other answers (.gz) or hf:NAME#SPLIT; repeatable",
    )
    add("output", type=Path, metavar="DIR", help="run and heads; an unfinished run goes on")
    add("limit", type=count, metavar="N", help="conversations, from the beginning of the data")
    add("method", choices=get_args(TrainMethod), help="what to train; see docs/training.md")
    add("init-heads", type=Path, metavar="DIR", help="medusa, medusa2: heads to begin with")
    add("num-heads", type=count, metavar="K", help="medusa*: draft heads, hence the largest depth")
    add("num-blocks", type=count, metavar="N", help="medusa*: residual blocks per head")
    add("num-depths", type=count, metavar="K", help="mtp: depths to unroll")
    add("draft-vocab-size", type=whole, metavar="N", help="tokens to draft from; 0 is all")
    add("epochs", type=count, metavar="N", help="passes over the examples")
    add("batch-size", type=count, metavar="N", help="medusa*: examples per step, all processes")
    add("batch-tokens", type=count, metavar="N", help="mtp: tokens per step, prompts included")
    add("gradient-accumulation", type=count, metavar="N", help="parts of a process's share of it")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    add("learning-rate", type=between(0.0, 1.0), metavar="LR", help=f"at its peak; else {rates}")
    add("root-rate-factor", type=between(0.0, 1000.0), metavar="F", help="medusa*: of root maps")
    add("warmup-fraction", type=between(0.0, 1.0), metavar="F", help="share of the steps")
    add("weight-decay", type=between(0.0, 1.0), metavar="W", help="of AdamW")
    add("max-grad-norm", type=between(0.0, 1e6), metavar="N", help="clip gradients; 0 is off")
    add("mixed-precision", choices=get_args(MixedPrecision), help="of the products")
    add("sharding", choices=get_args(Sharding), help="fsdp: spread the base over the processes")
    add("head-decay", type=between(0.0, 1.0), metavar="L", help="weight of depth k is L ** k")
    add("kl-weight", type=between(0.0, 1.0), metavar="W", help="medusa, mtp: of KL to the base")
    add("held-out", type=between(0.0, 0.5), metavar="F", help="share of conversations to measure")
    add("early-stopping", type=whole, metavar="N", help="end after N measurements none better")
    add("validation-interval", type=count, metavar="N", help="steps between measurements for it")
    add("save-interval", type=count, metavar="N", help="steps between saved states")
    add("log-interval", type=count, metavar="N", help="steps between lines of metrics")
    add("tensorboard", type=Path, metavar="DIR", help="write the metrics for TensorBoard too")
    add("seed", type=whole, metavar="S", help="of the order of the examples")
    add_switch(
        parser,
        "root-conditioned",
        default["root_conditioned"],
        "medusa*: heads see the root",
    )
    add_switch(parser, "cache", default["cache"], "keep all hidden states in memory")
    add("warmup-epochs", type=count, metavar="N", help="medusa2: of fresh heads alone")
    add("lora-rank", type=count, metavar="R", help="medusa2: of the adapter")
    add("lora-targets", type=names, metavar="NAME,NAME", help="medusa2: layers to adapt")
    add("lora-learning-rate", type=between(0.0, 1.0), metavar="LR", help="medusa2: at its peak")
    add("divergence-weight", type=between(0.0, 1e6), metavar="W", help="medusa2: keeps the base")
    parser.add_argument("--overwrite", action="store_true", help="drop what DIR holds")
