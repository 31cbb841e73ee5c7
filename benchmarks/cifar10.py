"""CIFAR-10 with few labels, in a time given: WRN-28-2, bfloat16, views made on the device; one command for a GPU.

    python benchmarks/cifar10.py --labels 250 --minutes 10                   with torchvision's CIFAR-10: a download
    python benchmarks/cifar10.py --labels 40 --minutes 10 --images cifar10   with class folders in train/ and test/

The time is that of the whole command. A step is measured first; as many as fit are then trained, with the paper's
learning rate down the whole of its cosine, and the test accuracy of raw and averaged weights is printed along the
way. Each line goes to cifar10.csv as well, with the hardware. Nothing is chosen by the test images.

The paper trains 2**20 steps, days on a GPU. What fits into minutes is a hundredth of that, so the numbers do not
reproduce the published ones: they show how far one gets in that time. On a CPU the command runs too, and gets
nowhere.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

START = time.perf_counter()
warnings.filterwarnings('ignore', category=FutureWarning)  # before fastai is imported

import fastai
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from runs import add_run

from fixmatch_fastai.console import CommandError
from fixmatch_fastai.experiment.config import EMAConfig, ExperimentConfig, ViewsConfig, resolved
from fixmatch_fastai.experiment.datasets import load_images
from fixmatch_fastai.experiment.run import get_learner

HERE = Path(__file__).parent
SETTING = 'images labels policy network seed bs mu precision steps'.split()
RESULT = 'step seconds accuracy raw_accuracy mask_rate pseudo_acc n_test ms_a_step hardware'.split()
COLUMNS = SETTING + RESULT
# FixMatch with RandAugment, arXiv 2001.07685, table 2
PUBLISHED = {40: '86.19 ± 3.37', 250: '94.93 ± 0.65', 4000: '95.74 ± 0.05'}


def hardware(device):
    name = f'{device.type}, {platform.machine()}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    torch_version = torch.__version__.split('+')[0]
    return f'{name}; Python {platform.python_version()}, torch {torch_version}, fastai {fastai.__version__}'


class EndTimes(Callback):
    "When each training batch ended"

    order, run_valid = 1000, False

    def __init__(self):
        self.times = []

    def after_batch(self):
        if self.dls.device.type == 'cuda':
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


class Report(Callback):
    "Prints and writes a line after each evaluation"

    order, run_valid = 1000, False

    def __init__(self, file, fixed, start):
        self.file, self.fixed, self.start = file, fixed, start

    def after_epoch(self):
        values = dict(zip(self.recorder.metric_names, self.recorder.log))
        row = {k: round(values[k], 4) for k in ('accuracy', 'raw_accuracy', 'mask_rate', 'pseudo_acc')}
        row |= dict(step=self.train_iter, seconds=round(time.perf_counter() - self.start, 1)) | self.fixed
        print(
            f'step {row["step"]:>7,}  {row["seconds"]:>6.0f} s   averaged {100 * row["accuracy"]:5.2f} %   '
            f'raw {100 * row["raw_accuracy"]:5.2f} %   mask_rate {row["mask_rate"]:.3f}  '
            f'pseudo_acc {row["pseudo_acc"]:.3f}',
            flush=True,
        )
        add_run(self.file, COLUMNS, row)


def config(args, steps, eval_every):
    device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    return ExperimentConfig(
        data=str(args.images or 'cifar10'),
        root=args.root,
        n_labels=args.labels,
        policy=args.policy,
        network=args.network,
        bs=args.bs,
        mu=args.mu,
        seed=args.seed,
        steps=steps,
        eval_every=eval_every,
        precision='bf16' if device.type == 'cuda' else 'fp32',
        device=str(device),
        workers=args.workers,
        ema=EMAConfig(args.decay),
        views=ViewsConfig(device=True, cache=True),
    )


def fit(learn, n_steps, *cbs):
    if learn.dls.device.type == 'cuda':
        cbs = [ChannelsLast(), *cbs]  # the layout in which a GPU convolves in half precision
    with learn.no_bar(), learn.no_logging():
        learn.fit_fixmatch(n_steps, cbs=list(cbs))


def measure(args, images, n):
    "Seconds of a step, and of an evaluation of both weights, over two epochs of `n` steps"
    ends = EndTimes()
    fit(get_learner(config(args, 2 * n, n), images), 2 * n, ends)
    end, times = time.perf_counter(), ends.times
    second = times[n:]
    step = statistics.mean(b - a for a, b in zip(second, second[1:])) if n > 1 else times[-1] - times[0]
    return step, max(0.0, (end - times[n - 1] - n * step) / 2)


def plan(left, step, evaluation, evals):
    "`(steps, eval_every)`: what fits into `left` seconds with `evals` evaluations, with a tenth to spare"
    every = int((0.9 * left / evals - evaluation) / step)
    if every < 1:
        raise CommandError(
            f'In {max(0, left):.0f} s there is no time for {evals} evaluations of {evaluation:.1f} s '
            f'and as many steps of {step:.2f} s: give more --minutes, or fewer --evals.'
        )
    return evals * every, every


def main(argv=None):
    start = START if argv is None else time.perf_counter()
    p = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument('--labels', type=int, default=250, help='labelled images in all; the papers have 40, 250 and 4000')
    p.add_argument('--minutes', type=float, default=10, help='time of the whole command')
    p.add_argument(
        '--images',
        type=Path,
        help="a folder of train/ and test/ with a folder for each class (default: torchvision's CIFAR-10)",
    )
    p.add_argument('--root', help="folder of torchvision's data sets (default: fastai's)")
    p.add_argument('--policy', default='fixed', help='which pseudo-labels count, as in fixmatch_experiment')
    p.add_argument('--network', default='wrn_28_2', help='as in fixmatch_experiment')
    p.add_argument('--bs', type=int, default=64, help='labelled images in a step')
    p.add_argument('--mu', type=int, default=7, help='unlabelled images for each labelled one')
    p.add_argument(
        '--decay', type=float, help='of the averaged weights (default: a half-life of 2 %% of the steps, 0.999 at most)'
    )
    p.add_argument('--evals', type=int, default=20, help='evaluations along the way')
    p.add_argument(
        '--measure', type=int, default=40, help='steps of each of the two epochs in which a step is measured'
    )
    p.add_argument('--seed', type=int, default=0, help='of labels, starting weights and views')
    p.add_argument('--device', help='cuda or cpu (default: a GPU if there is one)')
    p.add_argument(
        '--workers', type=int, help='processes that open images (default: as many as there are cores, 8 at most)'
    )
    p.add_argument('--out', type=Path, default=HERE, help='where cifar10.csv goes')
    args = p.parse_args(argv)
    try:
        run(args, start)
    except CommandError as e:
        p.error(str(e))


def run(args, start):
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    c = resolved(config(args, 2 * args.measure, args.measure))
    images = load_images(c)
    images.split(c.n_labels, c.seed)
    step, evaluation = measure(args, images, args.measure)
    steps, every = plan(60 * args.minutes - (time.perf_counter() - start), step, evaluation, args.evals)
    c = resolved(config(args, steps, every))
    device = torch.device(c.device)
    name = args.images.name if args.images else 'CIFAR-10'
    print(
        f'{name}, {args.labels} labels, seed {args.seed}; {len(images.train + images.unlabeled):,} images in the pool, '
        f'{len(images.test):,} test images\n'
        f'{c.network}, {c.policy}, {c.precision}; {c.bs} labelled and {c.bs * c.mu} unlabelled images '
        f'in a step of {1e3 * step:.1f} ms, {evaluation:.1f} s an evaluation\n'
        f'{steps:,} steps ({steps / 2**20:.2%} of the paper), learning rate {c.optimizer.lr} down the whole schedule, '
        f'average with decay {c.ema.decay:.5f}\n{hardware(device)}\n',
        flush=True,
    )
    fixed = {k: getattr(c, k) for k in ('policy', 'network', 'seed', 'bs', 'mu', 'precision', 'steps')}
    fixed |= dict(images=name, labels=args.labels, n_test=len(images.test))
    fixed |= dict(ms_a_step=round(1e3 * step, 2), hardware=hardware(device))
    learn = get_learner(c, images)
    fit(learn, steps, Report(args.out / 'cifar10.csv', fixed, start))
    last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    print(
        f'\nLast step: {100 * last["accuracy"]:.2f} % with averaged weights, '
        f'{100 * last["raw_accuracy"]:.2f} % with raw ones. {time.perf_counter() - start:.0f} s in all.'
    )
    if args.labels in PUBLISHED and c.policy == 'fixed':
        print(
            f'The paper: {PUBLISHED[args.labels]} % after 1,048,576 steps, the median of the last 20 checkpoints, '
            'over 5 seeds (arXiv 2001.07685, table 2).'
        )


if __name__ == '__main__':
    sys.exit(main())
