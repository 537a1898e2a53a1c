"""Sizes that recipes share: decoders in Llama's shape, and the training on one GPU and on a slice of 64 TPU v5e chips.

A recipe takes them over by ``dataclasses.replace`` and changes what its experiment is about. Models are named by their
number of parameters.
"""

from dataclasses import replace

from efftrain.models.config import llama
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.optimizers import AdamW

llama_30m = llama(
    vocab_size=4096,
    d_model=448,
    n_layers=12,
    n_heads=7,
    d_ff=1216,
    max_length=2048,
    tied_embedding=True,
    dtype="bfloat16",
)
llama_125m = llama(
    vocab_size=4096,
    d_model=768,
    n_layers=16,
    n_heads=12,
    d_ff=2304,
    max_length=2048,
    tied_embedding=True,
    dtype="bfloat16",
)
llama_300m = llama(
    vocab_size=4096,
    d_model=1024,
    n_layers=24,
    n_heads=16,
    d_ff=2752,
    max_length=2048,
    tied_embedding=True,
    dtype="bfloat16",
)
llama_1b = llama(
    vocab_size=4096,
    d_model=2048,
    n_layers=20,
    n_heads=16,
    n_kv_heads=8,
    d_ff=5632,
    max_length=2048,
    dtype="bfloat16",
    scan=True,
    remat="full",
)
llama_3b = llama(
    vocab_size=4096,
    d_model=2560,
    n_layers=40,
    n_heads=20,
    n_kv_heads=10,
    d_ff=6912,
    max_length=2048,
    dtype="bfloat16",
    scan=True,
    remat="full",
)

gpu_training = Training(  # 0.7 B tokens
    steps=5000,
    batch_size=64,
    length=2048,
    optimizer=AdamW(peak_lr=1.5e-3),
    eval_every=500,
    checkpoint_every=500,
)
v5e_64_training = replace(  # 21 B tokens
    gpu_training,
    steps=20_000,
    batch_size=512,
    optimizer=AdamW(peak_lr=6e-4),
    mesh=MeshConfig(replica=-1, fsdp=16),  # split 64 ways, XLA sends half as much again (tests/bench/scaling.py)
)
