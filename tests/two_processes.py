"Two processes with gloo, and DataParallel's replicas, on the CPU"

import os
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.vision.all import nn


def in_two(task, folder, *args, limit=120):
    "What `task(rank, *args)` returns in each of two processes; a failure or a hang in one fails the test"
    ctx = mp.get_context('fork')  # spawned ones would import fastai anew
    procs = [ctx.Process(target=run_as, args=(rank, task, str(folder), args)) for rank in range(2)]
    for p in procs:
        p.start()
    end = time.time() + limit
    while any(p.is_alive() for p in procs) and time.time() < end and not any(p.exitcode for p in procs):
        time.sleep(0.05)
    hung = [rank for rank, p in enumerate(procs) if p.is_alive()] if time.time() >= end else []
    for p in procs:
        p.kill() if p.exitcode is None and (hung or any(o.exitcode for o in procs)) else p.join()
    assert not hung, f'processes {hung} were still waiting after {limit} s'
    errors = [o.read_text() for o in sorted(folder.glob('[01].txt'))]
    assert not errors, '\n'.join(errors)
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


def run_as(rank, task, folder, args):
    try:
        broadcast_on_the_cpu()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', ACCELERATE_USE_CPU='true')
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
        torch.save(task(rank, *args), f'{folder}/{rank}.pt')
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        with open(f'{folder}/{rank}.txt', 'w') as f:
            f.write(f'process {rank}: {traceback.format_exc()}')
        os._exit(1)


def broadcast_on_the_cpu():
    "fastai's loader calls `.cuda()`, as NCCL needs"
    import fastai.distributed

    fastai.distributed.DistributedDL._broadcast = broadcast


def broadcast(self, t, rank):
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


class Replicas(nn.DataParallel):
    "DataParallel's split into replicas; what each has seen"

    def __init__(self, net, n):
        super().__init__(net)
        self.device_ids, self.seen = list(range(n)), []

    def forward(self, x):
        parts = x.chunk(len(self.device_ids))
        self.seen.append(parts)
        return torch.cat([self.module(o) for o in parts])
