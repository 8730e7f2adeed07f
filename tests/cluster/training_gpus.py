"""Submitted to a cluster: what the job train takes for training.device=auto there, and the GPUs its processes are given.

    spark-submit training_gpus.py FILE PROCESSES

FILE gets {"device": ..., "visible": [CUDA_VISIBLE_DEVICES of each process, by rank]}.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from jobs.runtime.spark.session import start_session
from jobs.train import device_of_processes, on_executors


def visible() -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process of the group."""
    dist.init_process_group("gloo")
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    dist.destroy_process_group()
    return found


def main(file: Path, processes: int) -> None:
    """See above."""
    spark = start_session("training GPUs")
    device = device_of_processes("auto", processes, spark)
    file.write_text(json.dumps({"device": device, "visible": on_executors(spark, processes, device, visible)}))
    spark.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
