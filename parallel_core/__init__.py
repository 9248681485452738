"""parallel_core: Megatron-style parallel training for MindSpore in PyNative mode."""

import os

__version__ = "0.1.0"

# MindSpore reads it when it is imported: errors alone; its warnings are about its own interfaces.
os.environ.setdefault("GLOG_v", "3")
