#!/usr/bin/env python3
"""Pretrain a GPT model with Megatron-Core; `--moe-backend xmoe` computes its Mixture-of-Experts layers with X-MoE.

torchrun --nproc-per-node 2 pretrain_xmoe.py --moe-backend xmoe <the Megatron arguments you already have>
"""

import sys
import time

PROGRAM_START = time.time()

if __name__ == "__main__":
    from megatron_xmoe.training.main import main

    sys.exit(main(PROGRAM_START))
